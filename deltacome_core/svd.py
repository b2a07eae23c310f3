"""Truncated singular value decomposition of a weight delta."""

import torch

# A singular value this far below the first is rounding noise of the fp64 Gram matrix (its square
# root halves the digits, so 1e-16 becomes 1e-8; one decade of margin).
_RELATIVE_NOISE = 1e-7


def truncated_svd(
    delta: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decompose a delta into its leading singular triplets.

    The eigenvectors of the smaller Gram matrix, taken in fp64, give one side; the other side is the
    projection of the delta on it, so that each sigma is the true length of its projection.
    Directions whose sigma is rounding noise come back as sigma 0 and zero vectors.

    Args:
        delta: float [out, in], finite.
        rank: number of triplets, 1 <= rank <= min(out, in).

    Returns:
        U float32 [out, rank], S float32 [rank] descending, V float32 [rank, in];
        delta is about U @ diag(S) @ V.

    Source: Delta-CoMe (arXiv 2406.08903), section 3; Gram route after Golub & Van Loan, 8.6.
    """
    out_features, in_features = delta.shape
    if out_features > in_features:
        left, sigma, right = truncated_svd(delta.T, rank)
        return right.T.contiguous(), sigma, left.T.contiguous()
    exact = delta.double()
    # eigh sorts ascending: the last columns are the leading directions.
    directions = torch.linalg.eigh(exact @ exact.T).eigenvectors[:, -rank:].flip(1)  # [out, rank]
    projected = directions.T @ exact  # [rank, in]
    del exact
    sigma = torch.linalg.vector_norm(projected, dim=1)
    kept = sigma > sigma.max() * _RELATIVE_NOISE
    # What is only noise is divided by infinity. In place: of a 70B model these are gigabytes.
    projected.div_(torch.where(kept, sigma, torch.inf)[:, None])
    directions = torch.where(kept, directions, 0.0)
    # The projection lengths can swap neighbours that tie in the Gram spectrum.
    sigma, order = torch.sort(torch.where(kept, sigma, 0.0), descending=True, stable=True)
    return directions.float()[:, order].contiguous(), sigma.float(), projected.float()[order]


def singular_energies(delta: torch.Tensor) -> torch.Tensor:
    """Return the squared singular values of a delta, without its vectors.

    Args:
        delta: float [out, in], finite.

    Returns:
        float64 [min(out, in)], falling, not negative.
    """
    exact = delta.double() if delta.shape[0] <= delta.shape[1] else delta.mT.double()
    energies: torch.Tensor = torch.linalg.eigvalsh(exact @ exact.mT)
    return energies.flip(0).clamp_min(0.0)
