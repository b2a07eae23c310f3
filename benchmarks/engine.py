"""Measure the engine on a GPU: right tokens, throughput of mixed tenants, and cold loads.

    python benchmarks/engine.py --out OUT.json [--layers 32]

Tokens are compared on the tiny models of examples/ with the rebuilt dense checkpoints. Speed is
measured on a model of Llama-2-7B's shapes with random weights and deltas of random codes.
"""

import argparse
import json
import logging
import shutil
import statistics
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from deltacome_core.compress import compress_checkpoint
from deltacome_core.entries import UnchangedEntry
from deltacome_core.manifest import BackboneRecord, DeltaManifest, FineTuneRecord, RecipeRecord
from deltacome_core.models import build_skeleton, load_tokenizer
from deltacome_core.parts import write_delta, write_part
from deltacome_core.recipe import get_recipe
from deltacome_core.reconstruct import reconstruct_checkpoint
from kernels.bench.models import HUB, Pool
from workers.engine import graphs
from workers.engine.executor import PlainExecutor
from workers.engine.generate import Event, Failure, Piece, Sampling, Sequence
from workers.engine.model import LoadedModel, load_backbone, load_shared, share_backbone
from workers.engine.scheduler import Limits, Scheduler
from workers.engine.shared import SharedExecutor

EXAMPLES = Path(__file__).parents[1] / "examples" / "tiny-llama"
TASKS = ("dates", "extraction")
BATCH = 32
PROMPT_TOKENS, NEW_TOKENS = 32, 128


