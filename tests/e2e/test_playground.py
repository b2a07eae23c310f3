"""The playground in a real browser: the fine-tune beside its delta, departures, votes, links."""

import re
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import expect
from test_accessibility import WIDTHS, find_faults

QUESTION = "Question: Write as numbers: 6 March 2043\nAnswer:"
ANSWER_MS = 90_000


@pytest.fixture
def open_playground(sign_in):
    """Return a function that opens the page as the demo user."""

    def start(query, **options):
        page = sign_in("/jobs", **options)
        page.goto(f"/playground?max=16&mode=text&{query}")
        return page

    return start


def ask(page, prompt=QUESTION):
    page.get_by_label("Prompt for all").fill(prompt)
    page.get_by_label("Prompt for all").press("Control+Enter")
    expect(page.get_by_role("button", name="Run")).to_be_enabled(timeout=ANSWER_MS)


def tab_to(page, selector):
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate("s => document.activeElement.matches(s)", selector):
            return
    raise AssertionError(f"the keyboard does not reach {selector}")


def answers(page):
    return [
        box.inner_text() for box in page.locator("[data-part=answer]").all() if box.is_visible()
    ]


def test_the_fine_tune_and_the_backbone_stand_beside_a_delta(open_playground, backbone, delta):
    page = open_playground(f"d={delta}")
    for number, name in enumerate((delta, f"{delta}:finetune", backbone), start=1):
        expect(page.get_by_label(f"Model {number}")).to_have_value(name)
    ask(page)
    first, second, third = answers(page)
    assert first.strip() == second.strip() == "2043-03-06"
    assert third != first
    expect(page.get_by_text(re.compile("first token [0-9]+ ms"))).to_have_count(3)
    expect(page.locator("#cpu-note")).to_be_visible()


def test_nothing_is_asked_before_the_page_can_hear_the_answer(sign_in, delta):
    page = sign_in("/jobs")
    held = []
    # Playwright puts a mark on what it calls; a list's own method takes none.
    page.route("**/hub/playground*.js", lambda route: held.append(route))  # noqa: PLW0108
    page.goto(f"/playground?max=16&mode=text&d={delta}", wait_until="commit")
    run = page.get_by_role("button", name="Run")
    expect(run).to_be_disabled()
    page.get_by_label("Prompt for all").fill(QUESTION)
    assert len(held) == 1
    held[0].continue_()
    expect(run).to_be_enabled()
    ask(page)
    assert answers(page)[0].strip() == "2043-03-06"


def test_with_the_keyboard_alone_one_finds_where_a_model_departs(open_playground, backbone, delta):
    page = open_playground(f"d={delta}&d={delta}:finetune&d={backbone}")
    page.get_by_label("Prompt for all").focus()
    page.keyboard.type(QUESTION.replace("\n", " "))
    page.keyboard.press("Control+Enter")
    expect(page.locator("#departure")).to_be_visible(timeout=ANSWER_MS)
    expect(page.get_by_label("Along the answer of")).to_have_value("1")
    tab_to(page, "#compare")
    page.keyboard.press("Enter")
    expect(page.locator("#departure-status")).to_contain_text("Compared along", timeout=ANSWER_MS)
    kept, lost = page.locator("#departures [data-part=summary]").all_inner_texts()
    assert "the same first choice at all" in kept
    assert "first at token" in lost
    assert page.locator("#departures .token.is-first").count() == 1
    tab_to(page, "#departures summary")
    page.keyboard.press("Enter")
    rows = page.locator("#departures table").first.locator("tbody tr")
    assert (
        rows.count() == page.locator("#departures [data-part=tokens]").first.locator("span").count()
    )


def test_columns_come_and_go(open_playground, backbone, delta):
    page = open_playground(f"d={delta}&d={backbone}")
    add = page.get_by_role("button", name="Add a column")
    for number in range(3, 7):
        add.click()
        expect(page.get_by_label(f"Model {number}")).to_be_focused()
    expect(add).to_be_disabled()
    page.get_by_role("button", name="Remove column 6").click()
    expect(page.get_by_label("Model 5")).to_be_focused()
    expect(add).to_be_enabled()
    page.get_by_role("button", name="Remove column 1").click()
    expect(page.get_by_label("Model 2")).to_be_focused()


