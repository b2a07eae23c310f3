"""How close a candidate's weights come to a fine-tune: task score, KL, agreement.

    python -m benchmarks.quality.measure --base BASE_DIR --tuned TUNED_DIR --candidate DIR …

One model is built; each candidate is copied into its weights, so that graphs stay captured.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.answers import AnswerSheet, Score
from benchmarks.quality.batches import collate, encode_items
from benchmarks.quality.decode import make_decoder
from benchmarks.quality.general_text import general_tokens
from benchmarks.quality.models import (
    State,
    load_causal_model,
    load_in_place,
    read_state,
    serving_dtype,
)
from deltacome_core.models import load_tokenizer

N_ITEMS = 400
TEXT_ROWS = 64
TEXT_TOKENS = 512
TEXT_PROMPT_TOKENS = 64
GREEDY_TOKENS = 128
# Logits of so many tokens are held at once, in fp32 and for two models.
TOKENS_AT_ONCE = {"cuda": 4096, "cpu": 512}
ROWS_AT_ONCE = {"cuda": 512, "cpu": 16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """A candidate beside its fine-tune; KL(fine-tune || candidate) in nats per token.

    The standard errors of KL are over items and over rows of text, whose tokens go together.
    recovery is 1 - KL / KL of the backbone. greedy_match is the mean share of 128 tokens before
    the first that differs, on task prompts; an answer that ends alike agrees to the end.
    """

    score: float
    score_se: float
    n_items: int
    kl_task: float
    kl_task_se: float
    kl_text: float
    kl_text_se: float
    top1: float
    top1_text: float
    recovery: float
    recovery_text: float
    greedy_match: float
    greedy_text: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Means over tokens, and the standard error of `kl` where whole rows are drawn."""

    kl: float
    kl_se: float
    top1: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRows:
    """Rows padded on the right, and the flat places whose predictions are compared."""

    ids: Tensor
    places: Tensor

    @property
    def rows(self) -> Tensor:
        """Row of each place."""
        return self.places // self.ids.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """Sizes; the defaults are those of the published table."""

    device: str
    n_items: int = N_ITEMS
    text_rows: int = TEXT_ROWS
    text_tokens: int = TEXT_TOKENS
    greedy_tokens: int = GREEDY_TOKENS
    use_graph: bool = True
    dtype: torch.dtype | None = None