class Run:
    """Sequences through a scheduler; tokens with the times at which they came."""

    def __init__(self, limits: Limits) -> None:
        self.scheduler = Scheduler(limits)
        self.scheduler.start()

    def answer(
        self, asked: Many[tuple[LoadedModel, Many[int]]], *, max_tokens: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        ids: list[list[int]] = [[] for _ in asked]
        times: list[list[float]] = [[] for _ in asked]
        errors: list[Exception] = []
        done = threading.Event()
        left = [len(asked)]

        def listen(number: int) -> Callable[[Event], None]:
            def emit(event: Event) -> None:
                if isinstance(event, Piece):
                    ids[number].append(event.token_id)
                    times[number].append(time.perf_counter())
                    return
                if isinstance(event, Failure):
                    errors.append(event.error)
                left[0] -= 1
                if not left[0]:
                    done.set()

            return emit

        self.scheduler.submit(
            [
                Sequence(
                    model,
                    tuple(prompt),
                    sampling=Sampling(temperature=0.0),
                    max_tokens=max_tokens,
                    score_prompt=False,
                    emit=listen(number),
                )
                for number, (model, prompt) in enumerate(asked)
            ]
        )
        if not done.wait(300):
            raise RuntimeError("no answer in 300 s")
        if errors:
            raise errors[0]
        return ids, times

    def stop(self) -> None:
        self.scheduler.stop()


def compare_tokens(device: str, n_items: int, made: Path) -> dict[str, Any]:
    """Greedy answers of backbone and deltas, all in common steps, against dense checkpoints."""
    base = EXAMPLES / "backbone"
    shared = share_backbone(
        load_backbone(base, device=device), base, kv_bytes=1 << 30, n_slots=4, delta_bytes=1 << 28
    )
    if not isinstance(shared.executor, SharedExecutor):
        raise TypeError("the backbone is not shared")
    models, dense, prompts = [shared], [load_backbone(base, device=device)], []
    for task in TASKS:
        tuned = EXAMPLES / task
        delta_dir, rebuilt = made / f"{task}-delta", made / f"{task}-rebuilt"
        if not delta_dir.exists():
            compress_checkpoint(base, tuned, delta_dir, get_recipe("hub"), device=device)
            reconstruct_checkpoint(base, delta_dir, rebuilt)
        model = load_shared(shared, base, delta_dir, factor_bytes=0)
        if model is None:
            raise RuntimeError(f"{task} is not shared")
        models.append(model)
        dense.append(load_backbone(rebuilt, device=device))
        lines = (tuned / "evaluation.jsonl").read_text().splitlines()[:n_items]
        prompts += [json.loads(line)["prompt"] for line in lines]
    asked = [
        (number, tuple(shared.tokenizer.encode(prompt)))
        for prompt in prompts
        for number in range(len(models))
    ]
    names = ("backbone", *TASKS)
    limits = Limits(max_sequences=64, max_running=256, max_waiting=9999, max_waiting_tenant=9999)
    run, apart = Run(limits), Run(limits)
    try:
        mixed, _ = run.answer(
            [(replace(models[n], key=names[n]), p) for n, p in asked], max_tokens=32
        )
        truth, _ = apart.answer([(dense[n], p) for n, p in asked], max_tokens=32)
    finally:
        run.stop()
        apart.stop()
    steps = run.scheduler._metrics.batch_tenants  # noqa: SLF001
    rows = {
        name: [
            ours == theirs
            for (m, _), ours, theirs in zip(asked, mixed, truth, strict=True)
            if m == n
        ]
        for n, name in enumerate(names)
    }
    tokens = [
        (sum(a == b for a, b in zip(ours, theirs, strict=False)), max(len(ours), len(theirs)))
        for ours, theirs in zip(mixed, truth, strict=True)
    ]
    return {
        "answers": {name: len(found) for name, found in rows.items()},
        "same_answers": {name: sum(found) for name, found in rows.items()},
        "same_tokens": sum(same for same, _ in tokens) / sum(total for _, total in tokens),
        "mean_tenants_in_a_step": steps.mean,
    }


def compare_loops(device: str, made: Path) -> dict[str, Any]:
    """Tokens per second of one batch on the tiny model: this loop and transformers' own."""
    base = EXAMPLES / "backbone"
    plain = load_backbone(base, device=device)
    shared = share_backbone(plain, base, kv_bytes=1 << 28, n_slots=4, delta_bytes=1 << 28)
    deltas = [load_shared(shared, base, made / f"{t}-delta", factor_bytes=1 << 28) for t in TASKS]
    tenants = [replace(shared, key="backbone"), *deltas]
    prompts = draw_prompts(16, 500)
    run = Run(Limits(max_sequences=64, max_running=64, max_waiting_tenant=999, prefill_tokens=2048))
    found: dict[str, Any] = {}
    answers = []
    for name, models in (("backbone", tenants[:1]), ("delta", tenants[1:2]), ("mixed", tenants)):
        asked = [
            (replace(models[at % len(models)], eos_ids=frozenset()), prompt)  # type: ignore[type-var]
            for at, prompt in enumerate(prompts)
        ]
        times = []
        for _ in range(3):
            started = time.perf_counter()
            answers, _ = run.answer(asked, max_tokens=64)
            times.append(time.perf_counter() - started)
        found[name] = len(prompts) * 64 / min(times)
        if name == "backbone":
            own = answers
    run.stop()
    library = time_library(load_backbone(base, device=device).module, prompts, 64)
    found["library"] = library["whole_tokens_per_s"]
    found["same_answers"] = sum(a == b for a, b in zip(own, library.pop("answers"), strict=True))
    return found


def draw_prompts(count: int, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(5, vocabulary, (PROMPT_TOKENS,), generator=generator).tolist()
        for _ in range(count)
    ]


def make_large(folder: Path, n_layers: int) -> tuple[Any, list[str]]:
    """A model of Llama-2-7B's shapes with random weights on the GPU, and its folder."""
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=n_layers,
        num_attention_heads=32, num_key_value_heads=32, vocab_size=32000,
        max_position_embeddings=4096, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    folder.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLES / "backbone" / name, folder / name)
    save_file({"nothing": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    module = build_skeleton(folder, torch.bfloat16)
    generator = torch.Generator("cuda").manual_seed(0)
    for name, parameter in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        values = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
        if parameter.ndim == 1:
            values.fill_(1.0)
        else:
            values.normal_(std=0.02, generator=generator)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to("cuda"))
    return module, [name for name, _ in module.named_parameters()]


def write_large_delta(folder: Path, module: Any, sites: Any, backbone: Path) -> int:
    """A delta of random codes in the default recipe's layout, as a published one lies on disk."""
    layout = {name: ("BF16", tuple(p.shape)) for name, p in module.named_parameters()}
    matrices = Pool(1).delta(sites, HUB)
    # Random codes are far louder than a fine-tune; sigma brings them down.
    tensors: list[Any] = [
        replace(matrices[name], sigma=matrices[name].sigma * 1e-3)
        if name in matrices
        else UnchangedEntry(name=name, dtype=dtype, shape=shape)
        for name, (dtype, shape) in layout.items()
    ]
    parts = folder.with_name("parts")
    parts.mkdir()
    path = parts / "all"
    write_part(path, tensors, layout=layout, fingerprint="f")
    head = DeltaManifest(
        recipe=RecipeRecord(name="hub", settings={}),
        backbone=BackboneRecord(digest="0" * 64, tensors=dict.fromkeys(layout, "0" * 64)),
        fine_tune=FineTuneRecord(
            digest="1" * 64, size_bytes=1, dtype="BF16", n_params=1, architecture="LlamaForCausalLM"
        ),
        entries=(), files={}, tools={},
    )  # fmt: skip
    write_delta(folder, [path], head=head, sidecars=sorted(backbone.glob("*.json")))
    path.unlink()
    return sum(file.stat().st_size for file in folder.iterdir())


def time_cold(shared: LoadedModel, base: Path, delta: Path, run: Run) -> list[dict[str, float]]:
    """From files in the page cache to a resident delta and its first token, slot freed between."""
    rows = []
    for _ in range(4):
        started = time.perf_counter()
        model = load_shared(shared, base, delta, factor_bytes=0)
        loaded = time.perf_counter()
        if model is None:
            raise RuntimeError("the delta is not shared")
        _, times = run.answer([(replace(model, eos_ids=frozenset()), range(1, 17))], max_tokens=1)
        rows.append({"load_s": loaded - started, "first_token_s": times[0][0] - started})
        shared.executor.evict(model.slot)
    return rows


def time_decode(run: Run, shared: LoadedModel, slots: Many[int]) -> dict[str, Any]:
    """Tokens per second between the moment all answers have begun and the first to end."""
    models = [replace(shared, slot=slot, key=f"t{slot}", eos_ids=frozenset()) for slot in slots]
    prompts = draw_prompts(len(slots), 30000)
    asked = list(zip(models, prompts, strict=True))
    best: dict[str, Any] = {}
    for _ in range(3):
        started = time.perf_counter()
        _, times = run.answer(asked, max_tokens=NEW_TOKENS)
        begun, ended = max(own[0] for own in times), min(own[-1] for own in times)
        n_tokens = sum(begun < at <= ended for own in times for at in own)
        row = {
            "tokens_per_s": n_tokens / (ended - begun),
            "step_ms": 1e3 * (ended - begun) / (n_tokens / len(slots)),
            "whole_tokens_per_s": len(slots) * NEW_TOKENS / (max(o[-1] for o in times) - started),
            "first_token_ms": 1e3 * statistics.median(own[0] - started for own in times),
        }
        if row["tokens_per_s"] > best.get("tokens_per_s", 0):
            best = row
    return best | {"graph_ms": time_graph(shared.executor, len(slots), slots)}


def time_graph(executor: Any, n_rows: int, slots: Many[int]) -> float:
    """The captured step alone: what the device does without the engine around it."""
    with torch.inference_mode():
        executor.slots.begin(
            executor._lay_out([_Row(slot) for slot in sorted(slots)]).spans,  # noqa: SLF001
            n_rows=n_rows, n_single=n_rows,
        )  # fmt: skip
    captured = executor._graphs._captured[(n_rows, executor.slots.graph_key[1])]  # noqa: SLF001
    times = []
    for _ in range(20):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        captured.graph.replay()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last))
    return statistics.median(times)


