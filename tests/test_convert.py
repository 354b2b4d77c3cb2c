"""Whole models: convert keeps the function, says what it left alone and why."""

import copy

import pytest
import torch
from torch import nn

import dynaconv
from dynaconv.layers.base import CONVS, DynamicConv
from dynaconv.layers.transposed import CONV_TRANSPOSES
from dynaconv.testing import close

NAMES = list(dynaconv.families())
# Families none of whose layers computes what a convolution of Net does.
NEVER_STATIC = ("carafe", "contmix", "ddf_up", "dysample", "snake")


class Net(nn.Module):
    """Stem, a depthwise block, a shared convolution, a transposed one, odd paddings."""

    convolutions = 7

    def __init__(self, rank=2):
        super().__init__()
        conv = CONVS[rank]
        self.stem = conv(3, 8, 3, stride=2, padding=1)
        self.layer1 = nn.Sequential(conv(8, 8, 3, padding="same", groups=8), nn.ReLU())
        self.layer2 = nn.Sequential(conv(8, 8, 3, padding=2, dilation=2, bias=False), nn.ReLU())
        self.mirror = conv(8, 8, 3, padding=1, padding_mode="circular")
        self.same = conv(8, 8, 3, padding=1)
        self.up = CONV_TRANSPOSES[rank](8, 8, 4, stride=2, padding=1)
        self.head = conv(8, 5, 1)

    def forward(self, x):
        x = self.layer2(self.layer1(self.stem(x)))
        return self.head(self.up(self.same(self.mirror(self.mirror(x)))))


def example(rank):
    return torch.randn(2, 3, *(13, 11, 9)[:rank])


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_convert_keeps_the_function(name, rank):
    torch.manual_seed(0)
    model, x = Net(rank), example(rank)
    expected = model(x)
    try:
        converted, report = dynaconv.convert(model, to=name)
    except ValueError as refusal:
        refused = str(refusal)
        assert name in NEVER_STATIC, refused
        assert refused.startswith("no convolution was converted")
        return
    assert (converted(x) - expected).abs().max() <= 1e-5
    assert len(report.converted) + len(report.kept) == Net.convolutions
    kinds = [type(converted.get_submodule(n)) for n in report.converted]
    assert all(issubclass(kind, DynamicConv) for kind in kinds)
    assert converted is not model
    assert torch.equal(model(x), expected), "the original has changed"


@pytest.mark.parametrize("name", NAMES)
def test_converted_model_trains(name):
    torch.manual_seed(0)
    converted, _ = dynaconv.convert(Net(), to=name, where=r"layer|mirror|same|up", exact=False)
    x = example(2)
    target = torch.randn_like(converted(x))
    optimizer = torch.optim.AdamW(dynaconv.parameter_groups(converted, lr=3e-3))
    losses = []
    for step in range(8):
        dynaconv.anneal(converted, step / 4)
        loss = (converted(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (r"layer[12]", ["layer1.0", "layer2.0"]),
        (lambda name, conv: conv.out_channels == 5, ["head"]),
        (dynaconv.select(kernel_size=1), ["head"]),
        (dynaconv.select(stage="layer2"), ["layer2.0"]),
        (dynaconv.select(stage=["stem", "layer2"], kernel_size=(3, 3)), ["stem", "layer2.0"]),
        (dynaconv.select(type=nn.Conv2d, min_channels=8, name="layer"), ["layer1.0", "layer2.0"]),
    ],
)
def test_where(where, expected):
    _, report = dynaconv.convert(Net(), to="dyconv", where=where)
    assert report.converted == expected
    assert {reason for _, reason in report.kept} == {"not selected by `where`"}


def test_involution_says_what_it_cannot_be():
    _, report = dynaconv.convert(Net(), to="involution")
    assert report.converted == ["layer1.0"]
    reasons = dict(report.kept)
    assert "no transposed form" in reasons.pop("up")
    assert all("mixes no channels" in reason for reason in reasons.values())
    assert "kept, involution mixes no channels" in str(report)
    _, report = dynaconv.convert(Net(), to="involution", exact=False)
    assert len(report.converted) == Net.convolutions - 1


def test_kept_with_reasons():
    class Own(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + 1

    class OwnTransposed(nn.ConvTranspose2d):
        def forward(self, x):
            return super().forward(x) + 1

    hooked = nn.Conv2d(3, 3, 1)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.ModuleDict(
        {
            "own": Own(3, 3, 1),
            "hooked": hooked,
            "lazy": nn.LazyConv2d(3, 1),
            "normed": nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)),
            "enlarging": nn.ConvTranspose2d(3, 3, 4, stride=2),
            "transposed": OwnTransposed(3, 3, 1),
            "plain": nn.Conv2d(3, 3, 1),
            "dynamic": dynaconv.ModulatedDeformConv2d(3, 3, 1),
        }
    )
    converted, report = dynaconv.convert(model, to="condconv", inplace=True)
    assert converted is model
    assert report.converted == ["enlarging", "plain"]
    assert isinstance(converted["enlarging"], dynaconv.CondConvTranspose2d)
    reasons = dict(report.kept)
    for name, text in {
        "own": "forward of its own",
        "hooked": "hooks",
        "lazy": "lazy",
        "normed": "parametrized",
        "transposed": "forward of its own",
    }.items():
        assert text in reasons[name]
    assert not any(name.startswith("dynamic") for name in reasons)


