"""axe on every page, light and dark, wide and narrow; and nothing wider than the screen."""

import pytest

RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
VISITOR_PAGES = (
    "/",
    "/?q=nothing-has-this-name",
    "/planner",
    "/accounts/login",
    "/accounts/signup",
    "/a/b",
)
MEMBER_PAGES = (
    *("/", "/new", "/jobs", "/playground", "/planner"),
    *("/settings/tokens", "/settings/organisations"),
)
DELTA_TABS = ("", "/files", "/verification", "/evaluations")
WIDTHS = (1280, 375)
SCHEMES = ("light", "dark")


def find_faults(page, axe_source):
    """Look at a page in both schemes, which differ in colours alone."""
    # Given as an expression, the library is evaluated by the debugger: the policy stays on.
    page.evaluate(axe_source + "; undefined")
    found = []
    for scheme in SCHEMES:
        page.emulate_media(color_scheme=scheme)
        found += page.evaluate(
            "([rules, scheme]) => axe.run(document, {runOnly: rules}).then(r => r.violations.map("
            "v => `${scheme}: ${v.id}: ${v.nodes.map(n => n.html.slice(0, 120)).join(' | ')}`))",
            [RULES, scheme],
        )
    wider = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    return [*found, *([f"{wider} px wider than the screen"] if wider > 0 else [])]


def scan(page, paths, axe_source):
    faults = {}
    for path in paths:
        page.goto(path)
        page.wait_for_load_state("networkidle") if "/jobs/" not in path else None
        if found := find_faults(page, axe_source):
            faults[path] = found
    return faults


@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_has_an_accessibility_fault(
    visit, sign_in, client, backbone, delta, axe_source, width
):
    screen = {"viewport": {"width": width, "height": 800}}
    assert scan(visit("/", **screen), VISITOR_PAGES, axe_source) == {}
    page = sign_in("/jobs", **screen)
    job = page.get_by_role("row", name=delta).get_by_role("link").get_attribute("href")
    page.goto("/settings/organisations")
    page.get_by_label("Name").fill(f"wide-{width}")
    page.get_by_role("button", name="Create organisation").click()
    page.wait_for_url("**/organisations/wide-*")
    assert find_faults(page, axe_source) == []
    paths = [*MEMBER_PAGES, f"/{backbone}", job, *(f"/{delta}{tab}" for tab in DELTA_TABS)]
    assert scan(page, paths, axe_source) == {}


def test_the_checks_fit_a_narrow_screen(visit, delta):
    page = visit(f"/{delta}/verification", viewport={"width": 375, "height": 800})
    table = page.get_by_role("region", name="Table of checks")
    assert table.evaluate("region => region.scrollWidth - region.clientWidth") == 0