class _Row:
    """A single token of a slot, as a layout sees it."""

    count = rows = 1

    def __init__(self, slot: int) -> None:
        self.sequence = self
        self.model = self
        self.slot = slot


def time_prefill(run: Run, shared: LoadedModel, slot: int) -> float:
    """Seconds to the first token of a prompt of 2,048 tokens."""
    model = replace(shared, slot=slot, key=f"t{slot}", eos_ids=frozenset())
    found = []
    for _ in range(3):
        started = time.perf_counter()
        _, times = run.answer([(model, [5 + at % 3000 for at in range(2048)])], max_tokens=1)
        found.append(times[0][0] - started)
    return min(found)


def time_library(module: Any, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """The same batch through transformers' continuous batching, backbone alone."""
    config = transformers.GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    times = []
    for _ in range(3):
        started = time.perf_counter()
        found = module.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
        times.append(time.perf_counter() - started)
    ordered = sorted(found.values(), key=lambda one: int(one.request_id.rsplit("_", 1)[-1]))
    answers = [list(one.generated_tokens) for one in ordered]
    return {
        "whole_tokens_per_s": sum(map(len, answers)) / min(times),
        "seconds": times,
        "attention": str(module.config._attn_implementation),  # noqa: SLF001
        "answers": answers,
    }


def measure_loop(
    record: dict[str, Any], shared: LoadedModel, base: Path, delta: Path, out: Path
) -> None:
    """Everything that runs through the engine's own loop."""
    rows, executor = record["rows"], shared.executor
    limits = Limits(max_sequences=64, max_running=64, max_waiting_tenant=999, prefill_tokens=2048)
    run = Run(limits)
    try:
        rows["cold"] = time_cold(shared, base, delta, run)
        print("cold", rows["cold"], flush=True)
        first = load_shared(shared, base, delta, factor_bytes=0)
        arena = executor.slots._arena  # noqa: SLF001
        record["slab_bytes"], record["n_slots"] = arena.spec.slab_bytes, arena.n_slots
        for slot in range(arena.n_slots):
            if first is not None and slot != first.slot:
                arena.copy_slot(first.slot, slot)
        for n_tenants in (0, 32, 8, 1):
            if n_tenants <= arena.n_slots:
                slots = [at % n_tenants if n_tenants else -1 for at in range(BATCH)]
                rows[f"decode_{n_tenants}"] = time_decode(run, shared, slots)
                print("decode", n_tenants, rows[f"decode_{n_tenants}"], flush=True)
                out.write_text(json.dumps(record, indent=1) + "\n")
        rows["prefill_s"] = {
            "backbone": time_prefill(run, shared, -1),
            "delta": time_prefill(run, shared, 0),
        }
        print("prefill", rows["prefill_s"], flush=True)
        record["peak_bytes"] = torch.cuda.max_memory_allocated()
    finally:
        run.stop()


def measure_large(record: dict[str, Any], scratch: Path, args: argparse.Namespace) -> None:
    rows = record["rows"]
    base = scratch / "base"
    module, _ = make_large(base, args.layers)
    size_bytes = sum(p.numel() * p.element_size() for p in module.parameters())
    plain = LoadedModel(
        module=module, tokenizer=load_tokenizer(base), eos_ids=frozenset(), device="cuda",
        context_tokens=4096, vocabulary=32000, size_bytes=size_bytes,
        executor=PlainExecutor(module, device="cuda", kv_bytes=1 << 30),
    )  # fmt: skip
    started = time.perf_counter()
    shared = share_backbone(
        plain, base, kv_bytes=8 << 30, n_slots=BATCH, delta_bytes=args.delta_gib << 30
    )
    executor: Any = shared.executor
    if not isinstance(executor, SharedExecutor):
        raise TypeError("the backbone is not shared")
    record["share_s"] = time.perf_counter() - started
    sites = executor.slots._sites[:-1]  # noqa: SLF001
    delta = scratch / "delta"
    record["delta_bytes"] = write_large_delta(delta, module, sites, base)
    print("delta", record["delta_bytes"], flush=True)
    measure_loop(record, shared, base, delta, args.out)
    executor.slots._arena = None  # noqa: SLF001
    executor._graphs._captured.clear()  # noqa: SLF001
    executor._cache.keys.clear()  # noqa: SLF001
    executor._cache.values.clear()  # noqa: SLF001
    torch.cuda.empty_cache()
    rows["library"] = time_library(module, draw_prompts(BATCH, 30000), NEW_TOKENS)
    del rows["library"]["answers"]
    print("library", rows["library"], flush=True)


def run_plainly(self: Any, inputs: Any, *, key: Any) -> torch.Tensor:
    del key
    hidden: torch.Tensor = self._run(inputs)
    return hidden


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--made", type=Path, help="where the tiny deltas are, or will be, kept")
    parser.add_argument("--items", type=int, default=20)
    parser.add_argument("--delta-gib", type=int, default=36)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "rows": {},
        "errors": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        options = (args.device, args.items, args.made or Path(scratch))
        for name, section in (
            (
                "tokens",
                lambda: record["rows"].update(tokens=compare_tokens(*options)),
            ),
            (
                "loops",
                lambda: record["rows"].update(loops=compare_loops(args.device, options[2])),
            ),
            ("large", lambda: measure_large(record, Path(scratch), args)),
        ):
            if name == "large" and args.device != "cuda":
                continue
            try:
                section()
            except Exception as error:  # noqa: BLE001  the other sections still count
                traceback.print_exc()
                record["errors"][name] = repr(error)
                if name == "tokens":
                    # A graph that cannot be captured must not hide what plain steps give.
                    graphs.DecodeGraphs.run = run_plainly  # type: ignore[method-assign]
            print(name, json.dumps(record["rows"].get(name)), flush=True)
            args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
