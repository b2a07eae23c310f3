"""Backbones that are served with fewer bits than they are stored with: which tensors, and how.

The values themselves are computed in `served`; this module needs no torch.
"""

from collections import defaultdict
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from deltacome_core.entries import REST_GROUP, group_of, is_lowrank_shape
from deltacome_core.errors import UserError

if TYPE_CHECKING:
    from deltacome_core.checkpoint import Layout

NATIVE = "native"
# F32 and F64 matrices are rounded too: what counts is what the server holds.
_ROUNDED_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
# Servers keep the modules that choose experts whole: they are small, and a wrong choice is costly.
_ROUTERS = frozenset({"gate", "router"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How a row is rounded: `group` neighbours share a scale, 0 means the whole row.

    A symmetric grid goes from -(2^(bits-1) - 1) to its negative; an asymmetric one has 2^bits
    steps and a zero point.
    """

    bits: int
    group: int
    symmetric: bool


SCHEMES = {
    "int8": Scheme(bits=8, group=0, symmetric=True),
    "int4": Scheme(bits=4, group=128, symmetric=False),
}
PRECISIONS = (NATIVE, *SCHEMES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """A scheme, and the tensors of the backbone that are served by it; all others are native."""

    scheme: str
    tensors: frozenset[str]


def plan_precision(name: str, layout: "Layout") -> Precision | None:
    """Say what a precision means for one backbone.

    Rounded are the matrices of the decoder's layers: those of the list of numbered modules that
    holds most parameters. Embeddings, head, norms, biases, routers, a vision tower and a projector
    stay as they are, as servers keep them.

    Args:
        name: one of PRECISIONS.
        layout: dtype and shape of the backbone's tensors by name.

    Returns:
        The precision; None for the native one.

    Raises:
        UserError: precision_unknown, precision_unusable when there is nothing to round.
    """
    if name == NATIVE:
        return None
    if name not in SCHEMES:
        raise UserError("precision_unknown", name=name, known=list(PRECISIONS))
    stacks: dict[str, set[str]] = defaultdict(set)
    for tensor, (dtype, shape) in layout.items():
        group = group_of(tensor)
        module = tensor.removesuffix(".weight").rpartition(".")[2]
        if group == REST_GROUP or dtype not in _ROUNDED_DTYPES or module in _ROUTERS:
            continue
        if is_lowrank_shape(tensor, shape):
            stacks[group.rpartition(".")[0]].add(tensor)
    if not stacks:
        reason = "the backbone has no numbered layers with matrices"
        raise UserError("precision_unusable", reason=reason)

    def n_params(stack: str) -> tuple[int, str]:
        return sum(prod(layout[tensor][1]) for tensor in stacks[stack]), stack

    return Precision(scheme=name, tensors=frozenset(stacks[max(stacks, key=n_params)]))
