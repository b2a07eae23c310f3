"""A tensor as the matrices that are factorised: itself, its transpose, or each slice of a stack."""

from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch

from deltacome_core.entries import slice_name
from deltacome_core.factorise import NamedDelta
from deltacome_core.packed import PackedLinear, PackedStack

_MATRIX_DIMENSIONS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SlicedTensor:
    """A tensor [rows, cols] or [n, rows, cols]; transposed: rows are its inputs."""

    name: str
    shape: tuple[int, ...]
    transposed: bool

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in) of each matrix."""
        rows, cols = self.shape[-2:]
        return (cols, rows) if self.transposed else (rows, cols)

    @property
    def matrix_names(self) -> tuple[str, ...]:
        return matrix_names(self.name, self.shape)

    def split(self, delta: torch.Tensor) -> list[NamedDelta]:
        """Cut a delta into matrices.

        Args:
            delta: f32 of `shape`.

        Returns:
            One [out, in] per slice; views.
        """
        turned = delta.mT if self.transposed else delta
        matrices = turned.reshape(-1, *turned.shape[-2:])
        return [
            NamedDelta(name=name, delta=matrix)
            for name, matrix in zip(self.matrix_names, matrices, strict=True)
        ]

    def join(self, matrices: Mapping[str, PackedLinear]) -> PackedLinear | PackedStack:
        """Put packed matrices together again.

        Args:
            matrices: those of this tensor, by the names that split gave them.

        Returns:
            What the tensor is stored as.
        """
        slices = tuple(matrices[name] for name in self.matrix_names)
        if len(self.shape) == _MATRIX_DIMENSIONS and not self.transposed:
            return slices[0]
        return PackedStack(
            name=self.name, shape=self.shape, slices=slices, transposed=self.transposed
        )


def slice_tensor(name: str, shape: tuple[int, ...], flipped: Container[str]) -> SlicedTensor:
    """Decide how a tensor is cut.

    Args:
        name: tensor name.
        shape: of two or three dimensions.
        flipped: names of matrices whose rows were seen to be inputs.

    Returns:
        The cut; without evidence the last dimension is taken for the input.
    """
    transposed = any(each in flipped for each in matrix_names(name, shape))
    return SlicedTensor(name=name, shape=shape, transposed=transposed)


def matrix_names(name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Name a matrix by itself, and each slice of a stack by its index.

    Args:
        name: tensor name.
        shape: of two or three dimensions.

    Returns:
        One name per matrix.
    """
    if len(shape) == _MATRIX_DIMENSIONS:
        return (name,)
    return tuple(slice_name(name, index) for index in range(shape[0]))