def test_shared_convolution_stays_shared():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    converted, report = dynaconv.convert(nn.Sequential(conv, nn.ReLU(), conv), to="odconv")
    assert report.converted == ["0", "2"]
    assert converted[0] is converted[2]


def test_a_convolution_by_itself():
    conv, x = nn.Conv1d(4, 4, 3).eval(), torch.randn(2, 4, 9)
    layer, _ = dynaconv.convert(conv, to="deform")
    assert isinstance(layer, dynaconv.DeformConv1d)
    assert not layer.training
    close(layer(x), conv(x), "the convolution itself", 1e-5)


def test_refusals():
    with pytest.raises(ValueError, match=r"family 'nope' does not exist; there are .*condconv"):
        dynaconv.convert(Net(), to="nope")
    with pytest.raises(ValueError, match=r"no convolution was converted(.|\n)*not selected"):
        dynaconv.convert(Net(), to="odconv", where="nothing")
    with pytest.raises(TypeError, match="ODConv2d has no option 'expert'; its options: experts"):
        dynaconv.convert(Net(), to="odconv", expert=3)
    with pytest.raises(ValueError, match="experts=0 must be at least 1"):
        dynaconv.convert(Net(), to="odconv", experts=0)


@pytest.mark.parametrize("name", ["dyconv", "odconv"])
def test_anneal(name):
    model, _ = dynaconv.convert(Net(), to=name)
    x = example(2)
    dynaconv.anneal(model, 0)
    assert model.layer2[0].temperature == 30
    flat = model.layer2[0].kernels(torch.randn(4, 8, 7, 7))["coefficients"]
    dynaconv.anneal(model, 0.5, start=30, end=1)
    assert model.layer2[0].temperature == 15.5
    dynaconv.anneal(model, 7)
    assert model.layer2[0].temperature == 1
    sharp = model.layer2[0].kernels(torch.randn(4, 8, 7, 7))["coefficients"]
    assert sharp.std(1).mean() > 5 * flat.std(1).mean()
    saved = copy.deepcopy(model.state_dict())
    dynaconv.anneal(model, 0)
    model.load_state_dict(saved)
    assert model.layer2[0].temperature == 1, "the temperature is part of the checkpoint"
    assert model(x).isfinite().all()


def test_anneal_refuses():
    with pytest.raises(ValueError, match="progress=-1 must be at least 0"):
        dynaconv.anneal(Net(), -1)
    with pytest.raises(ValueError, match=r"temperatures must be above 0, got start=30\.0, end=0"):
        dynaconv.anneal(dynaconv.DyConv2d(4, 4, 3), 0, end=0)


def test_anneal_takes_each_familys_own_temperatures():
    model = nn.Sequential(dynaconv.DyConv2d(4, 4, 3), dynaconv.KernelWarehouseConv2d(4, 4, 3))
    for progress, expected in ((0, [30, 1]), (0.5, [15.5, 0.5]), (1, [1, 0])):
        dynaconv.anneal(model, progress)
        assert [layer.temperature for layer in model] == expected


def test_keep_inside():
    learned = dynaconv.LearnedStrideConv2d(4, 4, 3, 2, 1, max_stride=3.0)
    dcls = dynaconv.DCLSConv2d(4, 4, (3, 5), dilation=(1, 2))
    model = nn.Sequential(learned, nn.ReLU(), nn.Sequential(dcls))
    with torch.no_grad():
        learned.strides.copy_(torch.tensor([0.2, 9.0]))
        dcls.positions.fill_(7.0)[..., 0] = -7.0
    dynaconv.keep_inside(model.eval())
    assert learned.strides.tolist() == [1.0, 3.0]
    assert dcls.positions[0, ..., 0].unique().tolist() == [-1]
    assert dcls.positions[1, ..., 0].unique().tolist() == [-4]
    assert dcls.positions[0, ..., 1:].unique().tolist() == [1]
    assert dcls.positions[1, ..., 1:].unique().tolist() == [4]
    with pytest.raises(TypeError, match="keep_inside: model is of"):
        dynaconv.keep_inside(None)


def test_parameter_groups():
    model, _ = dynaconv.convert(Net(), to="deform_v2", where="layer2")
    normal, slow = dynaconv.parameter_groups(model, lr=1.0)
    assert (normal["lr"], slow["lr"]) == (1.0, 0.1)
    assert {id(p) for p in slow["params"]} == {
        id(p) for p in model.layer2[0].offset_conv.parameters()
    }
    assert len(normal["params"]) + len(slow["params"]) == len(list(model.parameters()))
