"""What becomes public: the packed delta or the backbone, its reports and its card."""

from typing import Any

from hub import blobs
from hub.backbones import TENSORS_FILE
from hub.models import Job, Repo, Revision
from hub.publishing import Grade, Publication, Score

CARD_NAME = "README.md"
VERIFICATION_NAME = "verification.json"
EVALUATION_NAME = "evaluation.json"

Outputs = dict[str, Any]


def describe_backbone(job: Job, found: Outputs) -> Publication:
    """A backbone is published as it was uploaded, with a table of its tensors."""
    files = {file.path: str(file.blob_id) for file in job.upload.files.exclude(blob=None)}
    files[TENSORS_FILE] = found["tensors"]
    files.setdefault(CARD_NAME, _keep_text(_backbone_card(job, found)))
    return Publication(
        files=files,
        checkpoint_digest=found["digest"],
        architecture=found["architecture"],
        dtype=found["dtype"],
        size_bytes=found["source_size_bytes"],
        source_size_bytes=found["source_size_bytes"],
        n_params=found["n_params"],
        bits_per_param=8 * found["source_size_bytes"] / found["n_params"],
    )


def describe_delta(job: Job, steps: dict[str, Outputs]) -> Publication:
    """A fine-tune is published as its delta; its own weights are not kept."""
    found, made = steps["ingest"], steps["compress"]
    verified, evaluated = steps["verify"], steps["evaluate"]
    size = made["size"]
    backbone = Revision.objects.select_related("repo__namespace").get(pk=found["backbone"])
    files = {**made["files"], VERIFICATION_NAME: verified["report"]}
    if evaluated.get("report"):
        files[EVALUATION_NAME] = evaluated["report"]
    card = job.upload.files.filter(path=CARD_NAME).exclude(blob=None).first()
    files[CARD_NAME] = (
        str(card.blob_id) if card else _keep_text(_delta_card(job, backbone, size, verified))
    )
    return Publication(
        files=files,
        checkpoint_digest=found["digest"],
        architecture=found["architecture"],
        dtype=found["dtype"],
        size_bytes=size["total_bytes"],
        source_size_bytes=found["source_size_bytes"],
        n_params=found["n_params"],
        bits_per_param=size["bits_per_param"],
        recipe=size["recipe"],
        backbone_id=backbone.pk,
        verification=_grade(verified),
        evaluations=tuple(Score(**score) for score in evaluated["scores"]),
    )


def _grade(verified: Outputs) -> Grade:
    report = verified["verification"]
    return Grade(
        grade=report["grade"],
        recovery=report["recovery"],
        kl=report["kl"],
        top1=report["top1"],
        ppl_ratio=report["ppl_ratio"],
        report=report,
    )


def _keep_text(text: str) -> str:
    return str(blobs.keep_chunks([text.encode()]).sha256)


def _backbone_card(job: Job, found: Outputs) -> str:
    return f"""# {job.repo.name}

A backbone: {found["architecture"]}, {found["n_params"]:,} parameters in {found["dtype"]}.
Fine-tunes of it are kept here as packed deltas.
"""


def _delta_card(job: Job, backbone: Revision, size: Outputs, verified: Outputs) -> str:
    report = verified["verification"]
    # The card goes wherever the delta goes; the name of a private backbone must not.
    is_public = backbone.repo.visibility == Repo.Visibility.PUBLIC
    source = str(backbone.repo) if is_public else "BACKBONE"
    return f"""# {job.repo.name}

A full fine-tune, kept as a packed delta.

| property | value |
| --- | --- |
| backbone | `{backbone if is_public else f"sha256:{backbone.digest}"}` |
| recipe | `{size["recipe"]["name"]}`, {size["bits_per_param"]:.2f} bits per parameter in all |
| size | {_describe_size(size)} |
| verification | grade {report["grade"]}, recovery {report["recovery"]:.5f} |

To get the whole checkpoint back:

```
deltacome pull {source} backbone
deltacome pull {job.repo} delta
deltacome reconstruct --base backbone --delta delta --out fine-tune
```
"""


def _describe_size(size: Outputs) -> str:
    if not size["payload_bytes"]:
        return "0 bytes of payload: the fine-tune equals the backbone, there is nothing to store"
    return f"{size['total_bytes']:,} bytes, {size['ratio']:.1f} times smaller, all overhead counted"
