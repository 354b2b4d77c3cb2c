"""load_published: the outputs recorded from published code, by its own keys; refusals name all."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynaconv
from dynaconv.published import SOURCES
from dynaconv.testing import close
from dynaconv.testing.families import randomized
from tests.layers import test_golden as golden
from tests.layers import test_lightconv as light
from tests.layers.test_golden import GOLDEN
from tests.layers.test_upsample import carafe

MODELS = {
    case["name"]: case for case in torch.load(GOLDEN / "published.pt", weights_only=True)["cases"]
}


def recorded():
    """(source, layer or model, recorded case) of all single layers."""
    builders = {
        "odconv": ("odconv", lambda case: golden.odconv(case["config"])),
        "involution": ("involution", lambda case: golden.involution(case["config"])),
        "deform_conv": ("mmcv", lambda case: golden.deform_pack(case["config"])),
        "lightconv": ("fairseq", lambda case: light.published(case)[0]),
        "selective_kernel": ("timm", lambda case: golden.selective_kernel(case["config"])),
        "carafe": ("mmcv", lambda case: carafe(case["config"])),
        "switchable_atrous": ("mmcv", lambda case: switchable_atrous(case["config"])),
        "condconv": (
            "timm",
            lambda case: nn.ModuleDict({"conv": golden.condconv(case["config"])}),
        ),
    }
    for file, (source, build) in builders.items():
        for case in torch.load(GOLDEN / f"{file}.pt", weights_only=True)["cases"]:
            if case["state"] and (file != "condconv" or case["name"] == "routing"):
                yield pytest.param(source, build(case), case, id=f"{source}-{case['name']}")


def switchable_atrous(config):
    config = {key: value for key, value in config.items() if key != "training"}
    return dynaconv.SwitchableAtrousConv2d(**config)


def check(model, call, case, source, state=None):
    """The recorded state (or `state`) loaded into a fresh model gives the recorded output."""
    model = model.double().train(case.get("config", {}).get("training", False))
    returned = dynaconv.load_published(model, state or case["state"], source)
    assert returned is model
    close(call(case["inputs"]["input"]), case["output"], case["name"])


@pytest.mark.parametrize(("source", "model", "case"), list(recorded()))
def test_layers(source, model, case):
    check(model, model["conv"] if isinstance(model, nn.ModuleDict) else model, case, source)


class Block(nn.Module):
    """A residual block as the published ODConv ResNet has it."""

    def __init__(self, channels, out, stride):
        super().__init__()
        options = {"padding": 1, "bias": False, "experts": 2}
        self.conv1 = dynaconv.ODConv2d(channels, out, 3, stride, **options)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = dynaconv.ODConv2d(out, out, 3, **options)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride > 1:
            shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


def blocks():
    return nn.Sequential(Block(4, 6, 2), Block(6, 6, 1))


class Routed(dynaconv.CondConv2d):
    """A layer that is given the routing of its block, as timm's are."""

    def build(self, experts=4):
        super().build(experts)
        self.routing = None

    def forward(self, x, coefficients):
        return self.convolve(x, coefficients)


class RoutedBlock(nn.Module):
    """timm's CondConvResidual."""

    def __init__(self):
        super().__init__()
        options = {"bias": False, "experts": 3}
        self.conv_pw = Routed(4, 8, 1, **options)
        self.conv_dw = Routed(8, 8, 3, padding=1, groups=8, **options)
        self.conv_pwl = Routed(8, 4, 1, **options)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(c) for c in (8, 8, 4))
        self.routing_fn = nn.Linear(4, 3)

    def forward(self, x):
        routing = torch.sigmoid(self.routing_fn(x.mean((2, 3))))
        seen = F.relu(self.bn1(self.conv_pw(x, routing)))
        seen = F.relu(self.bn2(self.conv_dw(seen, routing)))
        return self.bn3(self.conv_pwl(seen, routing)) + x


