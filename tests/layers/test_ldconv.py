"""LDConv: formula, published outputs, properties."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dynaconv
from dynaconv.masking import mask_from_sizes
from dynaconv.testing import close
from dynaconv.testing.families import randomized
from tests.layers.test_formulas import everywhere, make, per_channel
from tests.layers.test_golden import cases, check
from tests.slow import interpolated, slow_conv

ranks = pytest.mark.parametrize("rank", [1, 2, 3])
borders = pytest.mark.parametrize("border", ["published", "clamp", "zeros"])
# Seven taps by rank, from the window's first position.
SEVEN = {
    1: [(0,), (1,), (2,), (3,), (4,), (5,), (6,)],
    2: [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)],
    3: [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0)],
}


def cls_of(rank):
    return dynaconv.families()["ldconv"].classes[rank]


def slow_offset(layer, x, geometry):
    """3x3 windows around the centres of the layer's; more of them than outputs at the ends."""
    k, s, p, d = (geometry[key] for key in ("kernel_size", "stride", "padding", "dilation"))
    rank = x.dim() - 2
    loop = {"kernel": 3, "stride": s, "padding": 1 + p - d * (k - 1) // 2, "dilation": 1}
    loop = {key: (value,) * rank for key, value in loop.items()}
    conv = layer.offset_conv
    made = slow_conv(x, lambda n, q: conv.weight.detach(), **loop)
    return made + per_channel(conv.bias.detach(), rank)


def sampled(x, position, border):
    """x (C, *L) at real numbers."""
    if border == "zeros":
        return interpolated(x, position)
    factor, moved = 1, []
    for q, length in zip(position, x.shape[1:], strict=True):
        factor *= 2 if border == "published" and not 0 <= q < length - 1 else 1
        moved.append(min(max(q, 0), length - 1))
    return factor * interpolated(x, moved)


def slow_ldconv(layer, x, geometry, grid, border):
    k, s, p, d = (geometry[key] for key in ("kernel_size", "stride", "padding", "dilation"))
    rank, groups = x.dim() - 2, geometry["groups"]
    offset = slow_offset(layer, x, geometry)
    size = [(length + 2 * p - d * (k - 1) - 1) // s + 1 for length in x.shape[2:]]
    y = torch.zeros(2, 6, *size, dtype=x.dtype)
    for n, q, (t, tap) in product(range(2), product(*map(range, size)), enumerate(grid)):
        shift = [offset[(n, i * len(grid) + t, *q)].item() for i in range(rank)]
        place = [i * s - p + d * g + o for i, g, o in zip(q, tap, shift, strict=True)]
        seen = sampled(x[n], place, border).reshape(groups, -1)
        kernel = layer.weight.detach()[:, :, t].unflatten(0, (groups, -1))
        y[(n, slice(None), *q)] += torch.cat([w @ v for w, v in zip(kernel, seen, strict=True)])
    return y + per_channel(layer.bias.detach(), rank)


@everywhere
@borders
@pytest.mark.parametrize("taps", [None, 7])
def test_ldconv(rank, geometry, border, taps):
    layer, x, _ = make("ldconv", rank, geometry, border=border, taps=taps)
    grid = SEVEN[rank] if taps else list(product(range(geometry["kernel_size"]), repeat=rank))
    close(layer(x), slow_ldconv(layer, x, geometry, grid, border), "LDConv")


@cases("ldconv")
def test_published_ldconv(case):
    config = case["config"]
    layer = dynaconv.LDConv2d(
        config["inc"],
        config["outc"],
        1,
        config["stride"],
        bias=bool(config["bias"]),
        taps=config["num_param"],
    )
    ours = {"conv.weight": "weight", "conv.bias": "bias"}
    names = {ours.get(key, key.replace("p_conv", "offset_conv")): key for key in case["state"]}
    check(layer, case, names)


@ranks
def test_the_grid_is_regular_first(rank):
    grid = lambda taps, k=1, d=1: cls_of(rank)(4, 6, k, dilation=d, taps=taps).grid.tolist()
    assert grid(7) == [list(tap) for tap in SEVEN[rank]]
    assert grid(7, d=2) == [[2 * i for i in tap] for tap in SEVEN[rank]]
    assert grid(1) == [[0] * rank]
    cube = [list(tap) for tap in product(range(4), repeat=rank)]
    assert grid(4**rank) == grid(None, 4) == cube


@ranks
@borders
def test_more_taps_than_the_kernel_need_no_padding(rank, border):
    """Any number of taps, outputs at every stride-th position: ceil(L / s) of them."""
    sizes = (1, 5, 6)[:rank]
    layer = cls_of(rank)(4, 6, 1, 3, taps=11, border=border)
    assert layer(torch.randn(2, 4, *sizes)).shape[2:] == (1, 2, 2)[:rank]


@ranks
@borders
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes_are_padded_input(rank, border, mode):
    arguments = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "stride": 2}
    options = {"border": border, "taps": 5}
    torch.manual_seed(rank)
    padding = (1, 2, 1)[:rank]
    layer = randomized(
        cls_of(rank), arguments | options | {"padding": padding, "padding_mode": mode}
    )
    unpadded = cls_of(rank)(**arguments, **options).double()
    unpadded.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, *(7, 6, 5)[:rank], dtype=torch.float64)
    around = [width for p in reversed(padding) for width in (p, p)]
    close(layer(x), unpadded(F.pad(x, around, mode=mode)), mode)


