"""The pair and the delta that tests of delta folders read, and names of its tensors."""

from factories_core import fine_tune, llama_tensors, make_delta, write_checkpoint

LAYER = "model.layers.0"
QUERY = f"{LAYER}.self_attn.q_proj.weight"
KEY = f"{LAYER}.self_attn.k_proj.weight"
DOWN = f"{LAYER}.mlp.down_proj.weight"
EMBED = "model.embed_tokens.weight"
NORM = f"{LAYER}.input_layernorm.weight"


def make_folders(root):
    """A backbone, its fine-tune with three new words, and the delta between them."""
    base = llama_tensors(0)
    write_checkpoint(root / "base", base)
    write_checkpoint(root / "tuned", fine_tune(base, 1, new_rows=3), shards=2)
    make_delta(root / "base", root / "tuned", root / "delta")
    return root
