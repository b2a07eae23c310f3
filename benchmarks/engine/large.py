"""A model of Llama-2-7B's shapes with random weights, and deltas of the default recipe for it."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from benchmarks.engine.tokens import EXAMPLES
from deltacome_core.bitpack import used_bits
from deltacome_core.container import open_delta
from deltacome_core.entries import UnchangedEntry
from deltacome_core.errors import UserError
from deltacome_core.layout import RankBand
from deltacome_core.manifest import BackboneRecord, DeltaManifest, FineTuneRecord, RecipeRecord
from deltacome_core.models import build_skeleton, load_tokenizer
from deltacome_core.packed import ExactTensor, PackedFactor, PackedRows
from deltacome_core.parts import write_delta, write_part
from deltacome_core.recipe import get_recipe
from deltacome_core.rows import BASIS_BITS, BASIS_GROUP, choose_rank
from kernels.bench.models import HUB, Layout, Pool
from kernels.fragments import PRECISIONS
from workers.engine import probes
from workers.engine.arena_slots import KernelOptions
from workers.engine.executor import PlainExecutor
from workers.engine.metrics import EngineMetrics
from workers.engine.model import LoadedModel, settle_memory
from workers.engine.parts import TenantParts, read_parts
from workers.engine.preparation import KernelPreparation
from workers.engine.shared import SharedExecutor

# A fine-tune moves weights by far less than random codes would.
_QUIET = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What is measured: a backbone's shapes, and how much of everything there is."""

    hidden: int
    intermediate: int
    n_layers: int
    n_heads: int
    vocabulary: int
    layout: Layout
    n_tenants: int
    kv_bytes: int
    batch: int
    new_tokens: int
    prompt: int
    long_prompt: int
    trace_s: float
    changes_vocabulary: bool = True
    precision: str = "exact"


SEVEN_B = Size(
    hidden=4096, intermediate=11008, n_layers=32, n_heads=32, vocabulary=32000, layout=HUB,
    n_tenants=64, kv_bytes=7 * 10**9, batch=32, new_tokens=128, prompt=32, long_prompt=2048,
    trace_s=20.0,
)  # fmt: skip
_FEW = tuple(RankBand(bits, 8) for bits in (4, 3, 2, 1))
# To try the benchmark itself where there is no GPU.
TRIAL = Size(
    hidden=64, intermediate=96, n_layers=2, n_heads=4, vocabulary=512,
    layout=replace(HUB, square=_FEW, wide=_FEW, deep=_FEW),
    n_tenants=8, kv_bytes=10**7, batch=4, new_tokens=12, prompt=8, long_prompt=48, trace_s=2.0,
)  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Large:
    """The backbone in its shared executor, and one delta as it lies on disk."""

    size: Size
    device: str
    module: Any
    model: LoadedModel
    executor: SharedExecutor
    base: Path
    delta: Path

    @property
    def slots(self) -> Any:
        return self.executor.slots

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def make_module(folder: Path, size: Size, device: str) -> Any:
    """Random weights made on the device; what a layer adds is small beside what passes it by."""
    config = transformers.LlamaConfig(
        hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.n_layers, num_attention_heads=size.n_heads,
        num_key_value_heads=size.n_heads, vocab_size=size.vocabulary,
        max_position_embeddings=4096, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    folder.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLES / "backbone" / name, folder / name)
    # The files are never read: everything a delta needs of its backbone is in memory.
    save_file({"nothing": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    module = build_skeleton(folder, dtype)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        values = torch.ones(parameter.shape, dtype=dtype, device=device)
        if parameter.ndim > 1:
            deep = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 1.0 if "embed" in name else 0.0025 if deep else 0.02
            values.normal_(std=std, generator=generator)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))
    return module.eval()


def open_large(scratch: Path, size: Size, device: str) -> tuple[Large, str]:
    """The model, and what the check of the shared model said to it.

    As in the engine, processes of their own compile its kernels while the first delta is loaded.
    """
    base = scratch / "base"
    module = make_module(base, size, device)
    size_bytes = sum(p.numel() * p.element_size() for p in module.parameters())
    options: dict[str, Any] = {
        "device": device, "kv_bytes": size.kv_bytes, "n_slots": size.n_tenants,
        "delta_bytes": 60 << 30, "arena": True,
        "kernels": KernelOptions(
            prepare=KernelPreparation(EngineMetrics()).prepare,
            planes=PRECISIONS[size.precision],
        ),
    }  # fmt: skip
    check = "passed"
    try:
        executor = SharedExecutor(module, base, **options)
    except UserError as error:
        # Random weights round worse than trained ones; how much worse stands in the report.
        check = str(error)
        probes.CHECK_TOLERANCE[torch.bfloat16] = 1.0
        executor = SharedExecutor(module, base, **options)
    plain = LoadedModel(
        module=module, tokenizer=load_tokenizer(base), eos_ids=frozenset(), device=device,
        context_tokens=4096, vocabulary=size.vocabulary, size_bytes=size_bytes,
        executor=PlainExecutor(module, device=device, kv_bytes=1 << 20),
    )  # fmt: skip
    large = Large(
        size=size, device=device, module=module, model=replace(plain, executor=executor),
        executor=executor, base=base, delta=scratch / "delta",
    )  # fmt: skip
    settle_memory()
    return large, check


