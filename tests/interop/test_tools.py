"""What timm and torchvision do with models works on converted ones."""

import copy
import io

import pytest
import torch

import dynaconv
from dynaconv.layers.base import DynamicConv
from tests.interop.models import TOLERANCE, awake

timm = pytest.importorskip("timm")
feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")

pytestmark = pytest.mark.interop

FAMILIES = ("odconv", "deform_v2", "fdconv", "kernel_warehouse", "modulated", "dcd")


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family, x):
    """A small timm ResNet, converted."""
    return dynaconv.convert(awake(timm.create_model("test_resnet", num_classes=5), x), family)[0]


def test_optimizers_with_and_without_layer_decay(model, x):
    from timm.optim import create_optimizer_v2

    for options in ({}, {"layer_decay": 0.7}):
        optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, **options)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters()}
        decayed = [g for g in optimizer.param_groups if g["weight_decay"]]
        assert all(p.dim() > 1 for group in decayed for p in group["params"])
        model(x).square().mean().backward()
        optimizer.step()


def test_moving_averages(model, x):
    averaged = timm.utils.ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    averaged.update(model)
    for mean, now in zip(averaged.module.parameters(), model.parameters(), strict=True):
        assert torch.allclose(mean, now - 0.5, atol=1e-6)


def test_checkpoints_and_pickles(model, x):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), model(x))
    fresh = copy.deepcopy(model)
    for parameter in fresh.parameters():
        torch.nn.init.uniform_(parameter)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(x), model(x))


def test_gradient_checkpointing(model, x):
    """Memory for time: the gradients are those without it."""

    def gradients(copied):
        copied.eval()(x).square().sum().backward()
        return [p.grad for p in copied.parameters()]

    plain, saving = copy.deepcopy(model), copy.deepcopy(model)
    saving.set_grad_checkpointing()
    for expected, got in zip(gradients(plain), gradients(saving), strict=True):
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_channels_last(model, x):
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    got = model(x.contiguous(memory_format=torch.channels_last))
    assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_features_only(family, x):
    backbone = timm.create_model("test_resnet", features_only=True)
    converted, _ = dynaconv.convert(awake(backbone, x), family)
    assert converted.feature_info.channels() == backbone.feature_info.channels()
    for got, expected in zip(converted(x), backbone(x), strict=True):
        assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_feature_extractor_of_torchvision(family, x):
    model = awake(timm.create_model("resnet18"), x)
    converted, _ = dynaconv.convert(model, family, where="layer1")
    got, expected = (
        feature_extraction.create_feature_extractor(m, ["layer2"])(x)["layer2"]
        for m in (converted, model)
    )
    assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_reparameterized_first_then_converted(family, x):
    trained = awake(timm.create_model("repvgg_a0", num_classes=5), x)
    deployed = timm.utils.reparameterize_model(trained)
    converted, report = dynaconv.convert(deployed, family, where=r"stages\.[01]\.")
    assert len(report.converted) == 6
    error = (converted(x) - trained(x)).abs().max() / trained(x).abs().max()
    assert error <= TOLERANCE


def test_the_report_says_what_was_kept():
    model = timm.create_model("nf_regnet_b0")
    _, report = dynaconv.convert(model, "odconv")
    kept = [name for name, reason in report.kept if "ScaledStdConv2d has a forward" in reason]
    assert len(kept) == len(report.kept) == 54
    model = timm.create_model("tf_mobilenetv3_small_minimal_100")
    converted, report = dynaconv.convert(model, "odconv")
    assert not report.kept
    assert sum(isinstance(m, DynamicConv) for m in converted.modules()) == 35
