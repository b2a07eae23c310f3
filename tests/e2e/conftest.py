"""A whole hub as child processes, and a real browser in front of it."""

import shutil
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from deltacome_core.client import HubClient
from hub.demo import seed
from hub.demo.stack import Stack

PASSWORD = "correct horse battery"
# Small parts, so that the eight megabytes of the demo models have an inside to break off in.
PART_BYTES = 256 * 1024
# Not a loopback name: to the browser this is plain http on an intranet, without crypto.subtle.
INTRANET = "hub.test"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    f"--host-resolver-rules=MAP {INTRANET} 127.0.0.1",
]
TIMEOUT_MS = 20_000
N_ITEMS = 8
CARD = """# Dates

| in | out |
|---|---|
| 6 March 2043 | `2043-03-06` |

```
Question: Write as numbers: 6 March 2043
```
"""


@pytest.fixture(scope="session")
def stack(tmp_path_factory):
    extra_env = {
        "UPLOAD_PART_BYTES": str(PART_BYTES),
        "ALLOWED_HOSTS": f"127.0.0.1,{INTRANET}",
        "OMP_NUM_THREADS": "1",
        "FREE_SPACE_FLOOR_BYTES": "0",
        "ENGINE_KV_BYTES": str(256 << 20),
    }
    with Stack(data_dir=tmp_path_factory.mktemp("hub"), extra_env=extra_env) as running:
        yield running


# While it lives, Django takes all of the process for asynchronous code.
@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, stack):
    """Return a function that opens a page in a browser profile of its own."""
    contexts = []

    def open_page(path="/", *, host="127.0.0.1", **options):
        context = browser.new_context(base_url=f"http://{host}:{stack.port}", **options)
        context.set_default_timeout(TIMEOUT_MS)
        contexts.append(context)
        page = context.new_page()
        page.goto(path)
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def sign_up(visit):
    """Return a function that gives a page of a person who has just made an account."""

    def start(name, **options):
        page = visit("/accounts/signup?next=/new", **options)
        page.get_by_label("Name").fill(name)
        page.get_by_label("Password").fill(PASSWORD)
        page.get_by_role("button", name="Sign up").click()
        page.wait_for_url("**/new")
        return page

    return start


@pytest.fixture(scope="session")
def account(stack):
    """The demo user, for what the browser is not the subject of."""
    return seed.open_account(stack)


@pytest.fixture(scope="session")
def client(stack, account):
    with HubClient(stack.url, account.token) as hub:
        yield hub


def push(client, folder, repo, **spec):
    job = client.push(folder, repo, visibility="public", **spec)
    done = client.wait(job.id)
    assert done.state == "DONE", done.error


@pytest.fixture(scope="session")
def backbone(client):
    """Publish the demo backbone once and return its name."""
    push(client, seed.EXAMPLES / "backbone", "demo/tiny-llama", kind="backbone")
    return "demo/tiny-llama"


@pytest.fixture(scope="session")
def delta(client, backbone, tmp_path_factory):
    """Publish one delta, scored on a few items only, and return its name."""
    folder = shutil.copytree(seed.EXAMPLES / "dates", tmp_path_factory.mktemp("tuned") / "dates")
    items = (folder / "evaluation.jsonl").read_text().splitlines(keepends=True)
    (folder / "evaluation.jsonl").write_text("".join(items[:N_ITEMS]))
    (folder / "README.md").write_text(CARD)
    push(client, folder, "demo/dates", recipe="datafree")
    return "demo/dates"


@pytest.fixture
def sign_in(visit, account):
    """Return a function that opens a page as the demo user."""

    def start(path="/", **options):
        page = visit(f"/accounts/login?next={path}", **options)
        page.get_by_label("Username").fill(account.username)
        page.get_by_label("Password").fill(account.password)
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_url(f"**{path}")
        return page

    return start


@pytest.fixture(scope="session")
def axe_source():
    return (Path(__file__).parent / "vendor/axe.min.js").read_text()