def deformable(modulated):
    options = {"stride": 2, "padding": 1, "bias": modulated, "offset_groups": 2}
    if modulated:
        return dynaconv.ModulatedDeformConv2d(4, 6, 3, **options, gate_scale=2.0)
    return dynaconv.DeformConv2d(4, 6, 3, **options)


@pytest.mark.parametrize(
    ("source", "build", "name"),
    [
        ("odconv", blocks, "od_blocks"),
        ("timm", RoutedBlock, "condconv_residual"),
        ("torchvision", lambda: deformable(False), "torchvision"),
        ("torchvision", lambda: deformable(True), "torchvision_modulated"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_models(source, build, name):
    model, case = build(), MODELS[name]
    check(model, model, case, source)
    wrapped = {f"module.{key}": tensor for key, tensor in case["state"].items()}
    model = build()
    check(model, model, case, source, wrapped)


def test_torchvision_with_its_convolutions_beside_it():
    case = MODELS["torchvision_modulated"]
    names = {"regular_conv": "net.deform"}
    state = {}
    for key, tensor in case["state"].items():
        part, end = key.split(".")
        state[f"{names.get(part, f'net.{part}')}.{end}"] = tensor
    model = nn.ModuleDict({"net": nn.ModuleDict({"deform": deformable(True)})})
    check(model, model["net"]["deform"], case, "torchvision", state)


def test_early_keys_of_mmcv():
    _, layer, case = next(p.values for p in recorded() if p.id == "mmcv-modulated_pack")
    state = {
        f"conv2.{key}".replace(".conv_offset", "_offset"): t for key, t in case["state"].items()
    }
    assert "conv2_offset.weight" in state
    check(nn.ModuleDict({"conv2": layer}), layer, case, "mmcv", state)


def test_the_flat_weight_of_fairseqs_cuda_layer():
    _, layer, case = next(p.values for p in recorded() if p.id == "fairseq-light_encoder_k3")
    check(layer, layer, case, "fairseq", case["state"] | {"weight": case["state"]["weight"][:, 0]})


def test_checkpoints_older_than_the_count_of_batches():
    state = {k: t for k, t in MODELS["od_blocks"]["state"].items() if "num_batches" not in k}
    model = blocks()
    check(model, model, MODELS["od_blocks"], "odconv", state)


def test_half_precision_and_temperatures():
    """Tensors take the layer's dtype; what no checkpoint holds stays."""
    model = blocks()
    model[0].conv1.temperature.fill_(7)
    state = {
        k: t.half() if t.is_floating_point() else t for k, t in MODELS["od_blocks"]["state"].items()
    }
    dynaconv.load_published(model, state, "odconv")
    assert model[0].conv1.weight.dtype == torch.float32
    assert torch.equal(model[0].conv1.weight, state["0.conv1.weight"].float())
    assert model[0].conv1.temperature == 7


# Refusals -----------------------------------------------------------------------------------


def changed(state, **changes):
    """The state with tensors replaced, or left out where None; "__" stands for a dot."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return {k: t for k, t in (state | changes).items() if t is not None}


def test_all_that_does_not_fit_is_named_and_nothing_changes():
    model = blocks().double()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = changed(
        MODELS["od_blocks"]["state"],
        **{
            "0.conv1.weight": None,
            "1.bn1.bias": None,
            "0.extra": torch.zeros(1),
            "0.conv1.attention.fc.weight": torch.zeros(16, 4),
            "1.bn2.weight": torch.zeros(5),
        },
    )
    with pytest.raises(ValueError, match="does not fit Sequential; nothing changed") as error:
        dynaconv.load_published(model, state, "odconv")
    for line in (
        "missing: 0.conv1.weight, 1.bn1.bias",
        "unknown: 0.extra",
        "0.conv1.attention.fc.weight has shape (16, 4), not (16, 4, 1, 1)",
        "1.bn2.weight has shape (5,), not (6,)",
    ):
        assert f"  {line}" in str(error.value).splitlines()
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_long_lists_are_cut():
    needed = [key for key in MODELS["od_blocks"]["state"] if "num_batches" not in key]
    with pytest.raises(ValueError, match=rf"missing: (\S+, ){{7}}\S+ and {len(needed) - 8} more"):
        dynaconv.load_published(blocks(), {}, "odconv")


LAYER = {"in_channels": 4, "out_channels": 6, "kernel_size": 3}


@pytest.mark.parametrize(
    ("model", "source", "text"),
    [
        (dynaconv.ODConv2d(**LAYER), "odconv", "bias of this layer has no published counterpart"),
        (
            dynaconv.ODConv2d(**LAYER, bias=False, gate_scale=2.0),
            "odconv",
            "ODConv2d: gate_scale=2.0 is not published; give gate_scale=1.0",
        ),
        (dynaconv.ModulatedDeformConv2d(**LAYER, gate_scale=2.0), "mmcv", "gate_scale=2.0"),
        (
            dynaconv.DeformConv2d(**LAYER, bias=False, offset_bound=1.0),
            "mmcv",
            "offset_bound=1.0 is not published; leave it out",
        ),
        (dynaconv.CARAFE2d(4, 4), "mmcv", "bias of this layer has no published counterpart"),
        (dynaconv.Involution2d(**LAYER, bias=False), "involution", "project.weight of this layer"),
        (dynaconv.LightConv1d(4, 6, 3), "fairseq", "project.weight of this layer"),
        (
            nn.Sequential(dynaconv.CondConv2d(**LAYER)),
            "odconv",
            "source='odconv' has no CondConv2d at '0'; it has odconv",
        ),
        (nn.Conv2d(**LAYER), "odconv", "Conv2d has no dynamic layer; use load_state_dict"),
        (dynaconv.ODConv2d(**LAYER), "OSVAI", "source='OSVAI' does not exist; there are odconv, "),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
def test_what_was_not_published(model, source, text):
    with pytest.raises(ValueError) as error:
        dynaconv.load_published(model, {}, source)
    assert text in str(error.value)


def test_what_is_no_tensor():
    layer = dynaconv.ODConv2d(**LAYER)
    with pytest.raises(TypeError, match=r"state_dict\['epoch'\] is a int, not a tensor"):
        dynaconv.load_published(layer, {"epoch": 3})
    with pytest.raises(TypeError, match=r"\['state_dict'\] is a dict.*the mapping that it holds"):
        dynaconv.load_published(layer, {"state_dict": {}, "epoch": 3})
    with pytest.raises(TypeError, match="state_dict is a list; give tensors by key"):
        dynaconv.load_published(layer, [1])


def test_every_source_is_shown():
    """The docstring's table has every source, and each was checked above."""
    table = dynaconv.load_published.__doc__
    seen = {p.values[0] for p in recorded()} | {"torchvision"}
    assert set(SOURCES) == seen
    assert all(f"| `{source}` |" in table for source in SOURCES)


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks_have_the_same_layout(rank):
    """Ports of ODConv to 1-D and 3-D keep its names; 1x1 convolutions have as many ones."""
    cls = dynaconv.families()["odconv"].classes[rank]
    layer = randomized(cls, LAYER | {"bias": False})
    names = {"weight", *(k for k in layer.state_dict() if k.startswith("attention."))}
    state = {}
    for key, tensor in layer.state_dict().items():
        if key != "temperature":
            full = key if key in names else f"attention.{key}"
            state[full] = tensor.reshape([*tensor.shape, *[1] * rank * (tensor.dim() == 2)])
    fresh = dynaconv.load_published(cls(**LAYER, bias=False).double(), state, "odconv")
    assert all(torch.equal(t, layer.state_dict()[k]) for k, t in fresh.state_dict().items())
