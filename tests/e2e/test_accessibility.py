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
MEMBER_PAGES = ("/", "/new", "/jobs", "/playground", "/planner", "/settings/tokens")
DELTA_TABS = ("", "/files", "/verification", "/evaluations")
SCREENS = [
    pytest.param(scheme, width, id=f"{scheme}-{width}")
    for scheme in ("light", "dark")
    for width in (1280, 375)
]


def find_faults(page, axe_source):
    # Given as an expression, the library is evaluated by the debugger: the policy stays on.
    page.evaluate(axe_source + "; undefined")
    found = page.evaluate(
        "rules => axe.run(document, {runOnly: rules}).then(r => r.violations.map("
        "v => `${v.id}: ${v.nodes.map(n => n.html.slice(0, 120)).join(' | ')}`))",
        RULES,
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


@pytest.mark.parametrize(("scheme", "width"), SCREENS)
def test_no_page_has_an_accessibility_fault(
    visit, sign_in, client, backbone, delta, axe_source, scheme, width
):
    screen = {"color_scheme": scheme, "viewport": {"width": width, "height": 800}}
    assert scan(visit("/", **screen), VISITOR_PAGES, axe_source) == {}
    page = sign_in("/jobs", **screen)
    job = page.get_by_role("row", name=delta).get_by_role("link").get_attribute("href")
    paths = [*MEMBER_PAGES, f"/{backbone}", job, *(f"/{delta}{tab}" for tab in DELTA_TABS)]
    assert scan(page, paths, axe_source) == {}
