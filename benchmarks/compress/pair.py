"""A backbone and a fine-tune of real shapes: random weights, and a delta with a real spectrum."""

import json
import random
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.compress.shapes import Shape
from deltacome_core.safetensors_file import TensorSource, write_safetensors
from deltacome_core.tensors import tensor_bytes
from deltacome_core.texts import DEFAULT_CALIBRATION

# Share of the energy of a 4096-wide delta matrix in its first singular directions, read off the
# curve that the authors of Delta-CoMe published (thunlp/Delta-CoMe, figure 1).
SPECTRUM = (
    (2, 0.022),
    (34, 0.267),
    (128, 0.45),
    (256, 0.57),
    (512, 0.71),
    (1002, 0.84),
    (1462, 0.90),
    (2048, 0.95),
    (4096, 1.0),
)
_WIDTH = 4096
_WEIGHT_SIZE = 0.02
# ||delta|| / ||weights|| of a matrix.
_RELATIVE_NORM = 0.025
_SHARD_LAYERS = 8
_WORDS_OF_A_TEXT = 300


def singular_values(rank: int) -> torch.Tensor:
    """Give singular values of unit energy that follow the published curve, scaled to a width.

    Args:
        rank: of the matrix.

    Returns:
        float32 [rank], falling.
    """
    ends = torch.tensor([0.0, *(at for at, _ in SPECTRUM)], dtype=torch.float64) * rank / _WIDTH
    shares = torch.tensor([0.0, *(share for _, share in SPECTRUM)], dtype=torch.float64)
    places = ((ends[1:] + ends[:-1]) / 2).clamp_min(0.5).log()
    density = ((shares[1:] - shares[:-1]) / (ends[1:] - ends[:-1])).log()
    at = torch.arange(1, rank + 1, dtype=torch.float64).log()
    # Straight lines between the middles of the steps, on logarithmic axes; flat beyond the ends.
    right = torch.searchsorted(places, at).clamp(1, len(places) - 1)
    left = right - 1
    part = ((at - places[left]) / (places[right] - places[left])).clamp(0, 1)
    energy = torch.lerp(density[left], density[right], part).exp()
    return (energy / energy.sum()).sqrt().float()


class PairMaker:
    """Draws the tensors of a pair on a device; the same seed gives the same ones."""

    def __init__(self, shape: Shape, device: torch.device, *, seed: int = 0) -> None:
        self._shape, self._device, self._seed = shape, device, seed
        self._factors: dict[tuple[int, int], torch.Tensor] = {}

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator(self._device).manual_seed(self._seed + zlib.crc32(name.encode()))

    def _draw(self, name: str, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self._generator(name), device=self._device)

    def _orthonormal(self, name: str, rows: int, rank: int) -> torch.Tensor:
        """Give orthonormal columns: one set for each size, its rows shuffled for each matrix."""
        if (rows, rank) not in self._factors:
            drawn = self._draw(f"factor {rows} {rank}", rows, rank)
            self._factors[rows, rank] = torch.linalg.qr(drawn).Q
        order = torch.argsort(self._draw(name, rows))
        return self._factors[rows, rank][order]

    def base(self, name: str) -> torch.Tensor:
        """Return a tensor of the backbone, bfloat16."""
        size = self._shape.tensors()[name]
        if len(size) == 1:
            return torch.ones(size, dtype=torch.bfloat16, device=self._device)
        return (self._draw(f"base {name}", *size) * _WEIGHT_SIZE).bfloat16()

    def tuned(self, name: str) -> torch.Tensor:
        """Return a tensor of the fine-tune, bfloat16."""
        base = self.base(name).float()
        if base.ndim == 1:
            return (base + 0.01 * self._draw(f"step {name}", *base.shape)).bfloat16()
        # Vocabularies too: as many directions as columns.
        rows, cols = base.shape
        rank = min(rows, cols)
        left = self._orthonormal(f"left {name}", rows, rank)
        right = self._orthonormal(f"right {name}", cols, rank)
        step = (left * singular_values(rank).to(self._device)) @ right.T
        size = _RELATIVE_NORM * _WEIGHT_SIZE * (rows * cols) ** 0.5
        return base.add_(step, alpha=size).bfloat16()


def write_pair(folder: Path, shape: Shape, tokenizer: Path, device: torch.device) -> None:
    """Write backbone, fine-tune and calibration text as folders that transformers runs.

    Args:
        folder: gets `base` and `tuned`.
        shape: sizes of the model.
        tokenizer: folder of a checkpoint whose tokenizer is taken.
        device: where the weights are drawn.
    """
    maker = PairMaker(shape, device)
    for kind, draw in (("base", maker.base), ("tuned", maker.tuned)):
        own = folder / kind
        own.mkdir(parents=True)
        _write_weights(own, shape, draw)
        _write_config(own, shape, tokenizer)
    if shape.texts:
        write_calibration(folder / "tuned" / "calibration.jsonl", n_texts=shape.texts)


def _write_weights(folder: Path, shape: Shape, draw: Callable[[str], torch.Tensor]) -> None:
    table = shape.tensors()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for number, (name, size) in enumerate(table.items()):
        if number and number % (9 * _SHARD_LAYERS) == 0:
            shards.append({})
        shards[-1][name] = size
    places: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        sources: list[TensorSource] = [
            (name, "BF16", size, _lazily(draw, name)) for name, size in shard.items()
        ]
        total += write_safetensors(folder / file, sources, {"format": "pt"})
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _lazily(draw: Callable[[str], torch.Tensor], name: str) -> Iterator[memoryview]:
    yield tensor_bytes(draw(name))


def _write_config(folder: Path, shape: Shape, tokenizer: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "num_hidden_layers": shape.layers,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)


def write_calibration(path: Path, *, n_texts: int) -> None:
    """Write texts of shuffled words; 1600 are enough for 128 sequences of 2048 tokens.

    Args:
        path: .jsonl file to create.
        n_texts: of 300 words each.
    """
    words = DEFAULT_CALIBRATION.read_text(encoding="utf-8").split()
    chance = random.Random(0)
    lines = (
        json.dumps({"text": " ".join(chance.choices(words, k=_WORDS_OF_A_TEXT))})
        for _ in range(n_texts)
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
