"""What design promises to work without JavaScript: everything but upload, live log, playground."""

import re

import pytest
from playwright.sync_api import expect


@pytest.fixture
def page(sign_in, delta):
    return sign_in("/jobs", java_script_enabled=False)


def test_models_are_found_and_read(page, delta):
    page.goto("/")
    page.get_by_label("Search", exact=True).fill("dates")
    page.get_by_label("Kind").select_option("delta")
    page.get_by_role("button", name="Search").click()
    page.get_by_role("link", name=delta).click()
    expect(page.get_by_role("region", name="Size saved")).to_contain_text("1/")
    page.get_by_role("link", name="Verification").click()
    expect(page.get_by_role("region", name="Table of checks")).to_contain_text("passed")


def test_a_file_is_downloaded(page, delta, tmp_path):
    page.goto(f"/{delta}/files")
    with page.expect_download() as started:
        page.get_by_role("link", name="Download delta.json").click()
    started.value.save_as(tmp_path / "delta.json")
    assert (tmp_path / "delta.json").read_text().startswith('{"')


def test_a_job_is_read(page, delta):
    page.get_by_role("row", name=delta).get_by_role("link").click()
    done = page.locator("[data-state=done]")
    assert [step.get_attribute("data-step") for step in done.all()] == [
        "ingest",
        "compress",
        "verify",
        "evaluate",
        "publish",
    ]


def test_a_token_is_made_and_revoked(page):
    page.goto("/settings/tokens")
    page.get_by_label("Name").fill("from a text browser")
    page.get_by_role("button", name="Create token").click()
    expect(page.locator("#token-secret")).to_have_text(re.compile(r"^dch_\w{36}$"))
    page.get_by_role("button", name="Revoke from a text browser").click()
    expect(page.get_by_role("row", name="from a text browser")).to_contain_text("revoked")
