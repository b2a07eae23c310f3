"""A second set of modules over a backbone's weights, made ready for rows of many tenants."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltacome_core.errors import UserError
from deltacome_core.models import build_skeleton
from kernels.image import Site
from workers.engine.attention import ATTENTION_NAME, AttentionStep, Chunk, running
from workers.engine.layers import Link, SharedSite, SiteLinear, TenantNorm, is_tenant_norm
from workers.engine.paging import PAGE_TOKENS, PagedCache


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Linear layers by the input they share, and what a token takes in the cache."""

    groups: tuple[tuple[str, ...], ...]
    token_bytes: int


def make_twin(module: Any, folder: Path, device: torch.device) -> Any:
    """A second set of modules over the same weights, whose attention reads pages."""
    twin = build_skeleton(folder, module.dtype)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        layer, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(layer), leaf, parameter)
    twin.tie_weights()
    for part in twin.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))
    twin.config._attn_implementation = ATTENTION_NAME  # noqa: SLF001  the library's own switch
    return twin


@torch.inference_mode()
def probe(twin: Any, device: torch.device) -> Geometry:
    """Run a few tokens to see which linear layers read the same input, and what is cached."""
    seen: list[tuple[str, str, torch.Tensor]] = []
    hooks = [
        part.register_forward_pre_hook(
            lambda _part, args, name=name: seen.append((name, name.rpartition(".")[0], args[0]))
        )
        for name, part in twin.get_decoder().named_modules(prefix=_decoder_name(twin))
        if type(part) is nn.Linear
    ]
    cache = PagedCache(1)
    cache.places = torch.arange(PAGE_TOKENS, PAGE_TOKENS + 3, device=device)
    step = AttentionStep(cache=cache, chunks=(Chunk(first=0, last=3, places=cache.places),))
    ids = torch.tensor([[1, 2, 3]], device=device)
    try:
        with running(step):
            twin.get_decoder()(
                inputs_embeds=twin.get_input_embeddings()(ids),
                position_ids=torch.arange(3, device=device)[None],
                past_key_values=cache,
                use_cache=True,
            )
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = f"the shared model cannot run it: {str(error)[:200]}"
        raise UserError("architecture_unknown", reason=reason) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not cache.keys:
        raise UserError("architecture_unknown", reason="it caches no keys and values")
    names = [name for name, _, _ in seen]
    if len(set(names)) < len(names):
        raise UserError("architecture_unknown", reason="a layer runs more than once for a token")
    groups: list[list[str]] = []
    before: tuple[str, torch.Tensor] | None = None
    for name, parent, read in seen:
        if before is not None and before[0] == parent and before[1] is read:
            groups[-1].append(name)
        else:
            groups.append([name])
        before = (parent, read)
    return Geometry(groups=tuple(map(tuple, groups)), token_bytes=cache.token_bytes)


def _decoder_name(model: Any) -> str:
    decoder = model.get_decoder()
    return next(str(name) for name, part in model.named_modules() if part is decoder)


def list_sites(module: Any, groups: Sequence[Sequence[str]]) -> Iterator[Site]:
    for names in groups:
        linears = [module.get_submodule(name) for name in names]
        yield Site(
            name="|".join(names),
            parts=tuple(f"{name}.weight" for name in names),
            out_features=tuple(linear.out_features for linear in linears),
            in_features=linears[0].in_features,
        )


def list_vectors(module: Any, sites: Sequence[Site]) -> Iterator[tuple[str, torch.Tensor]]:
    """Norms of the decoder and biases of its linear layers."""
    for name, part in module.get_decoder().named_modules(prefix=_decoder_name(module)):
        if is_tenant_norm(part):
            yield f"{name}.weight", part.weight
            if getattr(part, "bias", None) is not None:
                yield f"{name}.bias", part.bias
    for site in sites:
        for weight in site.parts:
            name = weight.removesuffix(".weight")
            bias = module.get_submodule(name).bias
            if bias is not None:
                yield f"{name}.bias", bias


def name_tables(module: Any) -> tuple[str, str]:
    """Names of the embedding's and the head's parameter; one name when they are tied."""
    parameters = {id(p): name for name, p in module.named_parameters()}
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    usable = type(embedding) is nn.Embedding and type(head) is nn.Linear and head.bias is None
    if not usable:
        raise UserError("architecture_unknown", reason="its embedding or head is of its own kind")
    return parameters[id(embedding.weight)], parameters[id(head.weight)]


def swap_layers(twin: Any, module: Any, sites: Sequence[Site], link: Link) -> None:
    """Put the tenants' layers into the twin; fused weights replace those of both models."""
    for number, site in enumerate(sites):
        names = [part.removesuffix(".weight") for part in site.parts]
        shared = SharedSite(number, site, [module.get_submodule(name) for name in names], link)
        for part, name in enumerate(names):
            twin.set_submodule(name, SiteLinear(shared, part))
    for name, part in list(twin.get_decoder().named_modules(prefix=_decoder_name(twin))):
        if f"{name}.weight" in link.tables.names and is_tenant_norm(part):
            twin.set_submodule(name, TenantNorm(part, name, link.tables))