@torch.no_grad()
def final_states(model: Any, rows: ScoredRows) -> Tensor:
    """Hidden states behind the compared predictions, [n, hidden].

    Logits follow from them and the head; they are kept instead, being some 85 times smaller.
    """
    step = ROWS_AT_ONCE[rows.ids.device.type]
    decoder = model.get_decoder()
    parts = [
        decoder(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        for ids in torch.split(rows.ids, step)
    ]
    return torch.cat(parts)[rows.places]


def split_both(first: Tensor, second: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    size = TOKENS_AT_ONCE[first.device.type]
    return zip(torch.split(first, size), torch.split(second, size), strict=True)


@torch.no_grad()
def compare_states(
    reference: Tensor, reference_head: Tensor, states: Tensor, head: Tensor, *, rows: Tensor
) -> Divergence:
    """Compare two models' predictions of the same places, in fp32.

    Args:
        reference: [n, hidden], of the fine-tune.
        reference_head: [vocabulary, hidden].
        states: [n, hidden], of the candidate.
        head: [vocabulary, hidden].
        rows: int64 [n], the row that a place belongs to.
    """
    terms = []
    agreed = torch.zeros((), dtype=torch.int64, device=states.device)
    for ours, theirs in split_both(reference, states):
        p = (ours @ reference_head.T).float().log_softmax(dim=-1)
        q = (theirs @ head.T).float().log_softmax(dim=-1)
        agreed += (p.argmax(dim=-1) == q.argmax(dim=-1)).sum()
        terms.append((p.exp() * q.sub_(p)).sum(dim=-1).double().neg())
    n = len(states)
    kl = torch.cat(terms).cpu()
    # Of a ratio of two sums over rows, Cochran, Sampling Techniques, 2.11.
    off = torch.zeros(int(rows.max()) + 1, dtype=kl.dtype)
    off.index_add_(0, rows.cpu(), kl - kl.mean())
    return Divergence(kl=float(kl.mean()), kl_se=float(off.norm()) / n, top1=int(agreed) / n)


def prefix_share(reference: Tensor, tokens: Tensor) -> float:
    """Mean share of tokens before the first that differs, of int64 [rows, length]."""
    return float((reference == tokens).long().cumprod(dim=1).double().mean())


class Bench:
    """A fine-tune with its backbone, ready to measure candidates of the same shape."""

    def __init__(self, tuned: Path, base: Path, options: BenchOptions) -> None:
        device = options.device
        self.tokenizer = load_tokenizer(tuned)
        dtype = options.dtype or serving_dtype(device)
        self.model = load_causal_model(tuned, dtype=dtype, device=device).eval()
        self.model.requires_grad_(requires_grad=False)
        self._sheet = AnswerSheet(
            self.model,
            self.tokenizer,
            tuned / "evaluation.jsonl",
            n_items=options.n_items,
            new_tokens=options.greedy_tokens,
            use_graph=options.use_graph,
        )
        self._task = self._task_rows(device)
        text = general_tokens(
            self.tokenizer, rows=options.text_rows, length=options.text_tokens
        ).to(device)
        self._text = ScoredRows(ids=text, places=torch.arange(text.numel(), device=device))
        self._openings = text[:, :TEXT_PROMPT_TOKENS].tolist()
        self._text_decoder = make_decoder(
            self.model,
            self._openings,
            new_tokens=options.greedy_tokens,
            use_graph=options.use_graph,
        )

        self._head = self.model.get_output_embeddings().weight.clone()
        self._task_states = final_states(self.model, self._task)
        self._text_states = final_states(self.model, self._text)
        self._answers, self._continued = self._decode()
        load_in_place(self.model, read_state(base))
        self.kl_backbone = self._diverge()
        self.reference = self.measure(read_state(tuned))
        self.backbone = self.measure(read_state(base))

    def _task_rows(self, device: str) -> ScoredRows:
        encoded = encode_items(self.tokenizer, self._sheet.items, longest=1024)
        batch = collate(encoded, pad_token=self.tokenizer.eos_token_id).to(device)
        return ScoredRows(ids=batch.ids, places=batch.places)

    def _decode(self) -> tuple[Tensor, Tensor]:
        continued = self._text_decoder.decode(self._openings, stop_tokens=self._sheet.stop_tokens)
        return self._sheet.answer(), continued

    def _diverge(self) -> tuple[Divergence, Divergence]:
        """Compare the model as it is now with the fine-tune: on the task, on general text."""
        head = self.model.get_output_embeddings().weight
        task = final_states(self.model, self._task)
        text = final_states(self.model, self._text)
        return (
            compare_states(self._task_states, self._head, task, head, rows=self._task.rows),
            compare_states(self._text_states, self._head, text, head, rows=self._text.rows),
        )

    def diverge(self, state: State) -> tuple[Divergence, Divergence]:
        """Measure a candidate's predictions alone, without letting it answer.

        Args:
            state: as for `measure`.

        Returns:
            On the task and on general text.
        """
        load_in_place(self.model, state)
        return self._diverge()

    def measure(self, state: State) -> Measurement:
        """Measure a candidate.

        Args:
            state: by checkpoint name, any dtype and device; cast to what is served. Fewer
                vocabulary rows are filled up with their mean, a tied head may be missing.

        Returns:
            Its figures, the fine-tune's own answers and predictions being the reference.

        Raises:
            KeyError: a parameter is missing.
            ValueError: a shape does not fit.
        """
        started = time.perf_counter()
        task, text = self.diverge(state)
        answers, continued = self._decode()
        graded: Score = self._sheet.grade(answers)
        backbone_task, backbone_text = self.kl_backbone
        return Measurement(
            **asdict(graded),
            kl_task=task.kl,
            kl_task_se=task.kl_se,
            kl_text=text.kl,
            kl_text_se=text.kl_se,
            top1=task.top1,
            top1_text=text.top1,
            recovery=1 - task.kl / backbone_task.kl,
            recovery_text=1 - text.kl / backbone_text.kl,
            greedy_match=prefix_share(self._answers, answers),
            greedy_text=prefix_share(self._continued, continued),
            seconds=round(time.perf_counter() - started, 3),
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--tuned", type=Path, required=True)
    parser.add_argument("--candidate", type=Path, nargs="*", default=[])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--items", type=int, default=N_ITEMS)
    args = parser.parse_args()
    bench = Bench(args.tuned, args.base, BenchOptions(device=args.device, n_items=args.items))
    print(json.dumps({"fine_tune": asdict(bench.reference)}))
    print(json.dumps({"backbone": asdict(bench.backbone)}))
    for folder in args.candidate:
        print(json.dumps({folder.name: asdict(bench.measure(read_state(folder)))}), flush=True)


if __name__ == "__main__":
    main()
