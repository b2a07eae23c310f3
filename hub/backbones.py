"""What a backbone says of its tensors: enough to tell whether a fine-tune fits, without torch."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from deltacome_core.checkpoint import Layout
from deltacome_core.errors import InternalError, UserError
from deltacome_core.fit import LayoutReport, compare_layout
from deltacome_core.quantised import refuse_quantised
from hub import storage
from hub.access import AnyUser
from hub.models import Repo, Revision

TENSORS_FILE = "tensors.json"
MAX_NAMED_TENSORS = 20
MAX_CANDIDATES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    revision: Revision
    report: LayoutReport

    @property
    def n_differences(self) -> int:
        found = self.report
        return sum(map(len, (found.mismatched, found.missing, found.unexpected, found.grown_rows)))


def dump_tensors(layout: Layout, hashes: Mapping[str, str]) -> bytes:
    """Write a backbone's tensors.json: {name: {dtype, shape, sha256}}."""
    tensors = {
        name: {"dtype": dtype, "shape": list(shape), "sha256": hashes[name]}
        for name, (dtype, shape) in layout.items()
    }
    return json.dumps(tensors, sort_keys=True, separators=(",", ":")).encode()


def read_layout(revision: Revision) -> Layout:
    file = revision.files.filter(path=TENSORS_FILE).first()
    if file is None:
        raise InternalError(f"{revision.pk} has no {TENSORS_FILE}")
    return _load_layout(file.blob_id)


@lru_cache(maxsize=64)
def _load_layout(sha256: str) -> Layout:
    table = json.loads(b"".join(storage.get_store().read(sha256)))
    return {name: (row["dtype"], tuple(row["shape"])) for name, row in table.items()}


def visible_backbones(user: AnyUser) -> Iterable[Revision]:
    return (
        Revision.objects.visible_to(user)
        .published()
        .filter(repo__kind=Repo.Kind.BACKBONE)
        .select_related("repo__namespace")
        .order_by("-id")
    )


def find_fits(layout: Layout, candidates: Iterable[Revision]) -> list[Fit]:
    """Compare a fine-tune with backbones and return those that fit, the closest first.

    Raises:
        UserError: checkpoint_quantised; backbone_unknown without candidates; backbone_mismatch
            names what differs from the closest one.
    """
    refuse_quantised(layout)
    fits = sorted(
        (
            Fit(revision=revision, report=compare_layout(read_layout(revision), layout))
            for revision in candidates
        ),
        key=lambda fit: (not fit.report.is_compatible, fit.n_differences),
    )
    if not fits:
        raise UserError("backbone_unknown")
    if not fits[0].report.is_compatible:
        raise _mismatch(fits[0])
    return [fit for fit in fits if fit.report.is_compatible][:MAX_CANDIDATES]


def _mismatch(fit: Fit) -> UserError:
    differing = [
        *fit.report.mismatched,
        *(f"{name}: missing" for name in fit.report.missing),
        *(f"{name}: not in the backbone" for name in fit.report.unexpected),
    ]
    return UserError(
        "backbone_mismatch",
        backbone=str(fit.revision),
        tensors=differing[:MAX_NAMED_TENSORS],
        count=len(differing),
    )
