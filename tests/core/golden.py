"""The content of the golden deltas as formulas, so that a test can state every number.

`python tests/core/golden.py` writes the folders under tests/golden; do so only when the format
gets a new version, because deltas on disk must stay readable for ever.
"""

import tempfile
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from factories_core import write_checkpoint

from deltacome_core.bitpack import pack_codes
from deltacome_core.checkpoint import hash_tensors, open_checkpoint
from deltacome_core.entries import UnchangedEntry, slice_name
from deltacome_core.layout import scale_shape
from deltacome_core.lossless_spool import code_tensor, open_spool
from deltacome_core.manifest import (
    BackboneRecord,
    CalibrationRecord,
    DeltaManifest,
    FineTuneRecord,
    RecipeRecord,
)
from deltacome_core.packed import (
    ExactTensor,
    PackedBand,
    PackedDirect,
    PackedFactor,
    PackedMatrix,
    PackedRows,
    PackedStack,
)
from deltacome_core.parts import write_delta, write_part

ROOT = Path(__file__).resolve().parent.parent / "golden"
LAYER = "model.layers.0"
EMBED = "model.embed_tokens.weight"
NORM = f"{LAYER}.input_layernorm.weight"
FINAL_NORM = "model.norm.weight"
# name: (out, in, rank bands); the sizes leave partial tiles of 2, 5 and 1 codes.
MATRICES = {
    f"{LAYER}.self_attn.q_proj.weight": (5, 130, ((2, 3),)),
    f"{LAYER}.self_attn.k_proj.weight": (5, 133, ((3, 3),)),
    f"{LAYER}.self_attn.v_proj.weight": (4, 129, ((4, 2),)),
    f"{LAYER}.self_attn.o_proj.weight": (6, 128, ((8, 2),)),
    f"{LAYER}.mlp.gate_proj.weight": (5, 163, ((1, 3),)),
    "projector.weight": (131, 140, ((8, 1), (3, 2), (2, 127))),
}
# name: (out, in, bits)
DIRECT = {
    f"{LAYER}.mlp.up_proj.weight": (6, 161, 1),
    f"{LAYER}.mlp.down_proj.weight": (4, 133, 3),
}
# name: (shape, rank bands, transposed); each slice of a stack has singular values of its own.
STACKS = {
    f"{LAYER}.attn.c_attn.weight": ((130, 7), ((4, 2),), True),
    f"{LAYER}.mlp.experts.down_proj": ((2, 133, 5), ((8, 1), (3, 2)), True),
    f"{LAYER}.mlp.experts.gate_up_proj": ((3, 6, 129), ((2, 3),), False),
}
# variant: (symmetric, scale group of U, scale group of V)
VARIANTS = {
    "asymmetric": (False, (1, 128), (1, 128)),
    "symmetric": (True, (128, 1), (1, 0)),
}
# Scale groups of direct matrices: several in a row, and one for all.
DIRECT_GROUPS = {"asymmetric": (1, 128), "symmetric": (0, 0)}
BASE_ROWS, NEW_ROWS, CHANGED = 11, 2, (0, 3, 8, 10)
COLS = 130
SHA = {letter: letter * 64 for letter in "abcd"}


def code_at(row, col, bits):
    return (7 * row + 3 * col + row * col) % (1 << bits)


def scale_at(row, col):
    return (1 + (5 * row + 3 * col) % 32) / 64


def zero_at(row, col, bits):
    return (3 * row + col) % (1 << bits)


def sigma_at(index, piece=0):
    return 2.0 ** -((index + 3 * piece) % 8)


def exact_at(index):
    return (index - 60) / 16


def table(rows, cols, value):
    return torch.tensor([[value(row, col) for col in range(cols)] for row in range(rows)])


def make_factor(rows, cols, bits, group, *, symmetric):
    grid = scale_shape(rows, cols, group)
    zero = table(*grid, lambda row, col: zero_at(row, col, bits)).to(torch.uint8)
    return PackedFactor(
        codes=pack_codes(table(rows, cols, lambda row, col: code_at(row, col, bits)), bits),
        scale=table(*grid, scale_at).half(),
        zero=None if symmetric else zero,
        bits=bits,
        rows=rows,
        cols=cols,
        group=group,
    )


def make_matrix(name, variant, shape=None, piece=0):
    symmetric, group_u, group_v = VARIANTS[variant]
    out, inn, bands = shape or MATRICES[name]
    rank = sum(band_rank for _, band_rank in bands)
    return PackedMatrix(
        name=name,
        out_features=out,
        in_features=inn,
        sigma=torch.tensor([sigma_at(index, piece) for index in range(rank)]),
        bands=tuple(
            PackedBand(
                u=make_factor(out, band_rank, bits, group_u, symmetric=symmetric),
                v=make_factor(band_rank, inn, bits, group_v, symmetric=symmetric),
            )
            for bits, band_rank in bands
        ),
    )


def make_direct(name, variant):
    out, inn, bits = DIRECT[name]
    group, symmetric = DIRECT_GROUPS[variant], VARIANTS[variant][0]
    return PackedDirect(name=name, factor=make_factor(out, inn, bits, group, symmetric=symmetric))


