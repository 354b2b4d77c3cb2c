"""A kernel for each position against the unfolded copy, and against what the machine can do."""

import torch
import torch.nn.functional as F
from torch import Tensor

from common import CONVS, Contender, Floor, compare, main, on_eager, on_reference
from dynaconv.functional import conv_per_position

# batch, channels, size, kernel, groups
CASES = {
    2: [(8, 64, 56, 7, 4), (16, 128, 28, 7, 8), (4, 64, 112, 3, 4)],
    1: [(16, 512, 512, 31, 8)],
    3: [(2, 32, 16, 3, 2)],
}


def unfolded(x: Tensor, w: Tensor, padding: int) -> Tensor:
    """As published for involution: im2col, then a product and a sum over the taps."""
    (batch, groups, *kernel), size = w.shape[: w.dim() // 2 + 1], x.shape[2:]
    if x.dim() == 3:
        x, kernel, pad = x.unsqueeze(2), [1, *kernel], (0, padding)
    else:
        pad = (padding, padding)
    columns = F.unfold(x, kernel, padding=pad).reshape(
        batch, groups, x.shape[1] // groups, -1, *size
    )
    return (w.reshape(batch, groups, 1, -1, *size) * columns).sum(3).reshape(batch, -1, *size)


def run(batch: int, channels: int, size: int, kernel: int, groups: int, rank: int) -> None:
    shape = [size] * rank
    x = torch.randn(batch, channels, *shape)
    w = torch.randn(batch, groups, *[kernel] * rank, *shape) / kernel**rank
    depthwise = torch.randn(channels, 1, *[kernel] * rank)
    pad = kernel // 2

    work = 2 * x.numel() * kernel**rank
    floor = Floor(
        (4 * (2 * x.numel() + w.numel()), work),  # x and w read, y written
        (4 * (3 * x.numel() + 2 * w.numel()), 2 * work),
    )
    ours = Contender("dynaconv", lambda x, w: conv_per_position(x, w, padding=pad), (x, w))
    static = lambda x, w: CONVS[rank](x, w, padding=pad, groups=channels)
    contenders = [
        ours,
        *on_eager(ours),
        Contender("static depthwise", static, (x, depthwise), check=False),
    ]
    if rank < 3:
        contenders.append(Contender("copied: unfold", lambda x, w: unfolded(x, w, pad), (x, w)))
    contenders.append(on_reference(ours))
    compare(
        f"{rank}-D, batch {batch}, {channels} channels, size {size}, kernel {kernel}, "
        f"{groups} groups",
        contenders,
        on_reference(ours, torch.float64),
        floor=floor,
    )


if __name__ == "__main__":
    main(__file__, CASES, run)
