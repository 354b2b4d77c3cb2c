"""torch.func, forward mode, double backward and checkpointing, for every class of every family."""

import pytest
import torch

import dynaconv
from dynaconv.layers.attention import SafeBatchNorm
from dynaconv.testing import close
from dynaconv.testing.families import example, randomized
from dynaconv.testing.features import check_feature
from tests.features.cases import over_families

# torch runs what it has no batching rule for in a loop, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


@over_families("vmap", samples=None)
def test_vmap(cls, arguments):
    check_feature("vmap", cls, arguments)


@over_families("jvp", samples=None)
def test_forward_mode(cls, arguments):
    check_feature("jvp", cls, arguments)


@over_families("double_backward", samples=None)
def test_double_backward(cls, arguments):
    check_feature("double_backward", cls, arguments)


@over_families("checkpoint", samples=None)
def test_checkpointing(cls, arguments):
    check_feature("checkpoint", cls, arguments)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_one_sample_through_a_batch_norm(shape, stride, training):
    """Under a gradient whose channels lie together, torch's own backward is wrong."""
    norm = SafeBatchNorm(2).double().train(training)
    x = torch.randn(1, 2, *shape, dtype=torch.float64, requires_grad=True)
    together = torch.randn(1, *shape, 2, dtype=torch.float64).movedim(-1, 1)
    upstream = together.as_strided(together.shape, (stride, *together.stride()[1:]))
    expected = torch.autograd.grad(norm(x), x, together.contiguous())
    close(torch.autograd.grad(norm(x), x, upstream)[0], expected[0], "gradient")


@pytest.mark.parametrize("family", ["shapeconv", "flexconv"])
def test_transforms_leave_no_trace(family):
    """What torch.func makes does not come back out of a cache."""
    cls = dynaconv.families()[family].classes[1]
    for arguments in cls.samples(1):
        layer, x = randomized(cls, arguments), example(cls, arguments)
        expected = layer(x)
        for _ in range(2):
            torch.func.grad(lambda x, layer=layer: layer(x).sin().sum())(x)
            close(layer(x), expected, f"{layer} after a transform")
