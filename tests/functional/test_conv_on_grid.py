"""Convolution at real positions, one list a dimension, against loops and other primitives."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from dynaconv.functional import conv_on_grid, deform_conv
from dynaconv.testing import close
from tests.slow import interpolated

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SIZES, OUT, TAPS = (9, 7, 6), (4, 5, 3), (3, 2, 2)
ranks = pytest.mark.parametrize("rank", [1, 2, 3])


def call(rank, groups=1, spread=12.0, batch=2):
    """Positions that leave the input on both sides now and then."""
    x = torch.randn(batch, 4, *SIZES[:rank], dtype=torch.float64)
    positions = [
        spread * torch.rand(batch, m, k, dtype=torch.float64) - 2
        for m, k in zip(OUT[:rank], TAPS[:rank], strict=True)
    ]
    weight = torch.randn(6, 4 // groups, *TAPS[:rank], dtype=torch.float64)
    return x, positions, weight, torch.randn(6, dtype=torch.float64)


@ranks
@pytest.mark.parametrize("groups", [1, 2])
def test_against_loops(rank, groups):
    x, positions, weight, bias = call(rank, groups)
    output = conv_on_grid(x, positions, weight, bias, groups)
    expected = torch.zeros(2, 6, *OUT[:rank], dtype=torch.float64)
    for n, o, p in product(range(2), range(6), product(*map(range, OUT[:rank]))):
        first = o // (6 // groups) * (4 // groups)
        total = bias[o].clone()
        for c, k in product(range(4 // groups), product(*map(range, TAPS[:rank]))):
            at = [float(t[n, i, j]) for t, i, j in zip(positions, p, k, strict=True)]
            total += weight[(o, c, *k)] * interpolated(x[n, first + c, None], at)[0]
        expected[(n, o, *p)] = total
    close(output, expected, "conv_on_grid")


@ranks
def test_whole_positions_are_the_static_convolution(rank):
    x, _, weight, bias = call(rank)
    grids = []
    for d, k in enumerate(TAPS[:rank]):
        length = (SIZES[d] + 2 - 2 * (k - 1) - 1) // 2 + 1
        grid = 2 * torch.arange(length)[:, None] + 2 * torch.arange(k) - 1
        grids.append(grid.double().expand(2, -1, -1))
    close(conv_on_grid(x, grids, weight, bias), CONV[rank](x, weight, bias, 2, 1, 2), "static")


@ranks
def test_is_the_deformable_convolution_with_these_offsets(rank):
    x, _, weight, bias = call(rank)
    sizes = [n - k + 1 for n, k in zip(SIZES[:rank], TAPS[:rank], strict=True)]
    positions = [
        3 * torch.rand(2, m, k).double() + torch.arange(m)[:, None]
        for m, k in zip(sizes, TAPS[:rank], strict=True)
    ]
    offsets = []
    for k in product(*map(range, TAPS[:rank])):
        for d in range(rank):
            shift = positions[d][:, :, k[d]] - torch.arange(sizes[d]) - k[d]
            along = [-1 if i == d else 1 for i in range(rank)]
            offsets.append(shift.reshape(2, *along).expand(2, *sizes))
    expected = deform_conv(x, torch.stack(offsets, 1), weight, bias)
    close(conv_on_grid(x, positions, weight, bias), expected, "deform_conv")


@ranks
def test_gradients(rank):
    x, positions, weight, bias = call(rank, batch=1)
    tensors = [x[:, :1], weight[:1, :1], bias[:1], *positions]
    tensors = [t.clone().requires_grad_() for t in tensors]
    run = lambda x, w, b, *t: conv_on_grid(x, t, w, b)
    assert torch.autograd.gradcheck(run, tensors)


def test_infinite_far_and_empty():
    x, positions, weight, bias = call(2)
    far = [t.clone() for t in positions]
    far[0][0, 0] = 1e12
    output = conv_on_grid(x, far, weight, bias)
    close(output[0, :, 0], bias[:, None].expand(-1, OUT[1]), "far outside is zero")
    empty = conv_on_grid(x[:0], [t[:0] for t in positions], weight, bias)
    assert empty.shape == (0, 6, *OUT[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_data_with_exact_positions(dtype):
    x, positions, weight, bias = call(2)
    output = conv_on_grid(
        x.to(dtype), [t.float() for t in positions], weight.to(dtype), bias.to(dtype)
    )
    assert output.dtype == dtype
    error = (output.double() - conv_on_grid(x, positions, weight, bias)).abs().max()
    assert error < {torch.float32: 1e-4}.get(dtype, 0.2)


def test_compiles_and_maps():
    x, positions, weight, bias = call(2)
    compiled = torch.compile(conv_on_grid, fullgraph=True, backend="aot_eager")
    close(
        compiled(x, positions, weight, bias), conv_on_grid(x, positions, weight, bias), "compiled"
    )
    mapped = torch.vmap(conv_on_grid, (0, 0, None, None))
    result = mapped(torch.stack([x, 2 * x]), [torch.stack([t, t]) for t in positions], weight, bias)
    close(result[1], conv_on_grid(2 * x, positions, weight, bias), "vmap")


@pytest.mark.parametrize(
    ("error", "text", "change"),
    [
        (ValueError, "2 lists of positions; give 1", {"positions": lambda t: t * 2}),
        (ValueError, r"positions\[0\] has shape", {"positions": lambda t: [t[0][:1]]}),
        (TypeError, "give floating point", {"positions": lambda t: [t[0].long()]}),
        (ValueError, "weight has shape", {"weight": lambda w: w[:, :1]}),
        (TypeError, "weight has dtype", {"weight": lambda w: w.float()}),
        (ValueError, "groups=3 does not divide", {"groups": lambda g: 3}),
        (ValueError, "input has shape", {"input": lambda x: x[0]}),
    ],
)
def test_refusals(error, text, change):
    x, positions, weight, bias = call(1)
    given = {"input": x, "positions": positions, "weight": weight, "bias": bias, "groups": 1}
    given |= {name: f(given[name]) for name, f in change.items()}
    with pytest.raises(error, match=text):
        conv_on_grid(**given)
