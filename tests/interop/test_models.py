"""timm's, torchvision's and segmentation_models_pytorch's models keep their function and train."""

import functools

import pytest
import torch
import torch.nn.functional as F

import dynaconv
from tests.interop.models import awake, keeps_the_function, trains

timm = pytest.importorskip("timm")
smp = pytest.importorskip("segmentation_models_pytorch")
detection = pytest.importorskip("torchvision.models.detection")

pytestmark = pytest.mark.interop

# What makes each model, and which convolutions are converted.
MODELS = {
    "resnet18": (lambda: timm.create_model("resnet18"), r"layer[12]"),
    "mobilenetv3": (lambda: timm.create_model("mobilenetv3_small_050"), None),
    "efficientnet": (lambda: timm.create_model("tf_efficientnet_lite0"), None),
    # Conv2dSame, and CondConv2d beside it.
    "efficientnet_tf": (lambda: timm.create_model("tf_efficientnet_cc_b0_4e"), None),
    "convnext": (lambda: timm.create_model("convnext_atto"), None),
    # Depthwise 1x11 and 11x1.
    "inception_next": (lambda: timm.create_model("inception_next_atto"), None),
    "unet": (lambda: smp.Unet("tu-mobilenetv3_small_050", encoder_weights=None), None),
    # Transposed convolutions.
    "linknet": (
        lambda: smp.Linknet("tu-resnet10t", encoder_weights=None),
        r"layer[12]|decoder\.blocks\.[234]",
    ),
    # Conv2dStaticSamePadding.
    "fpn": (lambda: smp.FPN("efficientnet-b0", encoder_weights=None), r"_blocks\.\d\.|decoder"),
}
# One family a primitive, and one that mixes by its kernels' own attention.
FEW = (
    *("condconv", "odconv", "kernel_warehouse", "fdconv", "involution", "deform_v2"),
    *("dcd", "learned_stride", "adaptive_stride"),
)
# Where families find convolutions that they replace, if not in a MobileNet.
HOME = {"snake": "inception_next"} | dict.fromkeys(
    ("carafe", "contmix", "ddf_up", "dysample", "pac_transpose"), "linknet"
)
NEVER_STATIC = ("carafe", "contmix", "ddf_up", "dysample")
DEPTHWISE_ONLY = ("involution",)
WITHOUT_DEPTHWISE = ("resnet18", "linknet")


@functools.cache
def model_and_input(name):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 96)
    return awake(MODELS[name][0](), x), x


def check(name, family):
    model, x = model_and_input(name)
    where = MODELS[name][1]
    if family in NEVER_STATIC:
        converted, _ = dynaconv.convert(model, to=family, where=where, exact=False)
    else:
        converted, _ = keeps_the_function(model, family, lambda m: [m(x)], where)
    target = torch.randn_like(model(x))
    trains(converted, lambda m: F.mse_loss(m(x), target))


@pytest.mark.parametrize("family", dynaconv.families())
def test_every_family(family):
    check(HOME.get(family, "mobilenetv3"), family)


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("name", MODELS)
def test_every_model(name, family):
    if family in DEPTHWISE_ONLY and name in WITHOUT_DEPTHWISE:
        with pytest.raises(ValueError, match="mixes no channels"):
            check(name, family)
    else:
        check(name, family)


def faster_rcnn():
    sizes = {"min_size": 64, "max_size": 96}
    make = detection.fasterrcnn_mobilenet_v3_large_320_fpn
    return make(weights=None, weights_backbone=None, num_classes=3, **sizes)


def retinanet():
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    return detection.RetinaNet(backbone, num_classes=3, min_size=64, max_size=96)


def maps_and_heads(model, x):
    """Feature maps, and what the first heads make of them."""
    maps = list(model.backbone(x).values())
    made = model.rpn.head(maps) if hasattr(model, "rpn") else model.head(maps).values()
    return [*maps, *(t for part in made for t in (part if isinstance(part, list) else [part]))]


@pytest.mark.parametrize("family", ["condconv", "odconv", "deform_v2", "dcd"])
@pytest.mark.parametrize("make", [faster_rcnn, retinanet])
def test_detection(make, family):
    x = torch.randn(2, 3, 64, 96)
    model = make()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.kaiming_normal_(parameter)
    awake(model.backbone, x)
    converted, _ = keeps_the_function(model.eval(), family, lambda m: maps_and_heads(m, x))
    assert all(box.isfinite().all() for found in converted(list(x)) for box in found.values())
    boxes = torch.tensor([[5.0, 6.0, 40.0, 50.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1])}] * 2
    trains(converted, lambda m: sum(m(list(x), targets).values()))
