"""KernelWarehouse: formula, published outputs, sharing over a model, state, properties."""

import copy
import io
from itertools import product
from math import gcd, prod

import pytest
import torch
from torch import nn

import dynaconv
from dynaconv.layers.cells import Warehouse, one_to_one
from dynaconv.layers.kernel_warehouse import KernelWarehouseConv
from dynaconv.testing import close
from dynaconv.warehouse import share_kernels
from tests.layers.test_formulas import SIZES, everywhere, make, per_channel
from tests.layers.test_golden import cases, check, with_norm
from tests.slow import slow_conv

ranks = pytest.mark.parametrize("rank", [1, 2, 3])
RATIOS = {"in_ratio": 0.5, "out_ratio": 0.5}


def cls_of(rank):
    return dynaconv.families()["kernel_warehouse"].classes[rank]


def conv_nd(rank, *args, **kwargs):
    return [nn.Conv1d, nn.Conv2d, nn.Conv3d][rank - 1](*args, **kwargs).double()


def static_model(rank=2):
    torch.manual_seed(rank)
    return nn.Sequential(
        conv_nd(rank, 4, 8, 3, padding=1),
        nn.ReLU(),
        conv_nd(rank, 8, 4, 1, stride=2, bias=False),
        conv_nd(rank, 4, 8, 2, groups=2, padding=1),
    )


def converted(rank=2, **options):
    return dynaconv.convert(static_model(rank), "kernel_warehouse", **options).model


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, KernelWarehouseConv)]


def set_temperature(model, value):
    for layer in layers_of(model):
        layer.temperature.fill_(value)


def example(rank, channels=4):
    return torch.randn(2, channels, *SIZES[rank], dtype=torch.float64)


# Formula as slow loops ---------------------------------------------------------------------


def score(layer, x):
    """z (N, m, n + 1), without a basis."""
    hidden = layer.squeeze.bn(x.flatten(2).mean(2) @ layer.squeeze.fc.weight.T).clamp(min=0)
    return (hidden @ layer.scores.fc.weight.T + layer.scores.fc.bias).reshape(
        len(x), -1, len(layer.warehouse.cells) + 1
    )


