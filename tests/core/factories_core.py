"""Tiny seeded checkpoints and deltas; the packing here is plain rounding, written for tests."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from deltacome_core.bitpack import pack_codes
from deltacome_core.checkpoint import checkpoint_digest, hash_tensors, open_checkpoint
from deltacome_core.entries import UnchangedEntry
from deltacome_core.layout import RankBand, scale_shape
from deltacome_core.manifest import (
    MANIFEST_NAME,
    BackboneRecord,
    DeltaManifest,
    FineTuneRecord,
    RecipeRecord,
    manifest_to_json,
    read_manifest,
)
from deltacome_core.packed import (
    ExactTensor,
    PackedBand,
    PackedDirect,
    PackedFactor,
    PackedMatrix,
    PackedRows,
)
from deltacome_core.parts import write_delta, write_part
from deltacome_core.recipe import PRESETS
from deltacome_core.safetensors_file import write_safetensors
from deltacome_core.tensors import dtype_name, load_tensor, tensor_bytes

BANDS = (RankBand(8, 1), RankBand(3, 2), RankBand(2, 9))
# This matrix is packed as it is, so that every container holds all kinds of entry.
DIRECT_SITE = "k_proj"


def quantise(values, bits, group, *, symmetric=False):
    """Round a matrix to codes, one scale per group."""
    rows, cols = values.shape
    gr, gc = group[0] or rows, group[1] or cols
    top = (1 << bits) - 1
    grid = scale_shape(rows, cols, group)
    scale, zero = torch.zeros(grid), torch.zeros(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            block = values[i * gr : (i + 1) * gr, j * gc : (j + 1) * gc]
            low, high = min(float(block.min()), 0.0), max(float(block.max()), 0.0)
            if symmetric:
                scale[i, j] = 2 * float(block.abs().max()) / top
            else:
                scale[i, j] = (high - low) / top
                zero[i, j] = round(-low / float(scale[i, j])) if scale[i, j] else 0
    scale = scale.half()
    wide = spread(scale.float(), values.shape, group).clamp(min=1e-12)
    offset = top / 2 if symmetric else spread(zero, values.shape, group)
    codes = (values / wide + offset).round().clamp(0, top).to(torch.uint8)
    return PackedFactor(
        codes=pack_codes(codes, bits),
        scale=scale,
        zero=None if symmetric else zero.to(torch.uint8),
        bits=bits,
        rows=rows,
        cols=cols,
        group=group,
    )


def spread(grid, shape, group):
    """Give each element of a [rows, cols] matrix the grid value of its group, by indexing."""
    rows = torch.arange(shape[0]) // (group[0] or shape[0])
    cols = torch.arange(shape[1]) // (group[1] or shape[1])
    return grid[rows][:, cols]


def factorise(name, delta, bands=BANDS, *, group_u=(1, 128), group_v=(1, 128), symmetric=False):
    """Pack the leading singular vectors of a delta."""
    left, sigma, right = torch.linalg.svd(delta.float(), full_matrices=False)
    start, packed = 0, []
    for band in bands:
        span = slice(start, start + band.rank)
        u = quantise(left[:, span], band.bits, group_u, symmetric=symmetric)
        v = quantise(right[span], band.bits, group_v, symmetric=symmetric)
        packed.append(PackedBand(u=u, v=v))
        start += band.rank
    return PackedMatrix(
        name=name,
        out_features=delta.shape[0],
        in_features=delta.shape[1],
        sigma=sigma[:start].contiguous(),
        bands=tuple(packed),
    )


def pack_rows(name, base, tuned, bits=4):
    """Pack the rows of an embedding that differ, and its new rows exactly."""
    rows, cols = base.shape
    delta = tuned[:rows].float() - base.float()
    changed = delta.abs().amax(1) > 0
    factor = quantise(delta[changed], bits, (1, 128)) if bool(changed.any()) else None
    new_rows = tuned[rows:].clone() if len(tuned) > rows else None
    return PackedRows(
        name=name, rows=rows, cols=cols, changed=changed, factor=factor, new_rows=new_rows
    )


def write_checkpoint(folder: Path, tensors, *, shards=1, config=None):
    """Write tensors as a checkpoint folder, cut into shards when asked."""
    folder.mkdir(parents=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | (config or {})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    names = sorted(tensors)
    files = ["model.safetensors"]
    if shards > 1:
        files = [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
        weight_map = {name: files[at % shards] for at, name in enumerate(names)}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for number, file in enumerate(files):
        sources = [
            (
                name,
                dtype_name(tensors[name].dtype),
                tuple(tensors[name].shape),
                tensor_bytes(tensors[name]),
            )
            for at, name in enumerate(names)
            if at % shards == number
        ]
        write_safetensors(folder / file, sources, {"format": "pt"})
    return folder


def llama_tensors(seed=0, *, hidden=48, kv=24, vocabulary=40, tied=False):
    """Weights named like a one-layer Llama with grouped-query attention, in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.layers.0.self_attn.q_proj.weight": (hidden, hidden),
        "model.layers.0.self_attn.k_proj.weight": (kv, hidden),
        "model.layers.0.mlp.down_proj.weight": (hidden, 2 * hidden),
        "model.layers.0.input_layernorm.weight": (hidden,),
        "model.norm.weight": (hidden,),
    }
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return {
        name: torch.randn(shape, generator=generator).to(torch.bfloat16)
        for name, shape in shapes.items()
    }


