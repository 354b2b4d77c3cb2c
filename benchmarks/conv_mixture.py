"""Experts mixed for each sample: kernels mixed, outputs mixed, and what people copy."""

import importlib

import torch
from torch import Tensor

from common import CONVS, Contender, batch_in_groups, compare, forced, main, on_eager, on_reference
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


def copied(x: Tensor, w: Tensor, a: Tensor, padding: int) -> Tensor:
    """As most published layers do it: all kernels mixed, then the batch folded into groups."""
    mixed = (a @ w.flatten(1)).unflatten(1, w.shape[1:])
    return batch_in_groups(x, mixed, padding)


def with_formulation(name: str, x: Tensor, w: Tensor, a: Tensor, padding: int) -> Tensor:
    with backend("eager"), forced(ours, formulation=lambda *args: name):
        return conv_mixture(x, w, a, padding=padding)


def run(batch: int, channels: int, size: int, kernel: int, rank: int) -> None:
    x = torch.randn(batch, channels, *[size] * rank)
    w = torch.randn(EXPERTS, channels, channels, *[kernel] * rank)
    w /= (channels * kernel**rank) ** 0.5
    a = torch.rand(batch, EXPERTS).softmax(1)
    pad = kernel // 2
    static = lambda x, w: CONVS[rank](x, w, padding=pad)

    given = (x, w, a)
    chosen = Contender("dynaconv", lambda *t: conv_mixture(*t, padding=pad), given)
    forms = [
        Contender(f"eager, {n} mixed", lambda *t, n=n: with_formulation(n, *t, pad), given)
        for n in ours.FORMULATIONS
    ]
    contenders = [
        Contender("static convolution", static, (x, w[0].clone()), check=False),
        chosen,
        *on_eager(chosen),
        Contender("copied: batch in groups", lambda *t: copied(*t, pad), given),
        *forms,
    ]
    title = f"{rank}-D, batch {batch}, {channels} channels, size {size}, kernel {kernel}"
    reference = on_reference(chosen, torch.float64)
    compare(f"{title}, {EXPERTS} experts", contenders, reference)


if __name__ == "__main__":
    main(__file__, CASES, run)
