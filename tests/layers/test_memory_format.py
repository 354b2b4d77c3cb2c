"""`to(memory_format=...)`, though torch refuses it for tensors with other axes than a kernel's."""

import copy

import pytest
import torch

from dynaconv.masking import Padded
from dynaconv.testing import close
from dynaconv.testing.families import example, randomized
from dynaconv.testing.features import cases

FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}
CASES = [(cls, arguments) for cls, arguments in cases(None) if cls.rank in FORMATS]


def output(layer, x):
    y = layer(x)
    return y.data if isinstance(y, Padded) else y


@pytest.mark.parametrize(("cls", "arguments"), CASES, ids=lambda v: getattr(v, "__name__", ""))
def test_channels_last_keeps_values_and_function(cls, arguments):
    layer, x = randomized(cls, arguments).eval(), example(cls, arguments)
    moved = copy.deepcopy(layer).to(memory_format=FORMATS[cls.rank])
    state = layer.state_dict()
    for name, tensor in moved.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    laid_out = x.contiguous(memory_format=FORMATS[cls.rank])
    close(output(moved, laid_out), output(layer, x), cls.__name__, 1e-9)


def test_stacked_kernels_are_laid_out_like_kernels():
    layer = randomized(*next(case for case in CASES if case[0].__name__ == "CondConv2d"))
    layer.to(memory_format=torch.channels_last)
    assert layer.weight[0].is_contiguous(memory_format=torch.channels_last)
    assert layer.weight.dim() == 5
    assert layer.half().weight.dtype == torch.float16