def draw_rows(name: str, shape: tuple[int, ...], pool: Pool, generator: torch.Generator) -> Any:
    """A vocabulary of which every row changed, as the default recipe keeps it."""
    rows, cols = shape
    # A small vocabulary would be kept as it is.
    rank = choose_rank(rows, cols, rows, get_recipe("hub")) or 16
    factor = pool.factor(rows, rank, bits=BASIS_BITS, group=BASIS_GROUP, symmetric=True)
    basis = torch.randn(rank, cols, generator=generator) * _QUIET
    return PackedRows(
        name=name, rows=rows, cols=cols, changed=torch.ones(rows, dtype=torch.bool),
        factor=clean(factor), new_rows=None, basis=basis.bfloat16(),
        base_scale=torch.tensor([0.99]),
    )  # fmt: skip


def clean(factor: PackedFactor) -> PackedFactor:
    """The factor without bits that belong to no code: a file that has any is refused."""
    return replace(factor, codes=factor.codes & used_bits(factor.cols, factor.bits))


def draw_tensors(large: Large) -> Iterator[Any]:
    """Every tensor of a delta: packed matrices, vocabularies in a basis, norms as they are."""
    layers = large.slots._layers  # noqa: SLF001
    pool, generator = Pool(1), torch.Generator().manual_seed(1)
    matrices = pool.delta(layers, large.size.layout)
    for name, parameter in large.module.named_parameters():
        shape = tuple(parameter.shape)
        if name in matrices:
            matrix: Any = matrices[name]
            bands = tuple(replace(b, u=clean(b.u), v=clean(b.v)) for b in matrix.bands)
            yield replace(matrix, sigma=matrix.sigma * _QUIET, bands=bands)
        elif len(shape) == 1:
            moved = parameter.detach().cpu() * 1.01
            yield ExactTensor(name=name, value=moved)
        elif not large.size.changes_vocabulary:
            yield UnchangedEntry(name=name, dtype=file_dtype(large), shape=shape)
        else:
            yield draw_rows(name, shape, pool, generator)


def file_dtype(large: Large) -> str:
    return "BF16" if large.device == "cuda" else "F32"


def write_files(large: Large) -> int:
    """Write the delta as a published one lies on disk; bytes of the folder."""
    kind = file_dtype(large)
    layout = {name: (kind, tuple(p.shape)) for name, p in large.module.named_parameters()}
    part = large.delta.with_name("part")
    write_part(part, list(draw_tensors(large)), layout=layout, fingerprint="f")
    head = DeltaManifest(
        recipe=RecipeRecord(name="hub", settings={}),
        backbone=BackboneRecord(digest="0" * 64, tensors=dict.fromkeys(layout, "0" * 64)),
        fine_tune=FineTuneRecord(
            digest="1" * 64, size_bytes=1, dtype=kind, n_params=1, architecture="LlamaForCausalLM"
        ),
        entries=(), files={}, tools={},
    )  # fmt: skip
    write_delta(large.delta, [part], head=head, sidecars=sorted(large.base.glob("*.json")))
    part.unlink()
    return sum(file.stat().st_size for file in large.delta.iterdir())


def read_tenant(large: Large) -> TenantParts:
    delta = open_delta(large.delta, verify_digests=False)
    names = {name: name for name in delta.entries}
    return read_parts(delta, names, large.executor.places, _NO_FILES, keep_packed=True)


# No entry of these deltas is read through the backbone's files.
_NO_FILES: Any = None


def fill(large: Large, source: int) -> float:
    """Copy one resident delta to all other slots, each with memory of its own; seconds."""
    started = time.perf_counter()
    arena = large.slots._arena  # noqa: SLF001
    parts = read_tenant(large)
    for slot in range(arena.n_slots):
        if arena.images[slot] is None:
            arena.copy_slot(source, slot)
            large.executor.tables.put(slot, parts.vectors)
            large.executor.vocabulary.load(slot, parts)
    large.synchronize()
    return time.perf_counter() - started
