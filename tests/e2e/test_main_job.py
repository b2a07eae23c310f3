"""A person's way through the hub, with nothing replaced: browser, web, queue, worker, engine."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import expect

from deltacome_core.checkpoint import open_checkpoint
from hub.demo.seed import EXAMPLES

FINE_TUNE = EXAMPLES / "dates"
JOB_TIMEOUT_MS = 300_000
ANSWER_TIMEOUT_MS = 60_000
# Slow enough to break the upload off in the middle.
SLOW_BYTES_PER_S = 2_000_000
MIN_HELD_BYTES = 1_000_000


def throttle(page):
    network = page.context.new_cdp_session(page)
    network.send("Network.enable")
    limits = {"offline": False, "latency": 0, "downloadThroughput": -1}
    network.send(
        "Network.emulateNetworkConditions", limits | {"uploadThroughput": SLOW_BYTES_PER_S}
    )


def choose_folder(page, folder):
    page.get_by_label("Choose the checkpoint folder").set_input_files(str(folder))
    expect(page.locator("#picked")).to_contain_text("of them safetensors")


def list_parts(page, upload_id):
    """Return the parts that the hub holds and those it waits for, as (file, number)."""
    files = page.request.get(f"/api/v1/uploads/{upload_id}").json()["files"]
    wanted = {(file["index"], number) for file in files for number in range(file["n_parts"])}
    held = {(file["index"], number) for file in files for number in file["parts"]}
    return held, wanted - held


def start_and_abandon(page):
    """Upload until some of it is held, then close the page as a person closes a laptop."""
    throttle(page)
    choose_folder(page, FINE_TUNE)
    page.get_by_label("Name of the model").fill("dates")
    page.get_by_label("Description").fill("Writes dates as numbers.")
    page.get_by_role("button", name="Check and upload").click()
    page.wait_for_url(re.compile(r"/new/[0-9a-f-]{36}"))
    # wait_for_function() would evaluate text in the page, which its policy forbids.
    while page.evaluate("document.getElementById('total').value") < MIN_HELD_BYTES:
        page.wait_for_timeout(50)
    upload_id = page.url.rsplit("/", 1)[1]
    page.close(run_before_unload=False)
    return upload_id


def resume(page, upload_id):
    """Pick the folder again and return the parts that were sent this time."""
    sent = set()

    def note(request):
        found = re.search(r"/files/(\d+)/parts/(\d+)$", request.url)
        if found and request.method == "PUT":
            sent.add((int(found[1]), int(found[2])))

    page.goto("/new")
    page.get_by_role("link", name="/dates").click()
    page.wait_for_url(f"**/new/{upload_id}")
    choose_folder(page, FINE_TUNE)
    page.on("request", note)
    page.get_by_role("button", name="Continue").click()
    page.wait_for_url("**/jobs/*")
    return sent


def download_all(page, folder):
    folder.mkdir()
    links = page.get_by_role("link", name=re.compile("^Download "))
    # A list is what is there now, which may still be the page before.
    expect(links.first).to_be_visible()
    for link in links.all():
        with page.expect_download() as started:
            link.click()
        started.value.save_as(folder / started.value.suggested_filename)
    return folder


def ask(page, prompt):
    """Ask all columns and return the answers of the first two."""
    page.get_by_label("Prompt for all").fill(prompt)
    page.get_by_label("As").select_option("text")
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("button", name="Run")).to_be_enabled(timeout=ANSWER_TIMEOUT_MS)
    return [page.get_by_role("region", name=f"Answer of column {n}").inner_text() for n in (1, 2)]


@pytest.fixture(scope="module")
def first_item():
    return json.loads((FINE_TUNE / "evaluation.jsonl").read_text().splitlines()[0])


def test_a_person_uploads_resumes_watches_downloads_rebuilds_and_chats(
    sign_up, backbone, first_item, tmp_path
):
    page = sign_up("ada")
    context = page.context
    upload_id = start_and_abandon(page)

    page = context.new_page()
    held, missing = list_parts(page, upload_id)
    assert held
    assert missing
    assert resume(page, upload_id) == missing

    page.evaluate("globalThis.isSamePage = true")
    expect(page.locator("#log")).to_contain_text("compress", timeout=JOB_TIMEOUT_MS)
    expect(page.locator("#history")).to_contain_text("running")
    assert page.evaluate("globalThis.isSamePage")
    page.get_by_role("link", name="Open ada/dates@v1").click(timeout=JOB_TIMEOUT_MS)
    expect(page.get_by_role("heading", level=1)).to_have_text("ada/dates")
    expect(page.get_by_role("region", name="Size saved")).to_contain_text("1/")
    expect(page.get_by_role("region", name="Quality kept")).to_contain_text("grade")
    expect(page.get_by_role("region", name="Quality kept")).to_contain_text("fine-tune")

    page.get_by_role("link", name="Files", exact=True).click()
    folder = download_all(page, tmp_path / "delta")
    rebuilt = reconstruct(folder, tmp_path / "rebuilt")
    assert rebuilt.layout == open_checkpoint(FINE_TUNE).layout

    page.get_by_role("link", name="Try it").click()
    page.get_by_label("Model 1").select_option("ada/dates")
    page.get_by_label("Model 2").select_option(backbone)
    answers = ask(page, first_item["prompt"])
    assert answers[0].strip() == first_item["answer"]
    assert answers[1].strip() != first_item["answer"]
    expect(
        page.get_by_text(re.compile(r"first token \d+ ms · [\d.]+ tokens/s")).first
    ).to_be_visible()


def reconstruct(delta: Path, out: Path):
    command = Path(sys.executable).with_name("deltacome")
    options = {"--base": EXAMPLES / "backbone", "--delta": delta, "--out": out}
    flat = [str(word) for pair in options.items() for word in pair]
    subprocess.run([command, "reconstruct", *flat], check=True, capture_output=True)
    return open_checkpoint(out)
