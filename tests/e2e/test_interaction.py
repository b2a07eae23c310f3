import re

import pytest
from playwright.sync_api import expect


@pytest.fixture
def complaints(visit):
    """Collect what the browser complains about: scripts, styles and policies that failed."""
    found = []

    def watch(page):
        page.on("pageerror", lambda error: found.append(str(error)))
        page.on("console", lambda m: found.append(m.text) if m.type == "error" else None)
        return page

    yield watch
    assert found == []


def test_filters_narrow_the_list_without_a_reload(visit, backbone, delta, complaints):
    page = complaints(visit("/"))
    page.evaluate("globalThis.isSamePage = true")
    page.get_by_label("Kind").select_option("backbone")
    expect(page.get_by_role("link", name=delta)).to_have_count(0)
    expect(page.get_by_role("link", name=backbone, exact=True)).to_be_visible()
    page.get_by_label("Search", exact=True).fill("no such thing")
    expect(page.get_by_text("Nothing matches")).to_be_visible()
    expect(page).to_have_url(re.compile(r"kind=backbone"))
    assert page.evaluate("globalThis.isSamePage")


def test_a_snippet_is_copied(sign_in, delta, complaints):
    page = complaints(sign_in("/jobs", permissions=["clipboard-read", "clipboard-write"]))
    page.goto(f"/{delta}")
    page.get_by_role("button", name="Copy").first.click()
    expect(page.get_by_text("Copied")).to_be_visible()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith(f"deltacome pull {delta}@v1 dates --url http://127.0.0.1:")


def test_the_log_of_a_finished_job_is_replayed(sign_in, delta, complaints):
    page = complaints(sign_in("/jobs"))
    page.get_by_role("row", name=delta).get_by_role("link").click()
    expect(page.locator("#lines")).to_contain_text("publish done")
    line = page.locator("#lines li").filter(has_text="model.layers.0")
    expect(line).to_have_text(re.compile(r"relative error [\d.]+ · [\d.]+ s$"))
    for subject in ("backbone", "finetune", "delta"):
        expect(page.locator("#lines")).to_contain_text(f"subject {subject}")
    expect(page.locator("#log-status")).to_have_text("Read from the stored events.")


def test_a_file_is_downloaded_on_a_narrow_screen_without_scrolling(sign_in, delta):
    page = sign_in("/jobs", viewport={"width": 375, "height": 800})
    page.goto(f"/{delta}/files")
    for link in page.get_by_role("link", name=re.compile("^Download ")).all():
        box = link.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 375


def test_an_error_stays_in_its_column(sign_in, backbone, delta):
    page = sign_in("/jobs")
    page.goto(f"/playground?d=nobody/nothing&d={delta}&max=4&mode=text")
    page.get_by_label("Prompt for all").fill("Question: Write as numbers: 6 March 2043\nAnswer:")
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("button", name="Run")).to_be_enabled(timeout=60_000)
    expect(page.get_by_role("alert")).to_have_count(1)
    expect(page.get_by_role("alert")).to_contain_text("does not exist")
    assert page.get_by_role("region", name="Answer of column 2").inner_text().strip()


def test_stop_ends_the_answer(sign_in, backbone, complaints):
    page = complaints(sign_in("/jobs"))
    page.goto(f"/playground?d={backbone}&max=480&mode=text")
    page.get_by_label("Model 2").select_option("")
    # Slow enough that the answer is still coming when somebody reaches for the button.
    network = page.context.new_cdp_session(page)
    network.send("Network.enable")
    limits = {"offline": False, "latency": 0, "downloadThroughput": 500, "uploadThroughput": -1}
    network.send("Network.emulateNetworkConditions", limits)
    page.get_by_label("Prompt for all").fill("Once upon a time")
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_text(re.compile("tokens/s"))).to_be_visible(timeout=60_000)
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text(re.compile("stopped"))).to_be_visible()


def test_the_playground_is_in_its_address(sign_in, backbone, delta):
    page = sign_in("/jobs")
    page.goto(f"/playground?d={delta}")
    page.get_by_label("Temperature").fill("0.7")
    page.get_by_label("Seed").fill("9")
    page.get_by_label("Seed").press("Tab")
    expect(page).to_have_url(re.compile("seed=9"))
    address = page.url
    page.goto(address)
    assert page.url == address
    expect(page.get_by_label("Temperature")).to_have_value("0.7")
    expect(page.get_by_label("Model 1")).to_have_value(delta)


def test_people_share_an_organisation(sign_up, complaints):
    # A name that is not accepted is a 422, of which a browser complains.
    owner, guest = sign_up("olga"), complaints(sign_up("gustav"))
    owner.get_by_role("link", name="Settings").click()
    owner.get_by_role("link", name="Organisations").click()
    owner.get_by_label("Name").fill("orchard")
    owner.get_by_role("button", name="Create organisation").click()
    owner.get_by_label("Username").fill("gustaf")
    owner.get_by_role("button", name="Save").click()
    expect(owner.get_by_text("Nobody here is called gustaf.")).to_be_visible()
    owner.get_by_label("Username").fill("gustav")
    owner.get_by_label("Role", exact=True).select_option("maintainer")
    owner.get_by_role("button", name="Save").click()
    expect(owner.get_by_role("row", name="gustav")).to_contain_text("maintainer")
    guest.goto("/new")
    expect(guest.get_by_label("Namespace").get_by_role("option")).to_have_text(
        ["gustav", "orchard"]
    )
    owner.get_by_role("button", name="Remove gustav").click()
    expect(owner.get_by_text("gustav is no longer in orchard.")).to_be_visible()
    guest.reload()
    expect(guest.get_by_label("Namespace").get_by_role("option")).to_have_text(["gustav"])
