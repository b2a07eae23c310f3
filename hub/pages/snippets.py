"""Lines to copy: the same revision from the command line, over REST and as a model."""

from dataclasses import dataclass

from hub.models import Repo, Revision


@dataclass(frozen=True, slots=True, kw_only=True)
class Snippet:
    id: str
    label: str
    text: str


def list_snippets(
    revision: Revision, *, origin: str, backbone: Revision | None = None
) -> list[Snippet]:
    if revision.repo.kind == Repo.Kind.BACKBONE:
        return [_pull(revision, origin)]
    snippets = [_pull(revision, origin), _reconstruct(revision, backbone, origin)]
    return [*snippets, _chat(revision, origin)]


def list_file_snippets(revision: Revision, *, origin: str) -> list[Snippet]:
    """Download one file, continuing what an earlier try left."""
    path = "delta.safetensors" if revision.repo.kind == Repo.Kind.DELTA else "config.json"
    url = f"{origin}/api/v1/repos/{revision.repo}/revisions/{revision.label}/files/{path}"
    text = f'curl -fL -C - -H "Authorization: Bearer $DELTACOME_TOKEN" -O \\\n  {url}'
    return [
        _pull(revision, origin),
        Snippet(id="snippet-curl", label="One file, resumable", text=text),
    ]


def _pull(revision: Revision, origin: str) -> Snippet:
    return Snippet(
        id="snippet-pull",
        label="Fetch it with the command line",
        text=f"deltacome pull {revision} {revision.repo.name} --url {origin}",
    )


def _reconstruct(revision: Revision, backbone: Revision | None, origin: str) -> Snippet:
    folder = backbone.repo.name if backbone else "BACKBONE"
    name = revision.repo.name
    lines = [f"deltacome reconstruct --base {folder} --delta {name} --out {name}-full"]
    if backbone:
        lines.insert(0, f"deltacome pull {backbone} {folder} --url {origin}")
    return Snippet(
        id="snippet-reconstruct", label="Rebuild the whole checkpoint", text="\n".join(lines)
    )


def _chat(revision: Revision, origin: str) -> Snippet:
    body = f'{{"model": "{revision}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    text = (
        f'curl {origin}/v1/chat/completions \\\n  -H "Authorization: Bearer $DELTACOME_TOKEN" \\\n'
        f"  -H \"Content-Type: application/json\" \\\n  -d '{body}'"
    )
    return Snippet(id="snippet-chat", label="Ask it, OpenAI-shaped", text=text)
