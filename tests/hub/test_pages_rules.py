"""What holds for every page: no inline code, a title, one heading, small scripts, known vendors."""

import gzip
import hashlib
import json
import re
from html.parser import HTMLParser

import factories
import pytest
from django.test import Client

from deltacome_core import verify
from hub.demo.stack import ROOT
from hub.pages.checks import GRADES

STATIC = ROOT / "hub/static/hub"
TEMPLATES = sorted((ROOT / "templates").rglob("*.html"))
VENDORS = [STATIC / "vendor", ROOT / "tests/e2e/vendor"]
JS_BUDGET_BYTES = 40_000
CSS_BUDGET_BYTES = 16_000
HTML_BUDGET_BYTES = 30_000
# Sent by a page on its own, besides what its HTML names.
LOADED_LATER = {
    "hub/upload.js": ("transfer.js", "words.js", "upload.worker.js", "sha256.js"),
    "hub/playground.js": ("asking.js", "blind.js", "departure.js", "words.js"),
}
INLINE = {
    "a script without a file": re.compile(r"<script(?![^>]*\bsrc=)"),
    "a style element": re.compile(r"<style\b"),
    "a style attribute": re.compile(r"\sstyle="),
    "an event attribute": re.compile(r"\son[a-z]+="),
    "a script address": re.compile(r"javascript:"),
    "something from elsewhere": re.compile(
        r"<(?:link|script|img|use)\b[^>]*(?:href|src)=\"(?:https?:)?//"
    ),
}


class Outline(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.titles, self.headings, self.scripts, self.landmarks = 0, 0, [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.titles += tag == "title" and not found.get("id")
        self.headings += tag == "h1"
        if tag == "script":
            self.scripts.append(found["src"].removeprefix("/static/"))
        if tag in {"main", "nav"}:
            self.landmarks.append(found.get("aria-label", tag))


def zipped(path):
    return len(gzip.compress(path.read_bytes(), 9))


@pytest.fixture
def pages(acme, alice, ci_bot):
    """Every page of the hub, with the browser that opens it."""
    backbone = factories.make_backbone(acme, "base")
    revision = factories.make_revision(factories.make_repo(acme, "math"), backbone=backbone)
    factories.make_verification(revision, report={"checks": [], "matrices": []})
    factories.make_evaluation(revision, backbone=0.1, finetune=0.9, delta=0.9)
    running = factories.make_job(factories.make_repo(acme, "busy"), state="RUNNING")
    upload = factories.make_upload(factories.make_repo(acme, "half"), state="OPEN")
    visitor, member = Client(), Client()
    member.force_login(alice)
    mine = ["/", "/new", f"/new/{upload.pk}", "/jobs", f"/jobs/{running.pk}", "/playground"]
    mine += ["/settings/tokens", "/settings/organisations", "/settings/organisations/acme"]
    mine += ["/acme/base", "/acme/base/files", "/acme/busy"]
    mine += [f"/acme/math{tab}" for tab in ("", "/files", "/verification", "/evaluations")]
    theirs = ["/", "/accounts/login", "/accounts/signup", "/playground", "/acme/math", "/a/b"]
    return [(member, path) for path in mine] + [(visitor, path) for path in theirs]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_no_template_holds_inline_code(template):
    text = template.read_text()
    assert {name for name, pattern in INLINE.items() if pattern.search(text)} == set()


@pytest.mark.django_db
def test_every_page_has_an_outline_and_no_inline_code(pages):
    for browser, path in pages:
        text = browser.get(path).text
        outline = Outline(text)
        assert (outline.titles, outline.headings) == (1, 1), path
        assert "main" in outline.landmarks, path
        assert '<a class="skip" href="#main">' in text, path
        assert 'id="main"' in text, path
        assert {name for name, pattern in INLINE.items() if pattern.search(text)} == set(), path


@pytest.mark.django_db
def test_pages_below_the_first_have_breadcrumbs(pages):
    for browser, path in pages:
        has_trail = "Breadcrumb" in Outline(browser.get(path).text).landmarks
        assert has_trail == (path not in {"/", "/accounts/login", "/accounts/signup", "/a/b"}), path


@pytest.mark.django_db
def test_no_page_loads_more_than_its_budget(pages):
    for browser, path in pages:
        response = browser.get(path)
        scripts = [STATIC / name.removeprefix("hub/") for name in Outline(response.text).scripts]
        later = [
            name
            for script in Outline(response.text).scripts
            for name in LOADED_LATER.get(script, ())
        ]
        js_bytes = sum(zipped(script) for script in [*scripts, *(STATIC / name for name in later)])
        assert js_bytes <= JS_BUDGET_BYTES, path
        assert len(gzip.compress(response.content, 9)) <= HTML_BUDGET_BYTES, path
    assert zipped(STATIC / "app.css") <= CSS_BUDGET_BYTES


@pytest.mark.parametrize("folder", VENDORS, ids=lambda path: str(path.relative_to(ROOT)))
def test_vendored_files_are_the_recorded_ones(folder):
    records = {
        record["file"]: record for record in json.loads((folder / "VENDOR.json").read_text())
    }
    present = {path.name for path in folder.iterdir()} - {"VENDOR.json"}
    assert set(records) == present
    for name, record in records.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == record["sha256"], name
        assert record["name"]
        assert record["version"]
        assert record["licence"]


def test_every_icon_used_is_in_the_sprite():
    sprite = set(re.findall(r'<symbol id="([\w-]+)"', (STATIC / "vendor/lucide.svg").read_text()))
    texts = [path.read_text() for path in [*TEMPLATES, ROOT / "hub/templatetags/hub.py"]]
    used = {name for text in texts for name in re.findall(r'{% icon "([\w-]+)"', text)}
    from hub.templatetags import hub as tags

    used |= {icon for _, icon in tags._STATES.values()} | set(tags._NOTICE_ICONS.values())
    used |= {"shield-check", "info"}
    assert sprite == used


def test_the_grades_explained_are_the_grades_given():
    assert tuple((g.name, g.recovery, g.ppl) for g in GRADES) == verify.GRADES


@pytest.mark.django_db
def test_a_page_that_breaks_is_still_a_page(acme, alice, monkeypatch, settings):
    from hub.pages import reads

    monkeypatch.setattr(reads, "sum_saved", lambda *_: 1 / 0)
    browser = Client(raise_request_exception=False)
    answer = browser.get("/")
    assert answer.status_code == 500
    assert "Nothing that was stored is lost" in answer.text


@pytest.mark.django_db
def test_a_form_without_its_token_is_refused_in_words(alice):
    browser = Client(enforce_csrf_checks=True)
    browser.force_login(alice)
    answer = browser.post("/settings/tokens", {"name": "x", "scopes": ["read"], "days": 1})
    assert answer.status_code == 403
    assert "reload the page and send the form again" in answer.text
