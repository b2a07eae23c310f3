"""Layers of the shared model: each row of a step goes by its own tenant's numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from kernels.image import Site
from kernels.streams import send, send_tensor
from workers.engine.slots import Slots

_PLAIN_NORMS = (nn.LayerNorm, nn.RMSNorm)
# Rows up to which a step takes all its vectors in one launch: of 7B, 1 GB for 2,000 rows.
_GATHERED_ROWS = 256


class RowTables:
    """Vectors that differ between tenants (norms, biases), one row a slot, row 0 the backbone's.

    Vectors of one length lie side by side, so that a step of few rows gathers all of them at once.
    """

    def __init__(
        self, vectors: Mapping[str, torch.Tensor], *, n_slots: int, device: torch.device
    ) -> None:
        self._places: dict[str, tuple[int, int]] = {}
        self._tables: dict[int, torch.Tensor] = {}
        self._gathered: dict[int, torch.Tensor] = {}
        self._rows = torch.zeros(0, dtype=torch.long)
        by_size: dict[int, list[str]] = {}
        for name, vector in vectors.items():
            by_size.setdefault(len(vector), []).append(name)
        for size, names in by_size.items():
            base = torch.stack([vectors[name].detach() for name in names]).to(device)
            self._tables[size] = base.repeat(n_slots + 1, 1, 1)
            self._places.update({name: (size, number) for number, name in enumerate(names)})

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._places)

    def length(self, name: str) -> int:
        return self._places[name][0]

    def put(self, slot: int, vectors: Mapping[str, torch.Tensor]) -> None:
        """Give a slot its vectors, on the CPU; the backbone's where it has none of its own.

        One copy for all vectors of a length, which waits for no step: a copy each would wait, each
        time, for all that the device still has to do.
        """
        chosen: dict[int, dict[int, torch.Tensor]] = {size: {} for size in self._tables}
        for name, vector in vectors.items():
            size, number = self._places[name]
            chosen[size][number] = vector
        for size, own in chosen.items():
            table = self._tables[size]
            table[slot + 1] = table[0]
            if own:
                rows = send(np.array(list(own)), table.device)
                values = torch.stack([vector.to(table.dtype) for vector in own.values()])
                table[slot + 1, rows] = send_tensor(values, table.device)

    def gather(self, rows: torch.Tensor) -> None:
        """Take the vectors of each row of a step; `rows` int64 [rows] are slots plus one."""
        self._rows = rows
        few = len(rows) <= _GATHERED_ROWS
        self._gathered = {s: table[rows] for s, table in self._tables.items()} if few else {}

    def rows_of(self, name: str) -> torch.Tensor:
        """Vectors of the running step, [rows, length]."""
        size, number = self._places[name]
        gathered = self._gathered.get(size)
        if gathered is None:
            return self._tables[size][:, number][self._rows]
        return gathered[:, number]


class TenantNorm(nn.Module):
    """A norm whose weight is the row's own."""

    def __init__(self, inner: nn.Module, name: str, tables: RowTables) -> None:
        super().__init__()
        self._name = name
        self._tables = tables
        self._is_plain = isinstance(inner, _PLAIN_NORMS)
        self._bias = f"{name}.bias" if getattr(inner, "bias", None) is not None else None
        for leaf in list(inner._parameters):  # noqa: SLF001  its weight becomes an argument
            del inner._parameters[leaf]  # noqa: SLF001
            setattr(inner, leaf, None)
        # Kept out of the tree of modules: its class multiplies by whatever `weight` is.
        self._inner = (inner,)

    def _rows(self, name: str, like: torch.Tensor) -> torch.Tensor:
        rows = self._tables.rows_of(name)
        return rows.view(1, len(rows), *[1] * (like.ndim - 3), rows.shape[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (inner,) = self._inner
        weight = self._rows(f"{self._name}.weight", x)
        if not self._is_plain:
            inner.weight = weight
            found: torch.Tensor = inner(x)
            return found
        y: torch.Tensor = inner(x) * weight
        return y if self._bias is None else y + self._rows(self._bias, x)


def is_tenant_norm(module: nn.Module) -> bool:
    """Whether a module's only parameters are a vector `weight`, and `bias` for a plain norm."""
    parameters = dict(module.named_parameters())
    weight = parameters.pop("weight", None)
    if isinstance(module, _PLAIN_NORMS):
        parameters.pop("bias", None)
    return not parameters and weight is not None and weight.ndim == 1


@dataclass(slots=True)
class Link:
    """Where the layers find the tenants of the running step."""

    slots: Slots
    tables: RowTables


class SharedSite:
    """Matrices that read the same input: one product for all of them, made when the first asks."""

    def __init__(self, number: int, site: Site, linears: Sequence[nn.Linear], link: Link) -> None:
        self._number = number
        self._link = link
        self._asked: Any = None
        self._answer: torch.Tensor | None = None
        weights = [linear.weight for linear in linears]
        self.weight = weights[0].detach() if len(weights) == 1 else torch.cat(weights).detach()
        self._biases = [
            f"{part.removesuffix('.weight')}.bias" if linear.bias is not None else None
            for part, linear in zip(site.parts, linears, strict=True)
        ]
        self._ends = torch.tensor(site.out_features).cumsum(0).tolist()
        first = 0
        for linear, last in zip(linears, self._ends, strict=True):
            # The parameter is a part of the fused weight from now on, not a copy beside it.
            linear.weight = nn.Parameter(self.weight[first:last], requires_grad=False)
            first = last

    def part(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """Outputs of one matrix for x [..., rows, in]."""
        if self._asked is not x or self._answer is None:
            self._asked, self._answer = x, self._multiply(x)
        first = self._ends[number - 1] if number else 0
        answer = self._answer[..., first : self._ends[number]]
        if number == len(self._ends) - 1:
            self._asked = self._answer = None
        return answer

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = self._link.slots.linear(rows, self.weight, self._number)
        first = 0
        for name, last in zip(self._biases, self._ends, strict=True):
            if name is not None:
                y[:, first:last] += self._link.tables.rows_of(name)
            first = last
        return y.view(*x.shape[:-1], y.shape[-1])


class SiteLinear(nn.Module):
    """One matrix of a site in the place of the linear layer it was."""

    def __init__(self, site: SharedSite, number: int) -> None:
        super().__init__()
        self._site = site
        self._number = number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._site.part(self._number, x)
