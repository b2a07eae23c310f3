"""Talk to a hub: push a checkpoint, wait for its job, pull a revision. Everything resumes."""

import base64
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from deltacome_core.errors import UserError
from deltacome_core.file_names import is_plain_name
from deltacome_core.pushed_files import PushedFile, find_pushed_files
from deltacome_core.safetensors_file import LENGTH_BYTES, read_header

PARTS_IN_FLIGHT = 4
TRIES = 5
FIRST_PAUSE_S = 0.5
CHUNK_BYTES = 1 << 20
WAIT_S = 20
_RETRIED = frozenset({502, 503, 504})
_ENDED = frozenset({"DONE", "FAILED", "CANCELLED", "REJECTED"})

Progress = Callable[[int, int], None]
Answer = TypeVar("Answer")


class HubError(UserError):
    """A refusal of the hub, in the hub's own words."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(str(body.get("code", "hub_error")), status=status)
        self.status = status
        self.fields: dict[str, Any] = body.get("fields") or {}
        self.text = f"{body.get('message', 'The hub refused')} {body.get('do', '')}".strip()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class JobInfo:
    """The state of a job; `error` is the hub's text when it did not end well."""

    id: str
    state: str
    step: str
    repo: str
    revision: str | None
    progress: dict[str, Any]
    error: str | None
    error_code: str | None

    @property
    def is_finished(self) -> bool:
        return self.state in _ENDED


@dataclass(frozen=True, slots=True, kw_only=True)
class PulledRevision:
    """What a pull left on disk."""

    folder: Path
    name: str
    digest: str
    backbone: str | None
    size_bytes: int