def test_a_vote_is_blind_until_it_is_given_and_counts_on_the_page(open_playground, backbone, delta):
    page = open_playground(f"d={delta}&d={backbone}&blind=1")
    ask(page)
    expect(page.locator("#vote-title")).to_be_focused()
    expect(page.get_by_role("heading", name="Answer A")).to_be_visible()
    seen = page.locator("main").inner_text()
    assert delta not in seen
    assert backbone not in seen
    assert "tokens/s" not in seen
    is_a = answers(page)[0].strip() == "2043-03-06"
    tab_to(page, f"[data-vote={'left' if is_a else 'right'}]")
    page.keyboard.press("Enter")
    expect(page.locator("#vote-result")).to_contain_text(f"You chose {delta}.")
    expect(page.get_by_label(f"Model {1 if is_a else 2}")).to_have_value(delta)
    expect(page.get_by_text(re.compile("tokens/s"))).not_to_have_count(0)
    page.goto(f"/{delta}")
    row = page.get_by_role("region", name="Table of blind votes").get_by_role("row", name=backbone)
    assert row.get_by_role("cell").all_inner_texts()[:3] == ["1", "0", "0"]


def test_a_blind_vote_needs_two_models(open_playground, backbone, delta):
    page = open_playground(f"d={delta}&d={delta}:finetune&d={backbone}&blind=1")
    page.get_by_label("Prompt for all").fill("a")
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_contain_text("two different models")


def test_a_link_pins_the_revisions_and_holds_the_prompt(open_playground, backbone, delta):
    copying = {"permissions": ["clipboard-read", "clipboard-write"]}
    page = open_playground(f"d={delta}:finetune&d={backbone}", **copying)
    page.get_by_label("Prompt for all").fill(QUESTION)
    page.get_by_label("Prompt for all").press("Tab")
    page.get_by_role("button", name="Copy link").click()
    expect(page.get_by_text("Copied")).to_be_visible()
    link = page.evaluate("navigator.clipboard.readText()")
    query = parse_qs(urlsplit(link).query)
    assert query["d"] == [f"{delta}@v1:finetune", f"{backbone}@v1"]
    page.goto(link)
    expect(page.get_by_label("Prompt for all")).to_have_value(QUESTION)
    expect(page.get_by_label("Model 1")).to_have_value(f"{delta}@v1:finetune")
    ask(page)
    assert answers(page)[0].strip() == "2043-03-06"


def test_a_long_prompt_never_leaves_the_browser_with_the_link(open_playground, delta):
    page = open_playground(f"d={delta}")
    prompt = "long " * 3000
    page.get_by_label("Prompt for all").fill(prompt)
    page.get_by_label("Prompt for all").press("Tab")
    expect(page).to_have_url(re.compile("#prompt=long"))
    assert "prompt" not in parse_qs(urlsplit(page.url).query)
    page.reload()
    expect(page.get_by_label("Prompt for all")).to_have_value(prompt)


def test_a_request_is_copied_as_python(open_playground, delta):
    copying = {"permissions": ["clipboard-read", "clipboard-write"]}
    page = open_playground(f"d={delta}", **copying)
    page.get_by_label("Prompt for all").fill('Say "hi"')
    page.get_by_label("Prompt for all").press("Tab")
    page.get_by_role("button", name="Copy as Python").first.click()
    expect(page.get_by_text("Copied")).to_be_visible()
    code = page.evaluate("navigator.clipboard.readText()")
    compile(code, "snippet", "exec")
    assert f'model="{delta}"' in code
    assert r'prompt="Say \"hi\""' in code


@pytest.mark.parametrize("width", WIDTHS)
def test_no_state_of_the_playground_has_an_accessibility_fault(
    open_playground, backbone, delta, axe_source, width
):
    screen = {"viewport": {"width": width, "height": 800}}
    page = open_playground(f"d={delta}&d={backbone}", **screen)
    ask(page)
    page.get_by_role("button", name="Compare token by token").click()
    expect(page.locator("#departure-status")).to_contain_text("Compared along", timeout=ANSWER_MS)
    page.locator("#departures summary").first.click()
    assert find_faults(page, axe_source) == []
    page.get_by_label("Blind vote").check()
    ask(page)
    expect(page.locator("#vote")).to_be_visible()
    assert find_faults(page, axe_source) == []
