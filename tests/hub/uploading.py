"""An upload as a client makes it, call by call."""

import base64
import hashlib
import json

import factories

WEIGHTS = factories.safetensors_bytes()
CONFIG = json.dumps({"model_type": "llama"}).encode()
FILES = {"config.json": CONFIG, "model.safetensors": WEIGHTS}
PART = 4096


def body(files=FILES, **fields):
    listed = [{"path": path, "size_bytes": len(content)} for path, content in files.items()]
    return {"repo": "acme/math", "kind": "delta", "files": listed} | fields


def open_upload(browser, files=FILES, *, headers=None, **fields):
    return browser.post(
        "/api/v1/uploads", body(files, **fields), content_type="application/json", headers=headers
    )


def put_header(browser, upload_id, index, content):
    return browser.put(
        f"/api/v1/uploads/{upload_id}/files/{index}/header",
        factories.header_of(content),
        content_type="application/octet-stream",
    )


def content_digest(content):
    return f"sha-256=:{base64.b64encode(hashlib.sha256(content).digest()).decode()}:"


def put_part(browser, upload_id, index, number, content, digest=None):
    headers = {"content-digest": digest or content_digest(content)}
    return browser.put(
        f"/api/v1/uploads/{upload_id}/files/{index}/parts/{number}",
        content,
        content_type="application/octet-stream",
        headers=headers,
    )


def put_parts(browser, upload_id, index, content):
    for number in range(-(-len(content) // PART)):
        chunk = content[number * PART : (number + 1) * PART]
        assert put_part(browser, upload_id, index, number, chunk).status_code == 200


def push(browser, files=FILES, **fields):
    """Do the whole upload and return the answer of the seal."""
    upload_id = open_upload(browser, files, **fields).json()["id"]
    for index, (path, content) in enumerate(files.items()):
        if path.endswith(".safetensors"):
            assert put_header(browser, upload_id, index, content).status_code == 200
    for index, content in enumerate(files.values()):
        put_parts(browser, upload_id, index, content)
    return browser.post(f"/api/v1/uploads/{upload_id}/seal")