def looped_kernel(layer, z, place):
    """The kernel of one sample, entry by entry; z (m, n + 1), place: beta's cell by mixture."""
    cells, tau, shape = layer.warehouse.cells, layer.temperature, layer.kernel_shape()
    c_out, c_in, *taps = cells.shape[1:]
    kernel = torch.zeros(shape, dtype=torch.float64)
    for o, c, *k in product(*map(range, shape)):
        tap = 0
        for index, length in zip(k, shape[2:], strict=True):
            tap = tap * length + index
        within = k if prod(taps) > 1 else [0] * len(k)
        tap = 0 if prod(taps) > 1 else tap
        i = (tap * (shape[0] // c_out) + o // c_out) * (shape[1] // c_in) + c // c_in
        total = z[i].abs().sum() + 1e-3
        for j, cell in enumerate(cells):
            alpha = (1 - tau) * z[i, j] / total + tau * float(place[i] == j)
            kernel[(o, c, *k)] += alpha * cell[(o % c_out, c % c_in, *within)]
    return kernel


@everywhere
@pytest.mark.parametrize(
    "options", [{}, RATIOS | {"budget": 2}, {"spatial_partition": False, "out_ratio": 0.5}]
)
def test_formula(rank, geometry, options):
    layer, x, loop = make("kernel_warehouse", rank, geometry, **options)
    layer.temperature.fill_(0.3)
    z = score(layer, x)
    place = [i * options.get("budget", 1) for i in range(z.shape[1])]
    with torch.no_grad():
        kernels = [looped_kernel(layer, z[n], place) for n in range(2)]
        expected = slow_conv(x, lambda n, p: kernels[n], **loop) + per_channel(layer.bias, rank)
    close(layer(x), expected, "KernelWarehouse")


@ranks
def test_formula_of_layers_that_share(rank):
    first, x, _ = make(
        "kernel_warehouse",
        rank,
        {"kernel_size": 2, "stride": 1, "padding": 1, "dilation": 1, "groups": 1},
    )
    model = nn.Sequential(first, cls_of(rank)(6, 4, 2, bias=False).double().eval())
    share_kernels(model)
    assert model[0].warehouse.cells.shape[1:] == (2, 2, *(1,) * rank)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
        set_temperature(model, 0.4)
        start = 0
        for layer, padding in zip(model, (1, 0), strict=True):
            z = score(layer, x)
            place = [start + i for i in range(z.shape[1])]
            start += z.shape[1]
            kernels = [looped_kernel(layer, z[n], place) for n in range(2)]
            expected = slow_conv(
                x,
                lambda n, p, k=kernels: k[n],
                (2,) * rank,
                (1,) * rank,
                (padding,) * rank,
                (1,) * rank,
            )
            if layer.bias is not None:
                expected += per_channel(layer.bias, rank)
            close(layer(x), expected, "a layer that shares")
            x = expected
    assert start == len(model[0].warehouse.cells)


# Published outputs -------------------------------------------------------------------------


@cases("kernel_warehouse")
def test_golden(case):
    config, state = case["config"], case["state"]
    rank = case["inputs"]["input"].dim() - 2
    renamed = {"in_planes": "in_channels", "out_planes": "out_channels"}
    model = nn.Sequential(
        *(
            cls_of(rank)(**{renamed.get(key, key): value for key, value in layer.items()})
            for layer in config["layers"]
        )
    )
    share_kernels(
        model,
        budget=config.get("cell_num_ratio", 1),
        in_ratio=config.get("cell_inplane_ratio", 1),
        out_ratio=config.get("cell_outplane_ratio", 1),
        spatial_partition=config.get("spatial_partition", True),
        basis_ratio=config.get("nonlocal_basis_ratio", 1),
    )
    set_temperature(model, config["temperature"])
    names = {}
    for i, layer in enumerate(model):
        theirs = f"net.{i}.attention"
        names[f"{i}.warehouse.cells"] = "manager.weights.0"
        names[f"{i}.squeeze.fc.weight"] = f"{theirs}.fc1.weight"
        names |= with_norm({f"{i}.squeeze.bn": f"{theirs}.norm1"})
        names[f"{i}.scores.fc.weight"] = f"{theirs}.fc2.weight"
        if layer.scores.basis is None:
            names[f"{i}.scores.fc.bias"] = f"{theirs}.fc2.bias"
        else:
            names[f"{i}.scores.basis.weight"] = f"{theirs}.fc3.weight"
            names[f"{i}.scores.bias"] = f"{theirs}.basis_bias"
        if layer.bias is not None:
            names[f"{i}.bias"] = f"net.{i}.bias"
    assert set(names.values()) == set(state)
    check(model, case, names)


# Assignment --------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 2, 4, 1 / 2, 1 / 3, 1 / 4])
def test_one_to_one(budget):
    """No cell has two mixtures; where there are cells enough every mixture has one."""
    for mixtures in (1, 5, 12, 24):
        places, count = one_to_one(mixtures, budget)
        given = [p for p in places if p >= 0]
        assert len(places) == mixtures
        assert len(set(given)) == len(given)
        assert all(p < count for p in given)
        if budget >= 1:
            assert len(given) == mixtures
            assert count == budget * mixtures
        else:
            assert len(given) == count
            assert set(given) == set(range(count))
            if mixtures % round(1 / budget) == 0:
                assert count == round(mixtures * budget)
    assert one_to_one(9, 1 / 3)[0] == [0, -1, -1, -1, 1, -1, -1, -1, 2]  # the diagonal


def test_cells_have_the_common_divisor():
    shapes = [(12, 8, 3, 3), (18, 20, 1, 1), (6, 4, 2, 3)]
    warehouse = Warehouse(shapes, budget=2, in_ratio=0.5)
    cell = (gcd(12, 18, 6), gcd(8, 20, 4) // 2)
    count = 2 * sum(map(prod, shapes)) // prod(cell)
    assert warehouse.cells.shape == (count, *cell, 1, 1)
    assert [s.first for s in warehouse.shares] == [0, *_running(s.own for s in warehouse.shares)]


def _running(counts):
    total, sums = 0, []
    for count in counts:
        total += count
        sums.append(total)
    return sums[:-1]


# Conversion and sharing --------------------------------------------------------------------


@ranks
@pytest.mark.parametrize(
    "options",
    [{}, {"budget": 3}, RATIOS, RATIOS | {"budget": 2}, {"spatial_partition": False}],
)
def test_convert_and_share_keep_the_function(rank, options):
    static = static_model(rank)
    model, x = converted(rank, **options), example(rank)
    close(model(x), static(x), "converted")
    if options.get("spatial_partition", True):
        share_kernels(model, **options)
        close(model(x), static(x), "sharing")
        share_kernels(model, out_ratio=0.5)
        close(model(x), static(x), "sharing again")
    set_temperature(model, 0.5)
    assert (model(x) - static(x)).abs().max() > 1e-3


@ranks
def test_half_the_budget(rank):
    """Half the parameters: mixtures that own a cell start from the kernel, the others from 0."""
    conv = conv_nd(rank, 4, 8, 2)
    with pytest.raises(ValueError, match="fewer cells"):
        cls_of(rank).from_conv(conv, budget=0.5)
    layer = cls_of(rank).from_conv(conv)
    share_kernels(nn.Sequential(layer), budget=0.5, out_ratio=0.5)
    assert layer.warehouse.cells.numel() * 2 == conv.weight.numel()
    x = example(rank)
    (made,) = layer.assemble(layer.kernels(x[:1])["attention"])
    kept = made != 0
    assert kept.sum() * 2 == conv.weight.numel()
    close(made[kept], conv.weight[kept], "cells kept")


def test_stages_and_names():
    model = nn.ModuleDict({"layer1": static_model(), "layer2": static_model()})
    model = dynaconv.convert(model, "kernel_warehouse").model
    one = share_kernels(model, dynaconv.select(stage="layer1"))
    two = share_kernels(model, r"layer2\.[02]")
    assert all(layer.warehouse is one for layer in layers_of(model["layer1"]))
    assert [layer.warehouse is two for layer in model["layer2"] if layers_of(layer)] == [1, 1, 0]
    assert "budget=1.0" in repr(model)
    assert "Warehouse((" in repr(model)


def test_a_shared_layer_counts_once():
    conv = conv_nd(2, 4, 4, 3, padding=1)
    model = dynaconv.convert(nn.Sequential(conv, conv), "kernel_warehouse").model
    assert len(share_kernels(model).shares) == 1
    assert model[0] is model[1]


# State over a model ------------------------------------------------------------------------


def shared_model(rank=2):
    model = converted(rank)
    share_kernels(model, budget=2, basis_ratio=0.1)
    set_temperature(model, 0.5)
    return model


def test_parameters_count_once_and_all_learn():
    model = shared_model()
    cells = layers_of(model)[0].warehouse.cells
    assert sum(p is cells for p in model.parameters()) == 1
    kernels = sum(p.numel() for n, p in static_model().named_parameters() if "weight" in n)
    assert cells.numel() == 2 * kernels
    before = model(example(2)).square().mean()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    before.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.any(), f"{name} does not learn"
    optimizer.step()
    assert all(layer.warehouse.cells is cells for layer in layers_of(model))


def test_state_survives():
    model, x = shared_model().eval(), example(2)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = converted()
    with pytest.raises(RuntimeError, match="size mismatch"):  # it does not share yet
        fresh.load_state_dict(model.state_dict())
    fresh = shared_model().eval()
    set_temperature(fresh, 0.9)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    close(fresh(x), model(x), "from the state_dict", 0)
    for copied in (copy.deepcopy(model), copy.deepcopy(model).to(torch.float32).double()):
        close(copied(x), model(x), "copied", 1e-5)
        first, *others = layers_of(copied)
        assert all(layer.warehouse is first.warehouse for layer in others)
        assert first.warehouse.cells is not layers_of(model)[0].warehouse.cells
        assert len(list(copied.parameters())) == len(list(model.parameters()))
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert layers_of(model.to("meta"))[0].warehouse.cells.is_meta


def test_padded_batch_through_a_shared_model():
    model = shared_model().eval()
    layer, x = model[0], example(2)
    mask = dynaconv.mask_from_sizes([[5, 6], [3, 4]], (5, 6))
    close(layer(x, mask)[1:, :, :3, :4], layer(x[1:, :, :3, :4]), "the shorter sample")


def test_annealing_ends_with_the_mixture():
    """From tau = 1, static, to tau = 0; the scores learn in between."""
    layer, x = converted()[0], example(2)
    first = layer.kernels(x)["attention"]
    assert torch.equal(first, layer.beta(first)[None, :, :-1].expand_as(first))
    layer.temperature.fill_(0)
    last = layer.kernels(x)["attention"]
    assert (last < 0).any()
    assert (last.abs().sum(2) < 1).all()
    layer.temperature.fill_(0.25)
    close(layer.kernels(x)["attention"], 0.75 * last + 0.25 * first, "in between")


@pytest.mark.filterwarnings("ignore")
def test_compile():
    model, x = shared_model().eval(), example(2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(x), model(x), "compiled")


def test_refusals():
    two, three = converted(2), converted(3)
    layer = cls_of(2)
    for text, call in (
        ("budget=1.5", lambda: layer(4, 4, 3, budget=1.5)),
        ("budget=0 ", lambda: layer(4, 4, 3, budget=0)),
        ("in_ratio=0.75 cuts 4", lambda: layer(4, 4, 3, in_ratio=0.75)),
        ("out_ratio=2 cuts 6", lambda: layer(4, 6, 3, out_ratio=2)),
        ("reduction=0", lambda: layer(4, 6, 3, reduction=0)),
        ("one tap only", lambda: share_kernels(two, spatial_partition=False)),
        ("basis_ratio=0", lambda: share_kernels(two, basis_ratio=0)),
        ("no KernelWarehouseConv", lambda: share_kernels(static_model())),
        ("no KernelWarehouseConv", lambda: share_kernels(two, "nothing")),
        ("dimensions cannot", lambda: share_kernels(nn.ModuleList([two, three]))),
        ("dtypes cannot", lambda: share_kernels(nn.ModuleList([two, converted(2).float()]))),
        ("devices cannot", lambda: share_kernels(nn.ModuleList([two, converted(2).to("meta")]))),
    ):
        with pytest.raises(ValueError, match=text):
            call()