@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0), "dilation": (1, 3)},
        {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)},
        {"kernel_size": (2, 4), "padding": "valid", "dilation": 2, "groups": 2},
        {"kernel_size": 1, "stride": 3},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "bias": False},
        {"kernel_size": 2, "padding": (1, 2), "padding_mode": "circular"},
        {"kernel_size": (3, 4), "padding": "same", "padding_mode": "replicate", "dilation": 2},
    ],
)
def test_any_geometry_starts_as_the_static_convolution(geometry):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, **geometry).double()
    x = torch.randn(2, 4, 12, 13, dtype=torch.float64)
    layer = dynaconv.LDConv2d.from_conv(conv)
    close(layer(x), conv(x), "from_conv")
    layer(x).square().sum().backward()
    assert layer.offset_conv.weight.grad.any(), "the offset cannot learn"


@ranks
@borders
def test_samples_of_few_positions_in_a_padded_batch(rank, border):
    """Where the border lies is each sample's own."""
    geometry = {"kernel_size": 2, "padding": 1, "stride": 1, "dilation": 1, "groups": 1}
    layer, x, _ = make("ldconv", rank, geometry, border=border, taps=5)
    full = list(x.shape[2:])
    sizes = [[1] * rank, [2] * (rank - 1) + [full[-1]], [2] * rank, full]
    x = torch.cat([x, x.flip(0)])
    mask = mask_from_sizes(torch.tensor(sizes), full)
    output, out_mask = layer(x, mask), layer.output_mask(mask)
    for n, size in enumerate(sizes):
        alone = layer(x[(slice(n, n + 1), slice(None), *(slice(length) for length in size))])
        assert out_mask[n].sum() == alone[0, 0].numel()
        block = (slice(n, n + 1), slice(None), *(slice(length) for length in alone.shape[2:]))
        close(output[block], alone, f"a sample of size {size}")


@ranks
def test_offsets_are_constants_at_first(rank):
    torch.manual_seed(rank)
    x = torch.randn(2, 4, *(5,) * rank)
    offset = cls_of(rank)(4, 6, 1, taps=6, border="zeros").kernels(x)["offset"]
    first = offset[(slice(None), slice(None), *(0,) * rank)]
    assert (offset == per_channel(first, rank)).all()
    assert first.unique().numel() == 6 * rank
    assert first.abs().max() <= (4 * 3**rank) ** -0.5
    assert not cls_of(rank)(4, 6, 3, border="zeros", zero_offset=True).kernels(x)["offset"].any()


def test_the_published_border_counts_twice_in_each_dimension():
    layer = dynaconv.LDConv2d(1, 1, 1, bias=False, zero_offset=True)
    nn.init.ones_(layer.weight)
    expected = torch.tensor([[1.0, 1, 2], [1, 1, 2], [2, 2, 4]])
    assert (layer(torch.ones(1, 1, 3, 3)) == expected).all()
    assert (layer.kernels(torch.ones(1, 1, 3, 3))["modulation"] == expected).all()
    nn.init.constant_(layer.offset_conv.bias, -9)
    assert (layer(torch.ones(1, 1, 3, 3)) == 4).all()


def test_offsets_train_ten_times_slower():
    layer = dynaconv.LDConv2d(4, 6, 1, taps=5)
    rates = {
        id(parameter): group["lr"]
        for group in dynaconv.parameter_groups(layer, lr=1.0)
        for parameter in group["params"]
    }
    for name, parameter in layer.named_parameters():
        assert rates[id(parameter)] == (0.1 if name.startswith("offset_conv") else 1.0), name


def test_refusals():
    cls, conv = dynaconv.LDConv2d, nn.Conv2d(4, 6, 3)
    for error, text, call in (
        (ValueError, "taps=0 must be at least 1", lambda: cls(4, 6, 1, taps=0)),
        (TypeError, "taps=2.5 must be an int", lambda: cls(4, 6, 1, taps=2.5)),
        (ValueError, "border='reflect'; choose", lambda: cls(4, 6, 1, border="reflect")),
        (ValueError, "taps=5 are not those", lambda: cls.from_conv(conv, taps=5)),
        (ValueError, "only with border='zeros'", lambda: cls.from_conv(conv, border="clamp")),
        (ValueError, "zero_offset=True", lambda: cls.from_conv(conv, zero_offset=False)),
    ):
        with pytest.raises(error, match=text):
            call()
