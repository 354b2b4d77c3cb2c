"""ModulatedConv and FDConv: formula, published outputs, properties."""

from itertools import product
from math import cos, pi, prod, sin

import pytest
import torch
from torch import nn

import dynaconv
from dynaconv.masking import mask_from_sizes
from dynaconv.testing import close
from tests.layers.test_formulas import SIZES, everywhere, make, per_channel
from tests.layers.test_golden import cases, check, static, with_norm
from tests.slow import slow_conv

ranks = pytest.mark.parametrize("rank", [1, 2, 3])


def cls_of(name, rank):
    return dynaconv.families()[name].classes[rank]


def linear(layer, vectors):
    return vectors @ layer.weight.T + layer.bias


def channel_of(layer):
    """(o, c) -> the input channel that weight[o, c] reads."""
    out, into = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    return [[o // out * into + c for c in range(into)] for o in range(layer.out_channels)]


# ModulatedConv -----------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("gain", [True, False])
def test_modulated(rank, geometry, given, demodulate, gain):
    options = {"demodulate": demodulate, "gain": gain} | ({"style_channels": 5} if given else {})
    layer, x, loop = make("modulated", rank, geometry, **options)
    style = torch.randn(2, 5).double() if given else None
    s = linear(layer.affine, style if given else x.flatten(2).mean(2)).detach()
    weight, channels = layer.weight.detach(), channel_of(layer)
    kernels = []
    for n in range(2):
        kernel = torch.stack(
            [
                torch.stack([s[n, channels[o][c]] * w for c, w in enumerate(row)])
                for o, row in enumerate(weight)
            ]
        )
        for o in range(layer.out_channels):
            if demodulate:
                kernel[o] = kernel[o] / (kernel[o].square().sum() + 1e-8).sqrt()
            if gain:
                kernel[o] = kernel[o] * layer.gain[o].detach()
        kernels.append(kernel)
    expected = slow_conv(x, lambda n, p: kernels[n], **loop)
    close(layer(x, style=style), expected + per_channel(layer.bias, rank), "ModulatedConv")
    if given:
        close(layer(x[1], style=style[1]), layer(x, style=style)[1], "unbatched")


@cases("modulated")
def test_published_modulated(case):
    config, state = case["config"], case["state"]
    layer = dynaconv.ModulatedConv2d(
        config["in_channels"],
        config["out_channels"],
        **static(config),
        bias="bias" in state,
        demodulate=config["demodulate"],
        style_channels=config.get("style_channels"),
    ).double()
    names = ["weight"] + (["bias"] if layer.bias is not None else [])
    with torch.no_grad():
        for name in names:
            layer.get_parameter(name).copy_(state[name])
        if config["layer"] == "function":  # it is given the channels' factors
            layer.affine.weight.copy_(torch.eye(layer.in_channels))
            layer.affine.bias.zero_()
        else:
            layer.affine.weight.copy_(state["affine.weight"] * config["affine_weight_gain"])
            layer.affine.bias.copy_(state["affine.bias"] * config["affine_bias_gain"])
    x, style = (case["inputs"][key].clone().requires_grad_() for key in ("input", "style"))
    output = layer(x, style=style)
    close(output, case["output"], case["name"])
    output.backward(case["grad_output"])
    close(x.grad, case["grads"]["input"], "input gradient")
    close(style.grad, case["grads"]["style"], "style gradient")
    for name in names:
        close(layer.get_parameter(name).grad, case["grads"][f"weight:{name}"], f"{name} gradient")


@ranks
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_modulated_bears_any_style_in_half_precision(rank, scale):
    torch.manual_seed(rank)
    layer = cls_of("modulated", rank)(4, 6, 3, padding=1, style_channels=4).half()
    with torch.no_grad():
        layer.affine.weight.copy_(torch.eye(4))
        layer.affine.bias.zero_()
    x, style = 30 * torch.randn(2, 4, *SIZES[rank]).half(), (scale * torch.randn(2, 4)).half()
    output = layer(x, style=style)
    assert output.dtype == torch.float16
    exact = layer.double()(x.double(), style=style.double())
    close(output, exact, "float16", 1e-2)


@ranks
@pytest.mark.parametrize("groups", [1, 2])
def test_modulated_starts_as_the_static_convolution(rank, groups):
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][rank - 1](4, 6, 3, groups=groups).double()
    nn.init.zeros_(conv.weight[0])  # a dead channel stays one
    x = torch.randn(2, 4, *(length + 2 for length in SIZES[rank]), dtype=torch.float64)
    cls = cls_of("modulated", rank)
    for options in ({}, {"demodulate": False}, {"demodulate": False, "gain": False}):
        layer = cls.from_conv(conv, **options)
        close(layer(x), conv(x), f"from_conv {options}")
        layer(x).square().sum().backward()
        assert layer.affine.weight.grad.any(), "the style cannot learn"
    with pytest.raises(ValueError, match="unit norm"):
        cls.from_conv(conv, gain=False)


@ranks
def test_causal_and_transposed_layers_take_a_style(rank):
    torch.manual_seed(rank)
    style = torch.randn(2, 3).double()
    wide = dynaconv.families()["modulated"].transposed[rank]
    layer = wide(4, 6, 3, stride=2, style_channels=3).double()
    x = torch.randn(2, 4, *SIZES[rank], dtype=torch.float64)
    made = layer.kernels(x, style=style)
    for n in range(2):
        scaled = layer.weight * per_channel(made["channel"][n], rank)
        scaled = scaled * per_channel(made["filter"][n], rank).unsqueeze(1)
        transpose = [nn.functional.conv_transpose1d, nn.functional.conv_transpose2d]
        transpose = [*transpose, nn.functional.conv_transpose3d][rank - 1]
        expected = transpose(x[n : n + 1], scaled.transpose(0, 1), layer.bias, 2)
        close(layer(x, style=style)[n : n + 1], expected, "transposed")
    if rank == 1:
        layer = cls_of("modulated", 1)(4, 6, 3, causal=True, style_channels=3).double()
        other = x.clone()
        other[..., 5:] += 1
        before, after = layer(x, style=style), layer(other, style=style)
        close(after[..., :5], before[..., :5], "causal")
        assert (after - before)[..., 5:].abs().min() > 0


# FDConv ------------------------------------------------------------------------------------


def frequency(index, count):
    """Cycles per entry, -1/2 included, 1/2 not."""
    return (index - count if 2 * index >= count else index) / count


def mixed(layer, coefficients):
    """The kernel of sum_e coefficients_e S_e: a sum of waves, one for each frequency."""
    rows, columns = layer._matrix_shape()
    entries = columns // 2 + 1
    spectrum = torch.view_as_complex(layer.spectrum.detach()) * layer.scale
    # In float32, where rounding decides some ties.
    along = torch.fft.fftfreq(rows), torch.fft.rfftfreq(columns)
    distance = torch.stack(torch.meshgrid(*along, indexing="ij"), -1).norm(dim=-1)
    order = sorted(product(range(rows), range(entries)), key=lambda place: distance[place].item())
    bounds = [0]
    for e in range(layer.experts):
        more = rows * entries // layer.experts + (e < rows * entries % layer.experts)
        bounds.append(bounds[-1] + more)
    matrix = torch.zeros(rows, columns, dtype=torch.float64)
    r, c = torch.arange(rows).double().unsqueeze(1), torch.arange(columns).double()
    for e, factor in enumerate(coefficients):
        for i, j in order[bounds[e] : bounds[e + 1]]:
            twice = 1 if j == 0 or 2 * j == columns else 2  # the conjugate half
            phase = 2 * pi * (i * r / rows + j * c / columns)
            wave = spectrum[i, j].real * phase.cos() - spectrum[i, j].imag * phase.sin()
            matrix += factor * twice * wave / (rows * columns)
    out_channels, channels, *taps = layer.kernel_shape()
    kernel = torch.zeros(layer.kernel_shape(), dtype=torch.float64)
    for o, k in product(range(out_channels), product(*map(range, taps))):
        row = o
        for index, count in zip(k[:-1], taps[:-1], strict=True):
            row = row * count + index
        for i in range(channels):
            kernel[(o, i, *k)] = matrix[row, i * taps[-1] + k[-1]]
    return kernel


def low_pass(x, band, grid):
    """x (N, C, *L) with the frequencies that count as at most 1 / (2 band), as sums of waves."""
    rank, shape = x.dim() - 2, x.shape[2:]

    def known(index, length, last):
        if not grid:
            return abs(frequency(index, length))
        if last:
            entries = length // 2 + 1
            return (index * 33 // entries) / 64
        return abs(frequency(index * 64 // length, 64))

    def below(f):  # rounding decides at the limit
        f, limit = torch.tensor([f, 0.5 / band + (1e-8 if grid else 0)])
        return bool(f < limit)

    low = torch.zeros_like(x)
    places = list(product(*map(range, shape)))
    for f in product(*map(range, shape[:-1]), range(shape[-1] // 2 + 1)):
        inside = all(
            below(known(i, length, d == rank - 1))
            for d, (i, length) in enumerate(zip(f, shape, strict=True))
        )
        if not inside:
            continue
        twice = 1 if f[-1] == 0 or 2 * f[-1] == shape[-1] else 2
        turns = [sum(i * p / n for i, p, n in zip(f, q, shape, strict=True)) for q in places]
        wave_c = torch.tensor([cos(2 * pi * t) for t in turns], dtype=x.dtype).reshape(shape)
        wave_s = torch.tensor([sin(2 * pi * t) for t in turns], dtype=x.dtype).reshape(shape)
        over = tuple(range(2, x.dim()))
        a = (x * wave_c).sum(over, keepdim=True)
        b = (x * wave_s).sum(over, keepdim=True)
        low += twice / prod(shape) * (a * wave_c + b * wave_s)
    return low


def banded(modulate, x):
    rank = x.dim() - 2
    loop = dict.fromkeys(("stride", "padding", "dilation"), (1,) * rank)
    lows = [x, *(low_pass(x, band, modulate.grid) for band in modulate.bands)]
    total = torch.zeros_like(x)
    for i, above in enumerate(lows):
        part = above - lows[i + 1] if i + 1 < len(lows) else above
        gate = 1.0
        if i < len(modulate.convs):
            weight = modulate.convs[i].weight.detach()
            logits = slow_conv(x, lambda n, p, w=weight: w, kernel=(3,) * rank, **loop)
            gate = 2 * torch.sigmoid(logits + modulate.convs[i].bias.detach())
        total += gate * part
    return total


FDCONV_OPTIONS = [
    {},
    {"experts": 3, "low_band": True, "bands": (2, 3), "band_grid": False, "temperature": 2.0},
    {"experts": 1, "local_gates": False, "bands": ()},
    {"experts": 2, "global_gates": False, "bands": ()},
]


@everywhere
@pytest.mark.parametrize("options", FDCONV_OPTIONS, ids=["default", "bands", "global", "local"])
def test_fdconv(rank, geometry, options):
    layer, x, loop = make("fdconv", rank, geometry, **options)
    mean = x.flatten(2).mean(2)
    gates = {}
    if layer.squeeze is not None:
        hidden = layer.squeeze.bn(mean @ layer.squeeze.fc.weight.T).clamp(min=0)
        hidden = (layer.act_scale * hidden**2 + layer.act_bias).detach()
        for name in ("kernel", "channel", "filter", "spatial"):
            head = getattr(layer, f"{name}_fc")
            if head is not None:
                logits = linear(head, hidden) / options.get("temperature", 1)
                gates[name] = 2 * torch.sigmoid(logits).detach()
    assert ("kernel" in gates) == (layer.experts > 1)
    assert ("spatial" in gates) == options.get("global_gates", True)
    channels, taps = channel_of(layer), prod(loop["kernel"])

    def kernel_of(n):
        kernel = mixed(layer, gates["kernel"][n] if "kernel" in gates else [1.0]).flatten(2)
        normal = (mean[n] - mean[n].mean()) / (mean[n].var(correction=0) + 1e-5).sqrt()
        if layer.local is not None:
            normal = (normal * layer.local.norm.weight + layer.local.norm.bias).detach()
        for o, c, k in product(*map(range, kernel.shape)):
            i = channels[o][c]
            for name, index in (("channel", i), ("filter", o), ("spatial", k)):
                kernel[o, c, k] *= gates[name][n, index] if name in gates else 1
            if layer.local is not None:
                row = layer.local.weight.detach()[o * taps + k]
                seen = range(i - len(row) // 2, i + len(row) // 2 + 1)
                logit = sum(w * normal[j] for w, j in zip(row, seen, strict=True) if 0 <= j < 4)
                kernel[o, c, k] *= 2 / (1 + torch.exp(-logit))
        return kernel.unflatten(2, loop["kernel"])

    kernels = [kernel_of(n) for n in range(2)]
    seen = x if layer.modulate is None else banded(layer.modulate, x)
    expected = slow_conv(seen, lambda n, p: kernels[n], **loop)
    close(layer(x), expected + per_channel(layer.bias, rank), "FDConv")


@cases("fdconv")
def test_published_fdconv(case):
    config = case["config"]
    experts = config.get("kernel_num", 4) or config["out_channels"] // 2
    temperature = config.get("kernel_temp", 1.0)
    if "kernel_num" in config and config["kernel_num"] is None:
        temperature = experts**0.5
    bands = config.get("fbm_cfg", {})
    layer = dynaconv.FDConv2d(
        config["in_channels"],
        config["out_channels"],
        **static(config),
        bias=config.get("bias", True),
        experts=experts,
        temperature=temperature,
        global_gates=not config.get("ksm_only_kernel_att", False),
        local_gates=config.get("use_ksm_local", True),
        bands=() if "use_fbm_if_k_in" in config else bands.get("k_list"),
        low_band=bands.get("lowfreq_att", False),
    )
    layer.temperature = torch.tensor(temperature, dtype=torch.float64)
    names = {"spectrum": "dft_weight"} | ({"bias": "bias"} if layer.bias is not None else {})
    names |= {"squeeze.fc.weight": "KSM_Global.fc.weight"}
    names |= with_norm({"squeeze.bn": "KSM_Global.bn"})
    names |= {f"act_{key}": f"KSM_Global.relu.{key}" for key in ("scale", "bias")}
    pairs = {
        f"{name}_fc": f"KSM_Global.{name}_fc"
        for name in ("kernel", "channel", "filter", "spatial")
        if getattr(layer, f"{name}_fc") is not None
    }
    if layer.local is not None:
        names["local.weight"] = "KSM_Local.conv.weight"
        pairs["local.norm"] = "KSM_Local.norm"
    for i in range(len(layer.modulate.convs) if layer.modulate else 0):
        pairs[f"modulate.convs.{i}"] = f"FBM.freq_weight_conv_list.{i}"
    for ours, theirs in pairs.items():
        names |= {f"{ours}.{key}": f"{theirs}.{key}" for key in ("weight", "bias")}
    assert set(names.values()) == set(case["state"])
    check(layer, case, names)


@ranks
@pytest.mark.parametrize(
    "geometry",
    [(4, 6, 3, 1, 1, 1, 2), (4, 4, 5, 2, 2, 1, 4), (3, 2, 4, 1, 0, 1, 1), (1, 3, 1, 1, 0, 1, 1)],
)
def test_fdconv_starts_as_the_static_convolution(rank, geometry):
    torch.manual_seed(rank)
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][rank - 1](*geometry).double()
    x = torch.randn(2, geometry[0], *(length + 3 for length in SIZES[rank]), dtype=torch.float64)
    layer = cls_of("fdconv", rank).from_conv(conv)
    close(layer(x), conv(x), "from_conv")
    layer(x).square().sum().backward()
    for head in (layer.kernel_fc, layer.channel_fc, layer.local):
        assert head.weight.grad.any() or geometry[0] == 1, "a head cannot learn"


@ranks
def test_the_parts_of_a_spectrum_are_disjoint_and_add_up(rank):
    layer = cls_of("fdconv", rank)(4, 6, 3, experts=5).double()
    kernels = layer.kernel_of(
        torch.stack([layer.spectrum * (layer.part == e).unsqueeze(-1) for e in range(5)])
    )
    whole = layer.kernel_of(layer.spectrum.unsqueeze(0))
    close(kernels.sum(0, keepdim=True), whole, "the sum of the parts")
    counts = layer.part.flatten().bincount()
    assert counts.max() - counts.min() <= 1
    rows = torch.fft.fftfreq(layer.part.shape[0]).unsqueeze(1)
    distance = (rows**2 + torch.fft.rfftfreq(layer._matrix_shape()[1]) ** 2).sqrt()
    for e in range(4):
        assert distance[layer.part == e].max() <= distance[layer.part == e + 1].min()


@ranks
def test_fdconv_takes_the_spectrum_of_each_sample(rank):
    torch.manual_seed(rank)
    geometry = {"kernel_size": 3, "padding": 1, "stride": 1, "dilation": 1, "groups": 1}
    layer, x, _ = make("fdconv", rank, geometry)
    full = list(SIZES[rank])
    sizes = [[1] * rank, [2] * (rank - 1) + [full[-1]], [2] * rank, full]
    x = torch.cat([x, x.flip(0)])
    output = layer(x, mask_from_sizes(torch.tensor(sizes), full))
    for n, size in enumerate(sizes):
        block = (slice(n, n + 1), slice(None), *(slice(length) for length in size))
        close(output[block], layer(x[block]), f"a sample of size {size}")


def test_refusals():
    modulated, fdconv = dynaconv.ModulatedConv2d, dynaconv.FDConv2d
    x = torch.randn(2, 4, 5, 5)
    layer = modulated(4, 6, 3, style_channels=5)
    off = {"experts": 1, "global_gates": False, "local_gates": False, "bands": ()}
    for error, text, call in (
        (ValueError, "give style", lambda: layer(x)),
        (ValueError, "style has shape", lambda: layer(x, style=torch.randn(2, 4))),
        (ValueError, "style has shape", lambda: layer.kernels(x, style=torch.randn(3, 5))),
        (TypeError, "style has dtype", lambda: layer(x, style=torch.ones(2, 5).long())),
        (ValueError, "style_channels=0", lambda: modulated(4, 6, 3, style_channels=0)),
        (ValueError, "nothing that follows", lambda: fdconv(4, 6, 3, **off)),
        (ValueError, "experts=0", lambda: fdconv(4, 6, 3, experts=0)),
        (ValueError, "temperature=0", lambda: fdconv(4, 6, 3, temperature=0)),
        (ValueError, "no causal form", lambda: dynaconv.FDConv1d(4, 6, 3, causal=True, bands=(2,))),
    ):
        with pytest.raises(error, match=text):
            call()
