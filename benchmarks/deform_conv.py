"""Deformable convolution against torchvision's, where it is installed, and grid_sample."""

import torch
import torch.nn.functional as F
from torch import Tensor

from common import Contender, compare, header
from dynaconv import backend
from dynaconv.functional import deform_conv

try:
    from torchvision.ops import deform_conv2d
except (ImportError, RuntimeError):  # RuntimeError: built for another torch
    deform_conv2d = None

# batch, channels, size
CASES = {
    2: [(4, 64, 56), (4, 256, 28), (8, 128, 14)],
    1: [(8, 128, 512)],
    3: [(2, 32, 16)],
}
CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
KERNEL = 3


def by_grid_sample(x: Tensor, offset: Tensor, w: Tensor, m: Tensor) -> Tensor:
    """As copied where no compiled operator is at hand: all taps by grid_sample, then a product."""
    rank, size = x.dim() - 2, x.shape[2:]
    taps = KERNEL**rank
    places = torch.meshgrid(*[torch.arange(n) for n in size], indexing="ij")
    steps = torch.meshgrid(*[torch.arange(KERNEL) - 1] * rank, indexing="ij")
    shifts = offset.unflatten(1, (taps, rank))
    grid = [
        2 * (shifts[:, :, d] + steps[d].reshape(-1, *[1] * rank) + places[d]) / (size[d] - 1) - 1
        for d in reversed(range(rank))
    ]
    grid = torch.stack(grid, -1).flatten(1, 2)  # (N, K * L_0, *L_rest, D)
    sampled = F.grid_sample(x, grid, align_corners=True).unflatten(2, (taps, -1))
    sampled = (sampled * m.unsqueeze(1)).flatten(1, 2).flatten(2)
    return (w.flatten(1) @ sampled).unflatten(2, size)


def run(batch: int, channels: int, size: int, rank: int) -> None:
    taps, shape = KERNEL**rank, [size] * rank
    x = torch.randn(batch, channels, *shape)
    offset = 1.5 * torch.randn(batch, taps * rank, *shape)
    w = torch.randn(channels, channels, *[KERNEL] * rank) / (channels * taps) ** 0.5
    m = torch.rand(batch, taps, *shape)

    def ours(x: Tensor, o: Tensor, w: Tensor, m: Tensor) -> Tensor:
        return deform_conv(x, o, w, padding=1, modulation=m)

    def reference(*tensors: Tensor) -> Tensor:
        with backend("reference"):
            return ours(*tensors)

    given = (x, offset, w, m)
    contenders = [Contender("dynaconv", ours, given)]
    if rank == 2 and deform_conv2d is not None:
        theirs = lambda x, o, w, m: deform_conv2d(x, o, w, None, padding=1, mask=m)
        contenders.append(Contender("torchvision", theirs, given))
    if rank > 1:
        contenders.append(Contender("copied: grid_sample", by_grid_sample, given))
    static = lambda x, w: CONVS[rank](x, w, padding=1)
    contenders += [
        Contender("static convolution", static, (x, w), check=False),
        Contender("dynaconv, reference", reference, given),
        Contender("reference", reference, tuple(t.double() for t in given)),
    ]
    # float32 positions: a coordinate of 50 is known to some 4e-6.
    compare(
        f"{rank}-D, batch {batch}, {channels} channels, size {size}, modulated", contenders, 1e-3
    )


if __name__ == "__main__":
    header(__file__)
    for rank, cases in CASES.items():
        for case in cases:
            run(*case, rank)
