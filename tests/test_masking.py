"""Masks from sizes and back, and through convolutions."""

import copy

import pytest
import torch
from torch.nn import functional as F

import dynaconv
from dynaconv.layers.attention import SafeBatchNorm
from dynaconv.masking import check_mask, mask_from_sizes, masked_mean, output_mask, sizes_from_mask
from dynaconv.shapes import Geometry
from dynaconv.testing import close


@pytest.mark.parametrize("shape", [(7,), (5, 6), (4, 3, 5)])
def test_sizes_round_trip(shape):
    sizes = torch.stack([torch.randint(1, n + 1, (6,)) for n in shape], 1)
    mask = mask_from_sizes(sizes, shape)
    assert mask.shape == (6, *shape)
    assert mask.flatten(1).sum(1).tolist() == sizes.prod(1).tolist()
    assert sizes_from_mask(mask).tolist() == sizes.tolist()


def test_mask_from_sizes_refuses():
    with pytest.raises(ValueError, match="sizes have 1 dimensions, shape has 2"):
        mask_from_sizes([1, 2], (3, 3))


@pytest.mark.parametrize(
    "geometry", [Geometry((3,), (2,), (1,), (1,)), Geometry((4,), (3,), (0,), (2,))]
)
def test_output_mask_is_each_samples_own_size(geometry):
    lengths = list(range(1, 20))
    mask = output_mask(mask_from_sizes(lengths, (20,)), geometry)
    for row, length in zip(mask, lengths, strict=True):
        padded = length + 2 * geometry.padding[0]
        span = geometry.dilation[0] * (geometry.kernel[0] - 1) + 1
        alone = 0
        if padded >= span:
            x = torch.ones(1, 1, length)
            alone = F.conv1d(
                x, torch.ones(1, 1, *geometry.kernel), None, *(g[0] for g in geometry[1:])
            ).shape[-1]
        assert row.tolist() == [i < alone for i in range(mask.shape[1])]


def test_masked_mean_without_real_positions_is_zero():
    x = torch.zeros(1, 2, 3)
    assert masked_mean(x, torch.zeros(1, 3).bool()).tolist() == [[0, 0]]


def test_check_mask():
    x = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match=r"padding_mask has shape \(2, 3\); give \(2, 4\)"):
        check_mask(torch.ones(2, 3).bool(), x)
    with pytest.raises(TypeError, match=r"padding_mask has dtype torch\.int64; give bool"):
        check_mask(torch.ones(2, 4).long(), x)
    with pytest.raises(ValueError, match="padding_mask is on meta, input on cpu"):
        check_mask(torch.ones(2, 4, device="meta").bool(), x)


@pytest.mark.parametrize("family", ["odconv", "kernel_warehouse", "fdconv", "selective_kernel"])
def test_a_sample_of_no_size_leaves_no_trace_in_training(family):
    cls = dynaconv.families()[family].classes[2]
    layer = cls(4, 6, 3, padding=1).double().train()
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 4, 7, 8, dtype=torch.float64)
    mask = mask_from_sizes([[7, 8], [5, 6], [0, 0]], (7, 8))
    output, expected = layer(x, mask)[:2], twin(x[:2], mask[:2])
    close(output, expected, family)
    for (name, ours), theirs in zip(layer.named_buffers(), twin.buffers(), strict=True):
        close(ours.double(), theirs.double(), f"{family}, {name}")


class TestSafeBatchNorm:
    def test_is_batch_norm_otherwise(self):
        ours, theirs = SafeBatchNorm(3).train(), torch.nn.BatchNorm1d(3).train()
        for _ in range(3):
            x = torch.randn(4, 3, 5)
            torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))

    def test_one_value_a_channel(self):
        norm = SafeBatchNorm(3).train()
        x = torch.randn(1, 3)
        with pytest.raises(ValueError, match="Expected more than 1 value"):
            torch.nn.BatchNorm1d(3)(x)
        before = norm.running_mean.clone()
        torch.testing.assert_close(norm(x), norm.eval()(x))
        assert torch.equal(norm.running_mean, before)
        assert norm(x[:0]).shape == (0, 3)

    def test_mask_gives_the_statistics_of_real_positions(self):
        x = torch.randn(3, 2, 6)
        mask = mask_from_sizes([6, 2, 4], (6,))
        ours, theirs = SafeBatchNorm(2).train(), torch.nn.BatchNorm1d(2).train()
        real = x.transpose(1, 2)[mask]
        torch.testing.assert_close(ours(x, mask).transpose(1, 2)[mask], theirs(real))
        torch.testing.assert_close(ours.running_var, theirs.running_var)
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