def matrix_shape(name):
    """(out, in, bands) of one slice."""
    shape, bands, transposed = STACKS[name]
    rows, cols = shape[-2:]
    return (cols, rows, bands) if transposed else (rows, cols, bands)


def make_stack(name, variant):
    shape, _, transposed = STACKS[name]
    return PackedStack(
        name=name,
        shape=shape,
        slices=tuple(
            make_matrix(slice_name(name, piece), variant, matrix_shape(name), piece)
            for piece in range(prod(shape[:-2]))
        ),
        transposed=transposed,
    )


def make_rows(variant):
    symmetric, _, group = VARIANTS[variant]
    changed = torch.zeros(BASE_ROWS, dtype=torch.bool)
    changed[list(CHANGED)] = True
    new = [exact_at(index) for index in range(NEW_ROWS * COLS)]
    return PackedRows(
        name=EMBED,
        rows=BASE_ROWS,
        cols=COLS,
        changed=changed,
        factor=make_factor(len(CHANGED), COLS, 4, group, symmetric=symmetric),
        new_rows=torch.tensor(new).reshape(NEW_ROWS, COLS).to(torch.bfloat16),
    )


def make_tensors(variant):
    exact = torch.tensor([exact_at(index) for index in range(COLS)])
    return [
        *(make_matrix(name, variant) for name in MATRICES),
        *(make_direct(name, variant) for name in DIRECT),
        *(make_stack(name, variant) for name in STACKS),
        make_rows(variant),
        ExactTensor(name=NORM, value=exact),
        UnchangedEntry(name=FINAL_NORM, dtype="BF16", shape=(COLS,)),
    ]


def make_layout():
    layout = {name: ("BF16", shape[:2]) for name, shape in (MATRICES | DIRECT).items()}
    layout |= {name: ("BF16", shape) for name, (shape, _, _) in STACKS.items()}
    layout[EMBED] = ("BF16", (BASE_ROWS + NEW_ROWS, COLS))
    return layout | {NORM: ("F32", (COLS,)), FINAL_NORM: ("BF16", (COLS,))}


def make_head():
    names = [*MATRICES, *DIRECT, *STACKS, EMBED, FINAL_NORM]
    return DeltaManifest(
        recipe=RecipeRecord(name="come", settings={"bits_per_param": 1.0, "group_size": 128}),
        backbone=BackboneRecord(digest=SHA["a"], tensors=dict.fromkeys(names, SHA["b"])),
        fine_tune=FineTuneRecord(
            digest=SHA["c"],
            size_bytes=60_000,
            dtype="BF16",
            n_params=30_000,
            architecture="LlamaForCausalLM",
        ),
        entries=(),
        files={},
        tools={"deltacome": "0.1.0", "torch": "2.13.0"},
        calibration=CalibrationRecord(
            source="calibration.txt", n_tokens=4096, sha256=SHA["d"], n_matrices=10
        ),
    )


def write_golden(out, variant):
    """Encode a variant; the parts lie beside the output and are removed."""
    config = out.with_name("config.json")
    config.write_text('{"model_type":"llama"}')
    part = out.with_name(f"{variant}.part")
    write_part(part, make_tensors(variant), layout=make_layout(), fingerprint="golden")
    write_delta(out, [part], head=make_head(), sidecars=[config])
    part.unlink()
    config.unlink()


def old_at(index):
    """Sixty-fourths that bfloat16 holds exactly, of either sign."""
    return ((37 * index) % 201 - 100) / 64


def tuned_at(index):
    return old_at(index) + (index % 5 - 2) / 64


def make_pair():
    """What the lossless golden delta was made from: an embedding that grew, and a norm."""
    base = {
        EMBED: torch.tensor([old_at(index) for index in range(BASE_ROWS * COLS)])
        .reshape(BASE_ROWS, COLS)
        .to(torch.bfloat16)
    }
    rows = BASE_ROWS + NEW_ROWS
    tuned = torch.tensor([tuned_at(index) for index in range(rows * COLS)]).reshape(rows, COLS)
    norm = torch.tensor([exact_at(index) for index in range(COLS)])
    return base, {EMBED: tuned.to(torch.bfloat16), NORM: norm}


def write_lossless(out):
    """Encode the lossless golden delta; another zstd may give other bytes for the same numbers."""
    base, tuned = make_pair()
    config = out.with_name("config.json")
    config.write_text('{"model_type":"llama"}')
    part = out.with_name("lossless.part")
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / name for name in ("base", "tuned")]
        for folder, tensors in zip(folders, (base, tuned), strict=True):
            write_checkpoint(folder, tensors)
        opened = [open_checkpoint(folder) for folder in folders]
        hashes = hash_tensors(opened[1])
        with open_spool(out.parent) as spool:
            coded = [code_tensor(spool, *opened, name, sha256=hashes[name]) for name in tuned]
            write_part(part, coded, layout=opened[1].layout, fingerprint="golden")
    head = replace(make_head(), recipe=RecipeRecord(name="lossless", settings={}), calibration=None)
    write_delta(out, [part], head=head, sidecars=[config])
    part.unlink()
    config.unlink()


if __name__ == "__main__":
    ROOT.mkdir(exist_ok=True)
    if not (ROOT / "lossless").exists():
        write_lossless(ROOT / "lossless")
    for chosen in VARIANTS:
        write_golden(ROOT / chosen, chosen)
