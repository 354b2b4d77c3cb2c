"""Sub-positions held as channels, laid out between the positions: pixel shuffle in 1-D to 3-D."""

from collections.abc import Sequence

from torch import Tensor


def interleave(x: Tensor, factors: Sequence[int]) -> Tensor:
    """(N, C * prod(factors), *L) -> (N, C, *L * factors).

    Channels are ordered (C, *factors); in 2-D with equal factors this is F.pixel_shuffle.
    """
    rank = len(factors)
    x = x.unflatten(1, (-1, *factors))
    pairs = [d for i in range(rank) for d in (2 + rank + i, 2 + i)]
    x = x.permute(0, 1, *pairs)
    for d in range(2, 2 + rank):
        x = x.flatten(d, d + 1)
    return x
