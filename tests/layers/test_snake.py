"""Dynamic snake convolution: formula, published outputs, exact start, refusals."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dynaconv
from dynaconv.testing import close
from tests.layers.test_formulas import GEOMETRIES, make, per_channel
from tests.layers.test_golden import cases, check, with_norm
from tests.slow import interpolated, value_at

ranks = pytest.mark.parametrize("rank", [2, 3])
CONVS = {2: nn.Conv2d, 3: nn.Conv3d}


def cls_of(rank):
    return dynaconv.families()["snake"].classes[rank]


# The formula -------------------------------------------------------------------------------


def normalised(norm, made):
    """A group norm, or a batch norm in evaluation, of made (N, C, *L)."""
    rank = made.dim() - 2
    if isinstance(norm, nn.GroupNorm):
        groups = made.reshape(len(made), norm.num_groups, -1)
        mean, variance = groups.mean(2, keepdim=True), groups.var(2, correction=0, keepdim=True)
        normal = ((groups - mean) / (variance + 1e-5).sqrt()).reshape(made.shape)
    else:
        centred = made - per_channel(norm.running_mean, rank)
        normal = centred / (per_channel(norm.running_var, rank) + 1e-5).sqrt()
    return normal * per_channel(norm.weight, rank) + per_channel(norm.bias, rank)


def steps_of(layer, x, centres):
    """d (N, D, taps, *L_out); centres: output position -> the window's centre."""
    size = [1 + max(axis) for axis in zip(*centres, strict=True)]
    conv, rank = layer.offset_conv, x.dim() - 2
    made = torch.zeros(len(x), len(conv.bias), *size, dtype=x.dtype)
    for n, (p, centre) in product(range(len(x)), centres.items()):
        total = conv.bias.clone()
        for t in product(range(3), repeat=rank):
            place = [c + i - 1 for c, i in zip(centre, t, strict=True)]
            total += conv.weight[(slice(None), slice(None), *t)] @ value_at(x[n], place)
        made[(n, slice(None), *p)] = total
    return torch.tanh(normalised(layer.norm, made)).unflatten(1, (rank, -1))