def fine_tune(tensors, seed=1, *, new_rows=0, same=("model.norm.weight",)):
    """Move every tensor a little; `same` stay, embeddings change in every other row and grow."""
    generator = torch.Generator().manual_seed(seed)
    tuned = {}
    for name, base in tensors.items():
        change = 0.05 * torch.randn(base.shape, generator=generator)
        if name in same:
            change = torch.zeros(base.shape)
        if "embed" in name or "lm_head" in name:
            change[1::2] = 0
        tuned[name] = (base.float() + change).to(base.dtype)
        if new_rows and ("embed" in name or "lm_head" in name):
            new = torch.randn((new_rows, base.shape[1]), generator=generator)
            tuned[name] = torch.cat([tuned[name], new.to(base.dtype)])
    return tuned


def pack_checkpoint(base, tuned, bands=BANDS):
    """Give the packed tensors of a whole fine-tune, by name."""
    packed = {}
    for name, new in tuned.items():
        old = base.get(name)
        if old is not None and old.shape == new.shape and torch.equal(old, new):
            packed[name] = UnchangedEntry(
                name=name, dtype=dtype_name(new.dtype), shape=tuple(new.shape)
            )
        elif old is not None and ("embed" in name or "lm_head" in name):
            packed[name] = pack_rows(name, old, new)
        elif old is not None and DIRECT_SITE in name:
            factor = quantise(new.float() - old.float(), 3, (1, 32))
            packed[name] = PackedDirect(name=name, factor=factor)
        elif old is not None and new.ndim == 2:
            packed[name] = factorise(name, new.float() - old.float(), bands)
        else:
            packed[name] = ExactTensor(name=name, value=new)
    return packed


def make_head(base_dir, tuned_dir):
    """The head of a manifest, with real digests."""
    base, tuned = open_checkpoint(base_dir), open_checkpoint(tuned_dir)
    hashes = hash_tensors(base)
    return DeltaManifest(
        recipe=RecipeRecord(name="come", settings=PRESETS["come"].settings),
        backbone=BackboneRecord(digest=checkpoint_digest(base.layout, hashes), tensors=hashes),
        fine_tune=FineTuneRecord(
            digest=checkpoint_digest(tuned.layout, hash_tensors(tuned)),
            size_bytes=tuned.size_bytes,
            dtype=tuned.dtype,
            n_params=tuned.n_params,
            architecture=tuned.architecture,
        ),
        entries=(),
        files={},
        tools={"deltacome": "0.1.0", "torch": "test"},
    )


def make_delta(base_dir, tuned_dir, out, *, bands=BANDS, **options):
    """Compress one checkpoint folder against another."""
    base, tuned = open_checkpoint(base_dir), open_checkpoint(tuned_dir)
    packed = pack_checkpoint(
        {name: load_tensor(base, name) for name in base.tensors},
        {name: load_tensor(tuned, name) for name in tuned.tensors},
        bands,
    )
    part = out.with_name(f"{out.name}.part")
    write_part(part, packed.values(), layout=tuned.layout, fingerprint="test")
    head = make_head(base_dir, tuned_dir)
    write_delta(out, [part], head=head, sidecars=tuned.sidecars, **options)
    return packed


def rewrite_manifest(folder, **fields):
    """Replace fields of the manifest, as a careless writer would."""
    manifest = replace(read_manifest(folder), **fields)
    (folder / MANIFEST_NAME).write_bytes(manifest_to_json(manifest))


def rewrite_entry(folder, name, **fields):
    """Replace fields of one entry of the manifest."""
    entries = read_manifest(folder).entries
    changed = tuple(replace(entry, **fields) if entry.name == name else entry for entry in entries)
    rewrite_manifest(folder, entries=changed)
