import os

import factories
import pytest

from hub.api.downloads import parse_range

pytestmark = pytest.mark.django_db
CONTENT = bytes(range(256)) * 40
URL = "/api/v1/repos/acme/math/revisions/v1/files/delta.safetensors"


@pytest.fixture
def file(acme):
    repo = factories.make_repo(acme, "math")
    revision = factories.make_revision(repo, files={"delta.safetensors": CONTENT})
    return revision.files.get()


@pytest.fixture
def tag(file):
    return f'"sha256:{file.blob_id}"'


def body(answer):
    return b"".join(answer.streaming_content) if answer.streaming else answer.content


def test_a_whole_file_comes_with_its_digest_and_safe_headers(client, file, tag):
    answer = client.get(URL)
    assert (answer.status_code, body(answer)) == (200, CONTENT)
    assert answer.headers["ETag"] == tag
    assert answer.headers["Content-Length"] == str(len(CONTENT))
    assert answer.headers["Content-Disposition"] == 'attachment; filename="delta.safetensors"'
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Accept-Ranges"] == "bytes"


@pytest.mark.parametrize(
    ("header", "span"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=5-9", (5, 10)),
        ("bytes=100-", (100, len(CONTENT))),
        ("bytes=-10", (len(CONTENT) - 10, len(CONTENT))),
        ("bytes=0-999999", (0, len(CONTENT))),
        ("bytes=-999999", (0, len(CONTENT))),
    ],
)
def test_a_range_gives_exactly_its_bytes(client, file, header, span):
    answer = client.get(URL, headers={"range": header})
    assert (answer.status_code, body(answer)) == (206, CONTENT[slice(*span)])
    assert answer.headers["Content-Range"] == f"bytes {span[0]}-{span[1] - 1}/{len(CONTENT)}"


@pytest.mark.parametrize("header", ["bytes=10240-", "bytes=99999-100000", "bytes=-0"])
def test_a_range_outside_the_file_is_refused(client, file, header):
    answer = client.get(URL, headers={"range": header})
    assert answer.status_code == 416
    assert answer.headers["Content-Range"] == f"bytes */{len(CONTENT)}"


@pytest.mark.parametrize(
    "header",
    ["bytes=9-5", "bytes=a-b", "bytes=-", "bytes=0-1,5-6", "items=0-1", "bytes=" + "9" * 30],
)
def test_a_range_that_makes_no_sense_gives_the_whole_file(client, file, header):
    assert client.get(URL, headers={"range": header}).status_code == 200


def test_an_empty_file_has_no_range():
    from deltacome_core.errors import UserError

    with pytest.raises(UserError):
        parse_range("bytes=0-", size_bytes=0)


def test_a_known_digest_is_not_sent_again(client, file, tag):
    for known in (tag, f'"other", W/{tag}', "*"):
        answer = client.get(URL, headers={"if-none-match": known})
        assert (answer.status_code, answer.headers["ETag"], body(answer)) == (304, tag, b"")


def test_a_range_of_an_older_file_gives_the_new_one_whole(client, file, tag):
    headers = {"range": "bytes=5-9"}
    assert client.get(URL, headers=headers | {"if-range": '"sha256:old"'}).status_code == 200
    assert client.get(URL, headers=headers | {"if-range": tag}).status_code == 206


def test_head_tells_without_sending(client, file, tag):
    answer = client.head(URL)
    assert (answer.status_code, answer.headers["ETag"]) == (200, tag)
    assert (answer.headers["Content-Length"], body(answer)) == (str(len(CONTENT)), b"")


@pytest.mark.parametrize(
    ("visibility", "revision", "caching"),
    [
        ("public", "v1", "public, max-age=31536000, immutable"),
        ("public", "latest", "public, no-cache"),
        ("private", "v1", "private, no-cache"),
    ],
)
def test_only_fixed_names_of_public_repos_are_cached(
    sign_in, alice, file, visibility, revision, caching
):
    repo = file.revision.repo
    type(repo).objects.update(visibility=visibility)
    answer = sign_in(alice).get(URL.replace("v1/files", f"{revision}/files"))
    assert answer.headers["Cache-Control"] == caching
    assert ("Authorization" in answer.headers.get("Vary", "")) == (visibility == "private")


def test_nginx_sends_the_bytes_where_it_is_set(client, file, settings):
    settings.X_ACCEL_PREFIX = "/inner"
    answer = client.get(URL)
    sha256 = file.blob_id
    expected = f"/inner/sha256/{sha256[:2]}/{sha256[2:4]}/{sha256}"
    assert (answer.headers["X-Accel-Redirect"], body(answer)) == (expected, b"")


def test_a_yanked_revision_still_downloads_by_its_number(client, file):
    type(file.revision).objects.update(state="YANKED")
    assert client.get(URL).status_code == 200
    assert client.get(URL.replace("/v1/", "/latest/")).status_code == 404


@pytest.mark.parametrize("path", ["nothing.json", "..%2f..%2fetc%2fpasswd"])
def test_only_files_of_the_revision_are_found(client, file, path):
    assert client.get(URL.replace("delta.safetensors", path)).status_code == 404


@pytest.mark.parametrize("state", ["DRAFT", "REJECTED"])
def test_a_revision_that_is_not_out_cannot_be_downloaded(client, file, state):
    type(file.revision).objects.update(state=state)
    assert client.get(URL).status_code == 404


@pytest.mark.django_db(transaction=True)
def test_uvicorn_streams_a_file_in_pieces(live_client, acme):
    content = os.urandom(3 * 2**20 + 17)
    repo = factories.make_repo(acme, "big")
    factories.make_revision(repo, files={"delta.safetensors": content})
    url = "/api/v1/repos/acme/big/revisions/v1/files/delta.safetensors"
    assert live_client.get(url).content == content
    part = live_client.get(url, headers={"range": "bytes=1048570-2097160"})
    assert (part.status_code, part.content) == (206, content[1048570:2097161])
    assert live_client.head(url).headers["content-length"] == str(len(content))
