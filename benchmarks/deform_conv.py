"""Deformable convolution against torchvision's, where it is installed, and grid_sample."""

import torch
import torch.nn.functional as F
from torch import Tensor

from common import CONVS, Contender, compare, main, on_eager, on_reference
from dynaconv.functional import deform_conv

try:
    from torchvision.ops import deform_conv2d
except (ImportError, RuntimeError):  # RuntimeError: built for another torch
    deform_conv2d = None

# batch, channels, size
CASES = {
    2: [(4, 64, 56), (4, 256, 28), (8, 128, 14)],
    1: [(8, 128, 512)],
    3: [(2, 32, (16, 32, 32))],
}
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


def run(batch: int, channels: int, size: int | tuple[int, ...], rank: int) -> None:
    taps, shape = KERNEL**rank, [size] * rank if isinstance(size, int) else size
    x = torch.randn(batch, channels, *shape)
    # In sixteenths and between the points: at a point itself the offset's gradient is a matter of
    # rounding.
    offset = (24 * torch.randn(batch, taps * rank, *shape)).round() / 16 + 1 / 32
    w = torch.randn(channels, channels, *[KERNEL] * rank) / (channels * taps) ** 0.5
    m = torch.rand(batch, taps, *shape)

    given = (x, offset, w, m)
    modulated = lambda x, o, w, m: deform_conv(x, o, w, padding=1, modulation=m)
    ours = Contender("dynaconv", modulated, given)
    contenders = [ours, *on_eager(ours)]
    if rank == 2 and deform_conv2d is not None:
        theirs = lambda x, o, w, m: deform_conv2d(x, o, w, None, padding=1, mask=m)
        contenders.append(Contender("torchvision", theirs, given))
    if rank > 1:
        contenders.append(Contender("copied: grid_sample", by_grid_sample, given))
    static = lambda x, w: CONVS[rank](x, w, padding=1)
    contenders += [
        Contender("static convolution", static, (x, w), check=False),
        on_reference(ours),
    ]
    # float32 positions: a coordinate of 50 is known to some 4e-6.
    size = "x".join(map(str, shape)) if isinstance(size, tuple) else size
    title = f"{rank}-D, batch {batch}, {channels} channels, size {size}, modulated"
    compare(title, contenders, on_reference(ours, torch.float64), 1e-3)


if __name__ == "__main__":
    main(__file__, CASES, run)
