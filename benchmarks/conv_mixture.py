"""Experts mixed for each sample: kernels mixed, outputs mixed, and what people copy."""

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from common import Contender, compare, forced, header
from dynaconv import backend
from dynaconv.functional import conv_mixture

ours = importlib.import_module("dynaconv.backends.eager.conv_mixture")
EXPERTS = 4
# batch, channels, size, kernel
CASES = {
    2: [(8, 64, 56, 3), (16, 128, 28, 3), (32, 256, 14, 3), (32, 512, 7, 3), (32, 512, 1, 1)],
    1: [(16, 256, 512, 3)],
    3: [(4, 32, 16, 3)],
}
CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def copied(x: Tensor, w: Tensor, a: Tensor, padding: int) -> Tensor:
    """As most published layers do it: all kernels mixed, then the batch folded into groups."""
    mixed = (a @ w.flatten(1)).unflatten(1, w.shape[1:]).flatten(0, 1)
    conv = CONVS[x.dim() - 2]
    y = conv(x.reshape(1, -1, *x.shape[2:]), mixed, padding=padding, groups=len(x))
    return y.reshape(len(x), -1, *y.shape[2:])


def with_formulation(name: str, x: Tensor, w: Tensor, a: Tensor, padding: int) -> Tensor:
    with forced(ours, formulation=lambda *args: name):
        return conv_mixture(x, w, a, padding=padding)


def run(batch: int, channels: int, size: int, kernel: int, rank: int) -> None:
    x = torch.randn(batch, channels, *[size] * rank)
    w = torch.randn(EXPERTS, channels, channels, *[kernel] * rank)
    w /= (channels * kernel**rank) ** 0.5
    a = torch.rand(batch, EXPERTS).softmax(1)
    pad = kernel // 2
    static = lambda x, w: CONVS[rank](x, w, padding=pad)

    def reference(x: Tensor, w: Tensor, a: Tensor) -> Tensor:
        with backend("reference"):
            return conv_mixture(x, w, a, padding=pad)

    given = (x, w, a)
    forms = [
        Contender(f"dynaconv, {n} mixed", lambda *t, n=n: with_formulation(n, *t, pad), given)
        for n in ours.FORMULATIONS
    ]
    contenders = [
        Contender("static convolution", static, (x, w[0].clone()), check=False),
        Contender("dynaconv", lambda *t: conv_mixture(*t, padding=pad), given),
        Contender("copied: batch in groups", lambda *t: copied(*t, pad), given),
        *forms,
        Contender("reference", reference, tuple(t.double() for t in given)),
    ]
    title = f"{rank}-D, batch {batch}, {channels} channels, size {size}, kernel {kernel}"
    compare(f"{title}, {EXPERTS} experts", contenders)


if __name__ == "__main__":
    header(__file__)
    for rank, cases in CASES.items():
        for case in cases:
            run(*case, rank)
