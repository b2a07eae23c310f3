"""The shapes that are measured."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama model's sizes; layers_of_model says how many layers the real one has."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int
    layers_of_model: int
    vocabulary: int
    tied: bool = False
    # Texts of 300 words that the fine-tune brings; without any the built-in one calibrates.
    texts: int = 1600

    def matrices(self, layer: int) -> dict[str, tuple[int, int]]:
        """Give (out, in) of the matrices of a layer by name."""
        kv = self.hidden // self.heads * self.kv_heads
        sizes = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        return {f"model.layers.{layer}.{name}.weight": size for name, size in sizes.items()}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Give the shape of every tensor by name, in the order of the files."""
        table: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden)
        }
        for layer in range(self.layers):
            table |= self.matrices(layer)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                table[f"model.layers.{layer}.{norm}.weight"] = (self.hidden,)
        table["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            table["lm_head.weight"] = (self.vocabulary, self.hidden)
        return table


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="llama-2-7b",
            hidden=4096,
            intermediate=11008,
            heads=32,
            kv_heads=32,
            layers=32,
            layers_of_model=32,
            vocabulary=32000,
        ),
        Shape(
            name="llama-2-70b",
            hidden=8192,
            intermediate=28672,
            heads=64,
            kv_heads=8,
            layers=2,
            layers_of_model=80,
            vocabulary=32000,
        ),
        Shape(
            name="smollm2-135m",
            hidden=576,
            intermediate=1536,
            heads=9,
            kv_heads=3,
            layers=30,
            layers_of_model=30,
            vocabulary=49152,
            tied=True,
            texts=0,
        ),
    )
}
