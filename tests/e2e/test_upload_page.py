import hashlib
import re

import factories
import pytest
from playwright.sync_api import expect

CONFIG = b'{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}'


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes a folder with these files."""

    def write(**files):
        place = tmp_path / "checkpoint"
        place.mkdir()
        for name, content in files.items():
            (place / name.replace("__", ".")).write_bytes(content)
        return place

    return write


def choose(page, folder):
    page.get_by_label("Choose the checkpoint folder").set_input_files(str(folder))


def start(page, name):
    page.get_by_label("Name of the model").fill(name)
    page.get_by_role("button", name="Check and upload").click()


def test_a_wrong_backbone_is_shown_before_any_part_is_sent(sign_up, backbone, folder):
    weights = factories.safetensors_bytes(
        {"model.embed_tokens.weight": ("BF16", [64, 32]), "model.norm.weight": ("BF16", [32])}
    )
    page = sign_up("wrong-backbone")
    parts = []
    page.on("request", lambda request: parts.append(request) if "/parts/" in request.url else None)
    choose(page, folder(model__safetensors=weights, config__json=CONFIG))
    page.get_by_label("Backbone", exact=True).select_option(backbone)
    start(page, "misfit")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("does not fit")
    row = alert.get_by_role("row", name="model.norm.weight")
    expect(row.get_by_role("cell")).to_have_text(["[256]", "[32]"])
    assert parts == []


def test_a_refused_folder_leaves_nothing_and_may_be_corrected(sign_up, backbone, folder):
    """The second press of the button asks with what the form holds now."""
    weights = factories.safetensors_bytes({"model.norm.weight": ("BF16", [32])})
    page = sign_up("corrector")
    choose(page, folder(model__safetensors=weights, config__json=CONFIG))
    page.get_by_label("Backbone", exact=True).select_option(backbone)
    start(page, "second-try")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("does not fit")
    expect(alert.get_by_text("Code backbone_mismatch")).to_be_visible()
    expect(page.locator("#total")).to_be_hidden()
    expect(page.locator(".card:has(> #file-rows)")).to_be_hidden()
    expect(page).to_have_url(re.compile(r"/new$"))
    expect(page.get_by_role("button", name="Cancel the upload")).to_be_hidden()
    page.get_by_label("Backbone, kept whole").check()
    page.get_by_role("button", name="Check and upload").click()
    page.wait_for_url("**/jobs/*")
    page.goto("/new")
    expect(page.get_by_text("Continue an upload")).to_have_count(0)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(sign_up, folder):
    page = sign_up("pickler")
    choose(page, folder(pytorch_model__bin=b"\x80\x04", config__json=CONFIG))
    picked = page.locator("#picked")
    expect(picked).to_contain_text("No safetensors file was found among 2 files")
    expect(picked).to_contain_text("pytorch_model.bin can run code when opened")
    expect(picked).to_contain_text("save_pretrained(safe_serialization=True)")
    expect(page.get_by_role("button", name="Check and upload")).to_be_disabled()
    expect(page.get_by_text("1 file stays here")).to_be_visible()


def test_a_broken_upload_can_be_thrown_away_without_its_folder(sign_up, folder):
    page = sign_up("thrower")
    body = {
        "repo": "thrower/lost",
        "kind": "backbone",
        "files": [
            {"path": "config.json", "size_bytes": 9},
            {"path": "model.safetensors", "size_bytes": 99},
        ],
    }
    page.context.request.post(
        "/api/v1/uploads",
        data=body,
        headers={"X-CSRFToken": page.locator("[name=csrfmiddlewaretoken]").first.input_value()},
    )
    page.goto("/new")
    page.get_by_role("link", name="thrower/lost").click()
    page.get_by_role("button", name="Cancel the upload").click()
    page.wait_for_url("**/new")
    expect(page.get_by_role("link", name="thrower/lost")).to_have_count(0)


def test_files_that_stay_behind_are_listed_with_their_reason(sign_up, folder):
    page = sign_up("left-behind")
    chosen = folder(
        model__safetensors=factories.safetensors_bytes(),
        config__json=CONFIG,
        optimizer__pt=b"x",
        notes__pdf=b"x",
    )
    choose(page, chosen)
    expect(page.locator("#picked")).to_contain_text("2 files")
    page.get_by_text("2 files stay here").click()
    expect(page.get_by_text("can run code when opened")).to_be_visible()
    expect(page.get_by_text("not part of a checkpoint")).to_be_visible()


def test_the_size_is_told_before_anything_is_sent(sign_up, backbone):
    page = sign_up("estimator")
    page.get_by_label("Backbone", exact=True).select_option(backbone)
    expect(page.locator("#estimate")).to_contain_text(re.compile(r"About 1/\d+\.\d"))
    before = page.locator("#estimate").inner_text()
    page.get_by_label("Bits per parameter").fill("2")
    expect(page.locator("#estimate")).not_to_have_text(before)


def test_pause_holds_the_upload_and_cancel_throws_it_away(sign_up, folder):
    page = sign_up("pauser")
    network = page.context.new_cdp_session(page)
    network.send("Network.enable")
    limits = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 300_000}
    network.send("Network.emulateNetworkConditions", limits)
    big = factories.safetensors_bytes({"w": ("F32", [1024, 1024])})
    choose(page, folder(model__safetensors=big, config__json=CONFIG))
    page.get_by_label("Backbone, kept whole").check()
    start(page, "paused")
    page.get_by_role("button", name="Pause").click()
    expect(page.locator("#phase")).to_contain_text("Paused")
    page.wait_for_timeout(500)
    still = page.locator("#total-text").inner_text()
    page.wait_for_timeout(500)
    assert page.locator("#total-text").inner_text() == still
    upload_id = page.url.rsplit("/", 1)[1]
    page.get_by_role("button", name="Cancel the upload").click()
    page.wait_for_url("**/new")
    assert page.request.get(f"/api/v1/uploads/{upload_id}").json()["state"] == "ABORTED"


def test_a_page_without_https_hashes_by_itself(sign_up, folder):
    page = sign_up("intranet", host="hub.test")
    assert page.evaluate("globalThis.crypto.subtle") is None
    choose(page, folder(model__safetensors=factories.safetensors_bytes(), config__json=CONFIG))
    page.get_by_label("Backbone, kept whole").check()
    start(page, "plain-http")
    page.wait_for_url("**/jobs/*")


def test_our_sha256_agrees_with_the_standard_library(visit):
    page = visit("/new")
    source = page.evaluate("import('/static/hub/sha256.js').then((m) => { globalThis.m = m; })")
    assert source is None
    for length in (0, 1, 55, 56, 57, 63, 64, 65, 119, 120, 127, 128, 1000, 100_003):
        code = (
            f"Array.from(m.sha256(Uint8Array.from({{length: {length}}}, (_, i) => (i * 31) % 251)))"
        )
        expected = hashlib.sha256(bytes(i * 31 % 251 for i in range(length))).digest()
        assert bytes(page.evaluate(code)) == expected, length
