"""The tensors of one unit, packed by the recipe's method."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from deltacome_core.bands import Allowance
from deltacome_core.delta import TensorKind, TensorPair, load_pair
from deltacome_core.device_memory import return_spare
from deltacome_core.entries import UnchangedEntry
from deltacome_core.factorise import NamedDelta
from deltacome_core.layout import RankBand
from deltacome_core.lossless_spool import CodedSpool, code_tensor
from deltacome_core.matrices import is_quantised, plan_stack, quantise_matrices
from deltacome_core.moments import SharedHessian
from deltacome_core.packed import ExactTensor, PackedLinear, PackedTensor
from deltacome_core.pipeline import read_ahead
from deltacome_core.slices import SlicedTensor, slice_tensor
from deltacome_core.units import Compressed, Unit, Work, read_order
from deltacome_core.vocabulary import VocabularyUse, pack_vocabulary


def compress_unit(work: Work, unit: Unit, hessians: list[SharedHessian]) -> Compressed:
    """Pack a unit, some tensors at a time: those that share an input, then the others.

    Args:
        work: what it is made from, and the device.
        unit: its tensors.
        hessians: of its inputs; none for recipes without calibration. Emptied on the way, since a
            wide one takes gigabytes.

    Returns:
        The packed tensors, on the host.
    """
    made = Compressed(tensors=[], errors=[], with_feedback=0)
    changed = [name for name in unit.names if not work.is_unchanged(name)]
    rows = read_order(changed, hessians)
    allowance = Allowance()
    pairs = read_ahead((name for row in rows for name in row), partial(_load_pair, work))
    for number, row in enumerate(rows, start=1):
        made = made.join(_compress_tensors(work, row, pairs, hessians, allowance))
        left = {name for later in rows[number:] for name in later}
        hessians[:] = [shared for shared in hessians if not left.isdisjoint(shared.tensors)]
        return_spare(work.device)
    made.tensors.extend(_unchanged(work, name) for name in unit.names if work.is_unchanged(name))
    return made


def _load_pair(work: Work, name: str) -> tuple[TensorPair, TensorKind]:
    pair = load_pair(work.base.checkpoint, work.tuned.checkpoint, name)
    return pair, pair.kind


def _unchanged(work: Work, name: str) -> UnchangedEntry:
    dtype, shape = work.tuned.checkpoint.layout[name]
    return UnchangedEntry(name=name, dtype=dtype, shape=shape)


def _compress_tensors(
    work: Work,
    names: Sequence[str],
    pairs: Iterator[tuple[TensorPair, TensorKind]],
    hessians: Sequence[SharedHessian],
    allowance: Allowance,
) -> Compressed:
    packed: list[PackedTensor | UnchangedEntry] = []
    sliced: list[SlicedTensor] = []
    deltas: dict[str, NamedDelta] = {}
    bands: dict[str, tuple[RankBand, ...]] = {}
    flipped = {name for shared in hessians if shared.transposed for name in shared.weights}
    for name in names:
        _, shape = work.tuned.checkpoint.layout[name]
        with work.stages.measure("wait"):
            pair, kind = next(pairs)
        if kind is TensorKind.LOWRANK:
            tensor = slice_tensor(name, shape, flipped)
            if is_quantised(tensor.matrix_shape, work.recipe):
                sliced.append(tensor)
                slices = tensor.split(pair.to(work.device).difference())
                del pair
                deltas |= {each.name: each for each in slices}
                if len(slices) > 1:
                    bands |= _plan_slices(slices, work)
                continue
        packed.append(
            _unchanged(work, name)
            if kind is TensorKind.UNCHANGED
            else _pack_whole(pair, work, hessians)
        )
    matrices: dict[str, PackedLinear] = {}
    errors: list[float] = []
    with_feedback = 0
    for members, hessian in _share_inputs(tuple(deltas), hessians):
        sources = [deltas.pop(name) for name in members]
        own = None if hessian is None else hessian.to(work.device)
        with_feedback += 0 if hessian is None else len(sources)
        for made in quantise_matrices(
            sources,
            work.recipe,
            hessian=own,
            bands=bands,
            allowance=allowance,
            walks=work.walks,
        ):
            matrices[made.packed.name] = made.packed
            errors.append(made.relative_error)
    packed += [tensor.join(matrices) for tensor in sliced]
    return Compressed(tensors=packed, errors=errors, with_feedback=with_feedback)


def _plan_slices(slices: Sequence[NamedDelta], work: Work) -> dict[str, tuple[RankBand, ...]]:
    plan = plan_stack([each.delta for each in slices], work.recipe)
    return {} if plan is None else {each.name: plan for each in slices}


def code_unit(work: Work, unit: Unit, spool: CodedSpool) -> Compressed:
    """Code a unit exactly.

    Args:
        work: what it is made from.
        unit: its tensors.
        spool: where coded bytes wait until they are written.

    Returns:
        The coded tensors.
    """
    base, tuned = work.base.checkpoint, work.tuned.checkpoint
    coded: list[PackedTensor | UnchangedEntry] = [
        UnchangedEntry(name=name, dtype=tuned.layout[name][0], shape=tuned.layout[name][1])
        if work.is_unchanged(name)
        else code_tensor(spool, base, tuned, name, sha256=work.tuned.hashes[name])
        for name in unit.names
    ]
    return Compressed(tensors=coded, errors=[], with_feedback=0)


def _pack_whole(pair: TensorPair, work: Work, hessians: Sequence[SharedHessian]) -> PackedTensor:
    if pair.kind is not TensorKind.ROWS or pair.base is None:
        return ExactTensor(name=pair.name, value=pair.tuned)
    use = None
    if work.tokens is not None:
        own = [shared.hessian for shared in hessians if pair.name in shared.weights]
        counts = work.tokens.count(len(pair.tuned))
        use = VocabularyUse(counts=counts, hessian=own[0] if own else None)
    return pack_vocabulary(
        pair.name, pair.base, pair.tuned, work.recipe, device=work.device, use=use
    )


def _share_inputs(
    names: Sequence[str], hessians: Sequence[SharedHessian]
) -> Iterator[tuple[list[str], torch.Tensor | None]]:
    """Yield matrices with one input together, then each of the others alone."""
    left = dict.fromkeys(names)
    for shared in hessians:
        members = [name for name in shared.weights if name in left]
        for name in members:
            del left[name]
        if members:
            yield members, shared.hessian
    for name in left:
        yield [name], None
