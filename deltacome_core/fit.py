"""Tell whether a fine-tune's tensors fit a backbone's, by name, shape and data type."""

from dataclasses import dataclass

from deltacome_core.checkpoint import FLOATS, Checkpoint, Layout, is_vocabulary_tensor
from deltacome_core.errors import UserError
from deltacome_core.quantised import refuse_quantised


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutReport:
    """How a fine-tune's tensors relate to a backbone's; `mismatched` holds readable lines."""

    matched: tuple[str, ...]
    grown_rows: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]

    @property
    def is_compatible(self) -> bool:
        """Whether a delta can be made: only tied heads and buffers may be absent."""
        return bool(self.matched) and not self.mismatched and all(map(_can_be_absent, self.missing))


def _can_be_absent(name: str) -> bool:
    return is_vocabulary_tensor(name) or name.endswith("inv_freq")


def _fits(base: tuple[str, tuple[int, ...]], tuned: tuple[str, tuple[int, ...]]) -> bool:
    both_float = base[0] in FLOATS and tuned[0] in FLOATS
    return base[1] == tuned[1] and (base[0] == tuned[0] or both_float)


def _has_grown(
    name: str, base: tuple[str, tuple[int, ...]], tuned: tuple[str, tuple[int, ...]]
) -> bool:
    if not is_vocabulary_tensor(name) or not base[1] or not tuned[1]:
        return False
    (base_rows, *base_rest), (rows, *rest) = base[1], tuned[1]
    return len(rest) == 1 and base_rest == rest and rows > base_rows


def compare_layout(base: Layout, tuned: Layout) -> LayoutReport:
    """Compare two sets of tensors by name, shape and data type.

    Args:
        base: layout of the backbone.
        tuned: layout of the fine-tune.

    Returns:
        Names that match, vocabularies that grew, names only in the backbone (missing), only in
        the fine-tune (unexpected), and "name: expected ... found ..." for what does not fit.
    """
    matched, grown, mismatched = [], [], []
    for name in sorted(base.keys() & tuned.keys()):
        if _fits(base[name], tuned[name]):
            matched.append(name)
        elif _has_grown(name, base[name], tuned[name]):
            grown.append(name)
        else:
            (base_dtype, base_shape), (dtype, shape) = base[name], tuned[name]
            same = base_shape == shape
            expected = f"{list(base_shape)}" + (f" {base_dtype}" if same else "")
            found = f"{list(shape)}" + (f" {dtype}" if same else "")
            mismatched.append(f"{name}: expected {expected} found {found}")
    return LayoutReport(
        matched=tuple(matched),
        grown_rows=tuple(grown),
        missing=tuple(sorted(base.keys() - tuned.keys())),
        unexpected=tuple(sorted(tuned.keys() - base.keys())),
        mismatched=tuple(mismatched),
    )


def check_backbone(base: Checkpoint, tuned: Checkpoint) -> None:
    """Refuse a fine-tune whose tensors do not fit the backbone.

    Args:
        base: the backbone.
        tuned: the fine-tune.

    Raises:
        UserError: checkpoint_quantised, backbone_mismatch, naming every tensor with both shapes.
    """
    refuse_quantised(base.layout)
    refuse_quantised(tuned.layout)
    report = compare_layout(base.layout, tuned.layout)
    if report.is_compatible:
        return
    lines = list(report.mismatched) + [
        f"{name}: expected {list(base.layout[name][1])} found nothing" for name in report.missing
    ]
    if not lines:
        lines = [f"{name}: expected nothing" for name in report.unexpected]
    raise UserError("backbone_mismatch", tensors=lines)