class HubClient:
    """A connection to one hub; use it as a context manager.

    Args:
        url: address of the hub, without a path.
        token: an API token, or None for what is public.
        timeout_s: longest silence of the hub.
    """

    def __init__(self, url: str, token: str | None = None, *, timeout_s: float = 60.0) -> None:
        headers = {"User-Agent": "deltacome"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        self.url = url.rstrip("/")
        self._http = httpx.Client(
            base_url=f"{self.url}/api/v1/", headers=headers, timeout=timeout_s
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def whoami(self) -> dict[str, Any]:
        """Return the user name, the namespaces and the scopes of the token.

        Raises:
            HubError: the token is not accepted.
        """
        return self._json("GET", "whoami")

    def list_repos(self, *, kind: str = "", query: str = "") -> Iterator[dict[str, Any]]:
        """Yield the repos the token may see, the newest first.

        Args:
            kind: backbone, delta or empty for both.
            query: words of the name or the description.

        Yields:
            One repo at a time, as the API prints it.
        """
        after: str | None = ""
        while after is not None:
            parameters = {"kind": kind, "q": query, "after": after}
            page = self._json("GET", "repos", params=parameters)
            yield from page["items"]
            after = page["next"]

    def push(
        self,
        folder: Path,
        repo: str,
        *,
        on_progress: Progress | None = None,
        **spec: str | float | None,
    ) -> JobInfo:
        """Upload a checkpoint folder and queue its job; a second call goes on where one stopped.

        Args:
            folder: config.json, safetensors weights and the text files beside them.
            repo: namespace/name.
            on_progress: called with the bytes held by the hub and the bytes in all.
            spec: kind, backbone, recipe, bits_per_param, visibility, description.

        Returns:
            The queued job.

        Raises:
            HubError: the hub refused; its text says why.
            UserError: not_a_checkpoint, hub_unreachable, or a damaged header.
        """
        files = find_pushed_files(folder)
        listed = [{"path": file.path.name, "size_bytes": file.size_bytes} for file in files]
        body = {"kind": "delta", **spec, "repo": repo, "files": listed}
        upload = self._open_upload(body, files)
        if upload["state"] == "OPEN":
            self._send_headers(upload, files)
            self._send_parts(upload, files, on_progress)
            return _job_info(self._json("POST", f"uploads/{upload['id']}/seal")["job"])
        return self.get_job(upload["job"])

    def _open_upload(self, body: dict[str, Any], files: list[PushedFile]) -> dict[str, Any]:
        stamps = [file.modified_ns for file in files]
        stamp = hashlib.sha256(json.dumps([body, stamps], sort_keys=True).encode()).hexdigest()
        # The same folder finds its own upload again, unless that one came to nothing.
        for attempt in range(100):
            key = {"Idempotency-Key": f"{stamp[:40]}-{attempt}"}
            upload = self._json("POST", "uploads", json=body, headers=key)
            if upload["state"] == "OPEN":
                return upload
            if upload["job"] and self.get_job(upload["job"]).state not in {"FAILED", "CANCELLED"}:
                return upload
        raise UserError("hub_unreachable", url=self.url, reason="a hundred uploads came to nothing")

    def _send_headers(self, upload: dict[str, Any], files: list[PushedFile]) -> None:
        for row, file in zip(upload["files"], files, strict=True):
            if not row["needs_header"] or row["header_ok"]:
                continue
            length = read_header(file.path).data_start
            with file.path.open("rb") as handle:
                raw = handle.read(max(length, LENGTH_BYTES))
            self._json("PUT", f"uploads/{upload['id']}/files/{row['index']}/header", content=raw)

    def _send_parts(
        self, upload: dict[str, Any], files: list[PushedFile], on_progress: Progress | None
    ) -> None:
        part_bytes = int(upload["part_size_bytes"])
        total_bytes = sum(file.size_bytes for file in files)
        wanted = [
            (row["index"], number, file)
            for row, file in zip(upload["files"], files, strict=True)
            for number in sorted(set(range(row["n_parts"])) - set(row["parts"]))
        ]
        sent_bytes = total_bytes - sum(
            min(part_bytes, file.size_bytes - number * part_bytes) for _, number, file in wanted
        )

        def send(part: tuple[int, int, PushedFile]) -> int:
            index, number, file = part
            with file.path.open("rb") as handle:
                handle.seek(number * part_bytes)
                content = handle.read(part_bytes)
            address = f"uploads/{upload['id']}/files/{index}/parts/{number}"
            self._json("PUT", address, content=content, headers=_content_digest(content))
            return len(content)

        with ThreadPoolExecutor(PARTS_IN_FLIGHT) as pool:
            for n_bytes in pool.map(send, wanted):
                sent_bytes += n_bytes
                if on_progress is not None:
                    on_progress(sent_bytes, total_bytes)

    def get_job(self, job_id: str, *, wait_s: float = 0) -> JobInfo:
        """Return a job, after waiting up to `wait_s` seconds for its end.

        Args:
            job_id: id of the job.
            wait_s: seconds the hub may hold the answer.

        Returns:
            The job.

        Raises:
            HubError: there is no such job for this token.
        """
        return _job_info(self._json("GET", f"jobs/{job_id}", params={"wait": wait_s}))

    def wait(
        self,
        job_id: str,
        *,
        on_update: Callable[[JobInfo], None] | None = None,
        timeout_s: float | None = None,
    ) -> JobInfo:
        """Wait for the end of a job.

        Args:
            job_id: id of the job.
            on_update: called with each state that is read.
            timeout_s: give up waiting after this long; None waits for ever.

        Returns:
            The job as it is at the end, or when the time was over.

        Raises:
            HubError: there is no such job for this token.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = WAIT_S if deadline is None else deadline - time.monotonic()
            job = self.get_job(job_id, wait_s=max(0.0, min(WAIT_S, left_s)))
            if on_update is not None:
                on_update(job)
            if job.is_finished or (deadline is not None and time.monotonic() >= deadline):
                return job

    def pull(
        self, name: str, folder: Path, *, on_progress: Progress | None = None
    ) -> PulledRevision:
        """Download a revision; files that are there and right are kept, half ones continued.

        Args:
            name: namespace/name or namespace/name@revision.
            folder: where the files go; made when absent.
            on_progress: called with the bytes on disk and the bytes in all.

        Returns:
            What was pulled; `backbone` names the revision a delta was made from.

        Raises:
            HubError: there is no such revision for this token.
            UserError: file_digest_mismatch, name_unsafe, hub_unreachable.
        """
        repo, _, revision = name.partition("@")
        # The digest pins what `latest` meant when the pull began.
        found = self._json("GET", f"repos/{repo}/revisions/{revision or 'latest'}")
        folder.mkdir(parents=True, exist_ok=True)
        total_bytes = sum(file["size_bytes"] for file in found["files"])
        done_bytes = 0
        for file in found["files"]:
            if not is_plain_name(file["path"]):
                raise UserError("name_unsafe", name=ascii(file["path"])[:80])
            target = folder / file["path"]
            if not (target.is_file() and _sha256(target) == file["sha256"]):
                address = f"repos/{repo}/revisions/{found['digest']}/files/{file['path']}"
                self._download(address, target, sha256=file["sha256"])
            done_bytes += file["size_bytes"]
            if on_progress is not None:
                on_progress(done_bytes, total_bytes)
        backbone = found["backbone"]
        return PulledRevision(
            folder=folder,
            name=f"{found['repo']}@{found['label']}",
            digest=found["digest"],
            backbone=f"{backbone['repo']}@{backbone['label']}" if backbone else None,
            size_bytes=total_bytes,
        )

    def _download(self, address: str, target: Path, *, sha256: str) -> None:
        partial = target.with_name(f".{target.name}.partial")

        def resume() -> None:
            have = partial.stat().st_size if partial.exists() else 0
            headers = {"Range": f"bytes={have}-", "If-Range": f'"sha256:{sha256}"'} if have else {}
            with self._http.stream("GET", address, headers=headers) as response:
                if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                    return
                _raise_for(response)
                is_rest = response.status_code == httpx.codes.PARTIAL_CONTENT
                with partial.open("ab" if is_rest else "wb") as handle:
                    for chunk in response.iter_bytes(CHUNK_BYTES):
                        handle.write(chunk)

        self._retry(resume)
        if _sha256(partial) != sha256:
            partial.unlink()
            raise UserError("file_digest_mismatch", file=target.name)
        partial.rename(target)

    def _json(self, method: str, address: str, **options: Any) -> dict[str, Any]:
        def ask() -> dict[str, Any]:
            response = self._http.request(method, address, **options)
            _raise_for(response)
            found: dict[str, Any] = response.json() if response.content else {}
            return found

        return self._retry(ask)

    def _retry(self, ask: Callable[[], Answer]) -> Answer:
        """Every request of this client may be sent twice without harm."""
        attempt = 0
        while True:
            try:
                return ask()
            except (httpx.TransportError, _Unavailable) as error:
                attempt += 1
                if attempt == TRIES:
                    reason = str(error) or type(error).__name__
                    raise UserError("hub_unreachable", url=self.url, reason=reason) from error
                time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))


class _Unavailable(Exception):  # noqa: N818  never leaves this module
    """The hub's proxy answered for it."""


def _raise_for(response: httpx.Response) -> None:
    if response.is_success:
        return
    response.read()
    if response.status_code in _RETRIED:
        raise _Unavailable(f"status {response.status_code}")
    try:
        body = response.json()
    except json.JSONDecodeError:
        body = {"message": f"The hub answered {response.status_code}."}
    raise HubError(response.status_code, body if isinstance(body, dict) else {})


def _content_digest(content: bytes) -> dict[str, str]:
    digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
    return {"Content-Digest": f"sha-256=:{digest}:"}


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _job_info(found: dict[str, Any]) -> JobInfo:
    error = found["error"]
    return JobInfo(
        id=found["id"],
        state=found["state"],
        step=found["step"],
        repo=found["repo"],
        revision=found["revision"],
        progress=found["progress"],
        error=f"{error['message']} {error['do']}" if error else None,
        error_code=error["code"] if error else None,
    )
