"""Check on one machine what the tests check on a CPU, and that graph and eager decoding agree.

python -m benchmarks.quality.selfcheck --base BASE_DIR --tuned TUNED_DIR --device cuda
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.quality.answers import AnswerSheet
from benchmarks.quality.decode import make_decoder
from benchmarks.quality.general_text import general_tokens
from benchmarks.quality.measure import (
    GREEDY_TOKENS,
    N_ITEMS,
    TEXT_PROMPT_TOKENS,
    Bench,
    BenchOptions,
)
from benchmarks.quality.models import load_causal_model, read_state, serving_dtype
from deltacome_core.models import load_tokenizer


def decode_both(tuned: Path, *, device: str, n_items: int) -> tuple[Tensor, Tensor]:
    """Decode tasks and general text with and without a graph; rows are joined."""
    tokenizer = load_tokenizer(tuned)
    model = load_causal_model(tuned, dtype=serving_dtype(device), device=device).eval()
    openings = general_tokens(tokenizer, rows=16, length=TEXT_PROMPT_TOKENS).tolist()
    found = []
    for use_graph in (True, False):
        sheet = AnswerSheet(
            model,
            tokenizer,
            tuned / "evaluation.jsonl",
            n_items=n_items,
            new_tokens=GREEDY_TOKENS,
            use_graph=use_graph,
        )
        decoder = make_decoder(model, openings, new_tokens=GREEDY_TOKENS, use_graph=use_graph)
        found.append(torch.cat([sheet.answer(), decoder.decode(openings)]))
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--tuned", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--items", type=int, default=N_ITEMS)
    args = parser.parse_args()
    by_graph, eagerly = decode_both(args.tuned, device=args.device, n_items=args.items)
    bench = Bench(args.tuned, args.base, BenchOptions(device=args.device, n_items=args.items))
    again = bench.measure(read_state(args.tuned))
    checks = {
        "graph_equals_eager": torch.equal(by_graph, eagerly),
        "fine_tune_is_itself": again.kl_task == again.kl_text == 0 and again.top1 == 1,
        "fine_tune_answers_as_itself": again.greedy_match == again.greedy_text == 1,
        "backbone_differs": bench.backbone.kl_task > 0 and bench.backbone.greedy_match < 1,
        "order_does_not_matter": again.score == bench.reference.score,
    }
    print(json.dumps({"fine_tune": asdict(again), "backbone": asdict(bench.backbone)}, indent=1))
    if args.device.startswith("cuda"):
        print(json.dumps({"peak_gpu_bytes": torch.cuda.max_memory_allocated()}))
    print(json.dumps(checks, indent=1))
    raise SystemExit(not all(checks.values()))


if __name__ == "__main__":
    main()