@torch.no_grad()
def slow_snake(layer, x, geometry, axis, scope, clamp):
    k, s, p, d = (geometry[key] for key in ("kernel_size", "stride", "padding", "dilation"))
    rank, groups, middle = x.dim() - 2, geometry["groups"], (k - 1) // 2
    size = [(length + 2 * p - d * (k - 1) - 1) // s + 1 for length in x.shape[2:]]
    centres = {q: [i * s - p + d * (k - 1) // 2 for i in q] for q in product(*map(range, size))}
    steps = steps_of(layer, x, centres)
    weight = layer.weight.flatten(2).unflatten(0, (groups, -1))
    y = torch.zeros(len(x), 6, *size, dtype=x.dtype)
    for n, (q, centre), i in product(range(len(x)), centres.items(), range(k)):
        passed = range(i, middle) if i < middle else range(middle + 1, i + 1)
        place = [
            c + scope * float(sum(steps[(n, dim, j, *q)] for j in passed))
            for dim, c in enumerate(centre)
        ]
        place[axis] = q[axis] * s - p + d * i
        if clamp:
            place = [min(max(0, c), len_ - 1) for c, len_ in zip(place, x.shape[2:], strict=True)]
        seen = interpolated(x[n], place).reshape(groups, -1)
        y[(n, slice(None), *q)] += torch.cat(
            [w[..., i] @ v for w, v in zip(weight, seen, strict=True)]
        )
    return y + per_channel(layer.bias, rank)


@ranks
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(
    ("axis", "border", "norm"),
    [(0, "clamp", "group"), (1, "zeros", "group"), (1, "clamp", "batch"), (0, "zeros", "batch")],
)
def test_formula(rank, geometry, axis, border, norm):
    options = {"axis": axis, "extend_scope": 1.7, "border": border, "norm": norm}
    layer, x, _ = make("snake", rank, geometry, **options)
    expected = slow_snake(layer, x, geometry, axis, 1.7, border == "clamp")
    close(layer(x), expected, "snake")


@ranks
def test_other_padding_modes_see_the_padded_input(rank):
    geometry = {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1, "groups": 1}
    for border in ("clamp", "zeros"):
        layer, x, _ = make("snake", rank, geometry, border=border, padding_mode="reflect")
        padded = F.pad(x, (1, 1) * rank, mode="reflect")
        expected = slow_snake(
            layer, padded, geometry | {"padding": 0}, rank - 1, 1, border == "clamp"
        )
        close(layer(x), expected, "snake with reflected input")


# Published outputs -------------------------------------------------------------------------

# Which of the six parts of the published 3-D offset, by `morph`, ours are; the axis's is unused.
PARTS = {0: (0, 1, 2), 1: (3, 1, 2), 2: (3, 4, 5)}


def our_parts(case):
    """The 3-D case with the offset's channels that serve its axis, in our order."""
    parts = torch.tensor(PARTS[case["config"]["morph"]])
    used = lambda name, t: (
        t.unflatten(0, (6, -1))[parts].flatten(0, 1)
        if name.removeprefix("weight:").startswith(("offset_conv.", "bn."))
        else t
    )
    change = lambda tensors: {name: used(name, t) for name, t in tensors.items()}
    return case | {key: change(case[key]) for key in ("state", "grads")}


@cases("snake")
def test_published(case):
    config = case["config"]
    k, morph = config["kernel_size"], config["morph"]
    rank = case["inputs"]["input"].dim() - 2
    layer = cls_of(rank)(
        config["in_channels"],
        config["out_channels"],
        k,
        padding=k // 2 if rank == 2 else 0,  # recorded where published 3-D meets no border
        axis=-1 - morph,
        extend_scope=config["extend_scope"],
        if_offset=config.get("if_offset", True),
    )
    chain = ("dsc_conv_" if rank == 2 else "dcn_conv_") + "xyz"[morph]
    names = {key: f"{chain}.{key}" for key in ("weight", "bias")}
    if layer.offset_conv is not None:
        names |= {f"offset_conv.{key}": f"offset_conv.{key}" for key in ("weight", "bias")}
        if rank == 2:
            names |= {f"norm.{key}": f"gn_offset.{key}" for key in ("weight", "bias")}
        else:
            names, case = names | with_norm({"norm": "bn"}), our_parts(case)
        if rank == 3 and morph == 2:  # recorded without the swing of the centre, but for this
            for key in ("weight", "bias"):
                case["grads"][f"weight:bn.{key}"][k + k // 2] = 0
    check(layer, case, names)


# The start ---------------------------------------------------------------------------------


@ranks
@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": 3, "padding": 1, "stride": 2, "groups": 2},
        {"kernel_size": 4, "padding": "same", "dilation": 3},
        {"kernel_size": 5, "padding": 2, "padding_mode": "circular"},
        {"kernel_size": 2, "padding": 0},
    ],
)
def test_starts_as_a_straight_convolution(rank, geometry):
    torch.manual_seed(rank)
    x = torch.randn(2, 4, *(8, 9, 7)[:rank], dtype=torch.float64)
    for axis in range(rank):
        size = tuple(geometry["kernel_size"] if d == axis else 1 for d in range(rank))
        conv = CONVS[rank](4, 6, **geometry | {"kernel_size": size}).double()
        layer = cls_of(rank).from_conv(conv)
        assert layer.axis == axis
        close(layer(x), conv(x), "from_conv")
        layer(x).square().sum().backward()
        assert layer.norm.bias.grad.any(), "the offset cannot learn"


def test_clamped_start_without_padding():
    conv = nn.Conv2d(4, 6, (1, 3)).double()
    x = torch.randn(2, 4, 5, 6).double()
    close(dynaconv.SnakeConv2d.from_conv(conv, border="clamp")(x), conv(x), "from_conv")


@ranks
def test_straight(rank):
    torch.manual_seed(rank)
    x = torch.randn(2, 4, *(6, 7, 5)[:rank], dtype=torch.float64)
    layer = cls_of(rank)(4, 6, 3, padding=1, if_offset=False, border="zeros").double()
    assert set(dict(layer.named_parameters())) == {"weight", "bias"}
    static = [F.conv2d, F.conv3d][rank - 2]
    close(
        layer(x), static(x, layer.weight, layer.bias, 1, (*(0,) * (rank - 1), 1)), "straight chain"
    )


@ranks
def test_offset(rank):
    layer = cls_of(rank)(4, 6, 5, padding=2, axis=0, border="zeros").bfloat16()
    x = torch.randn(2, 4, *(6, 7, 5)[:rank]).bfloat16()
    offset = layer.kernels(x)["offset"]
    assert offset.dtype == torch.float32
    offset = offset.unflatten(1, (5, rank))
    assert not offset[:, :, 0].any(), "moved along the axis"
    assert not offset[:, 2].any(), "the centre moved"
    reach = offset[:, :, 1:].abs().amax((0, *range(2, offset.dim())))
    assert (reach <= torch.tensor([2, 1, 0, 1, 2])).all()
    assert reach[0] > 1, "steps do not add up"


@ranks
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_padding_has_no_part_in_the_statistics(rank, norm):
    geometry = {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1, "groups": 1}
    layer, x, _ = make("snake", rank, geometry, norm=norm)
    padded, mask = dynaconv.pad_batch([x[0], torch.zeros(4, *[7] * rank, dtype=x.dtype)])
    alone, together = layer.train()(x[:1]), layer(padded[:1], mask[:1])
    size = tuple(slice(length) for length in x.shape[2:])
    close(together[(..., *size)], alone, "padded, in training")


def test_axis():
    axis = lambda size, **options: cls_of(3)(4, 6, size, **options).axis
    assert axis(3) == axis((2, 3, 3)) == 2
    assert axis((1, 5, 3)) == 1
    assert axis(3, axis=-3) == 0


def test_refusals():
    snake, straight = dynaconv.SnakeConv2d, nn.Conv2d(4, 6, (3, 1), padding=1)
    for text, call in (
        ("axis=2; give -2 ... 1", lambda: snake(4, 6, 3, axis=2)),
        ("border='wrap'", lambda: snake(4, 6, 3, border="wrap")),
        ("norm='layer'", lambda: snake(4, 6, 3, norm="layer")),
        ("extend_scope=0", lambda: snake(4, 6, 3, extend_scope=0)),
        ("chain of one tap", lambda: snake(4, 6, 1)),
        ("chain of one tap", lambda: snake(4, 6, (1, 3), axis=0)),
        ("in the other dimensions", lambda: snake.from_conv(nn.Conv2d(4, 6, 3))),
        ("spans 9 positions", lambda: snake(4, 6, 9, padding=1)(torch.zeros(1, 4, 6, 9))),
        ("border='zeros' starts as it", lambda: snake.from_conv(straight, border="clamp")),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    assert not hasattr(dynaconv, "SnakeConv1d")
