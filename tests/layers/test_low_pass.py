"""The low frequencies of padded samples, as an operator, against each sample alone."""

import pytest
import torch

from dynaconv.layers import low_pass as module
from dynaconv.layers.low_pass import FILTERS, low_pass
from dynaconv.masking import crop, mask_from_sizes
from dynaconv.testing import close
from dynaconv.testing.families import SIZES

filters = pytest.mark.parametrize("name", ["adaptive_dilation", "fdconv", "fdconv_grid"])
ranks = pytest.mark.parametrize("rank", [1, 2, 3])


def batch(rank):
    size = torch.tensor(SIZES[rank])
    sizes = size - torch.arange(4).unsqueeze(1).clamp(max=3)
    sizes[3, 0] = 0
    mask = mask_from_sizes(sizes, SIZES[rank])
    x = torch.randn(4, 2, *SIZES[rank], dtype=torch.float64)
    return x.masked_fill(~mask.unsqueeze(1), 0), mask, sizes.tolist()


@filters
@ranks
def test_is_each_samples_own(name, rank):
    x, mask, sizes = batch(rank)
    for band, whole in zip((2.0, 3.0), low_pass(x, mask, (2.0, 3.0), name), strict=True):
        assert not whole.masked_select(~mask.unsqueeze(1)).any()
        for i, size in enumerate(sizes[:3]):
            alone = FILTERS[name](crop(x[i : i + 1], size), [band])[0]
            close(crop(whole[i : i + 1], size), alone, f"sample {i}")
        assert not whole[3].any()


@filters
@ranks
def test_gradients_to_any_order(name, rank):
    x, mask, _ = batch(rank)
    x, mask = x[:3, :1].requires_grad_(), mask[:3]
    run = lambda x: low_pass(x, mask, (2.5,), name)[0].sin()
    assert torch.autograd.gradcheck(run, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, x, fast_mode=True)


@filters
def test_is_a_proper_operator(name):
    x, mask, _ = batch(2)
    torch.library.opcheck(module._masked, (x.requires_grad_(), mask, 2.0, name))


@filters
def test_vmap(name):
    x, mask, _ = batch(2)
    run = lambda x, mask: low_pass(x, mask, (2.0,), name)[0]
    stacked = torch.stack([x, 2 * x + 1])
    loop = torch.stack([run(one, mask) for one in stacked])
    close(torch.vmap(run, (0, None))(stacked, mask), loop, "vmap")
    close(
        torch.vmap(run, (1, None), 1)(stacked.transpose(0, 1), mask), loop.transpose(0, 1), "dim 1"
    )
