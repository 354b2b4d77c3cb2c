"""Dynamic convolution in ultralytics YOLO models, without a change to that package.

    from ultralytics import YOLO
    import dynamic_yolo

    YOLO("yolo-dynamic.yaml").train(data="coco8.yaml")                       # rows `C2f.odconv`
    YOLO("yolo11n.pt").train(data="coco8.yaml", trainer=dynamic_yolo.DynamicTrainer)

Importing this module is enough for the first: a row of a model's yaml may then name any module of
ultralytics and a family of dynaconv, joined by a dot. The second starts from trained weights.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn import tasks
from ultralytics.nn.modules import Conv
from ultralytics.utils.export import engine

import dynaconv
from dynaconv.layers.base import DynamicConv
from dynaconv.registry import family

BUILT_IN = tasks.parse_model


class DynamicBlock(nn.Module):
    """Convolution, norm and activation of a `Conv` whose convolution has become dynamic.

    Not a `Conv` itself: `model.fuse()` multiplies the norm of those into a static kernel.
    """

    def __init__(self, block: Conv) -> None:
        super().__init__()
        self.conv, self.bn, self.act = block.conv, block.bn, block.act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


def spatial(name: str, conv: nn.Conv2d) -> bool:
    """Whether the kernel is larger than 1x1."""
    return max(conv.kernel_size) > 1


def dynamic(module: nn.Module, to: str, where=spatial, exact: bool = True, **options) -> nn.Module:
    """`module` with convolutions of the family `to`; arguments as those of `dynaconv.convert`."""
    converted, _ = dynaconv.convert(module, to, where, exact=exact, **options)
    parent = nn.ModuleDict({"block": converted})
    for place in list(parent.modules()):
        for name, child in place.named_children():
            if isinstance(child, Conv) and isinstance(child.conv, DynamicConv):
                place.add_module(name, DynamicBlock(child))
    return parent["block"]


def parse_model(d: dict, ch: int, verbose: bool = True) -> tuple[nn.Sequential, list[int]]:
    """That of ultralytics, for rows that name `module.family` as well.

    Options of a family stand under the key `dynaconv` of the yaml.
    """
    d, families = deepcopy(d), {}
    for index, row in enumerate(d["backbone"] + d["head"]):
        module, _, name = row[2].partition(".")
        if name and module not in ("nn", "torchvision"):
            row[2], families[index] = module, family(name).name
    layers, save = BUILT_IN(d, ch, verbose)
    for index, name in families.items():
        made = dynamic(layers[index], name, exact=False, **d.get("dynaconv", {}).get(name, {}))
        made.i, made.f = layers[index].i, layers[index].f
        made.type = f"{layers[index].type}.{name}"
        made.np = sum(parameter.numel() for parameter in made.parameters())
        layers[index] = made
    return layers, save


class DynamicTrainer(DetectionTrainer):
    """Trains on with dynamic convolutions that start as the trained static ones.

    A class of your own names others: `class Mine(DynamicTrainer): to = "deform_v2"`.
    """

    to = "odconv"
    where = r"\.m\.\d+\.cv"  # those of the bottlenecks
    options: dict = {}

    def get_model(self, cfg=None, weights=None, verbose=True):
        if weights is not None and any(isinstance(m, DynamicConv) for m in weights.modules()):
            return weights.float().requires_grad_()  # a run that goes on
        model = super().get_model(cfg, weights, verbose)
        model.model = dynamic(model.model, self.to, self.where, **self.options)
        return model


def torch2onnx(model, im, output_file, opset=18, input_names=None, output_names=None, dynamic=None):
    """What `model.export(format="onnx")` calls, by torch's newer exporter.

    The older one, by tracing, makes tensors of sizes that have to be numbers.
    """
    axes = dict.fromkeys((dynamic or {}).get("images", {}), torch.export.Dim.DYNAMIC)
    torch.onnx.export(
        model,
        (im.repeat(2, 1, 1, 1) if axes else im,),  # torch.export takes a size of 1 for fixed
        str(output_file),
        dynamo=True,
        opset_version=opset,
        input_names=input_names or ["images"],
        output_names=output_names or ["output0"],
        dynamic_shapes=(axes,) if axes else None,
        external_data=False,
        verbose=False,
    )
    return str(output_file)


# A checkpoint holds the model as objects: loading one imports this module, and so does this.
tasks.parse_model = parse_model
engine.torch2onnx = torch2onnx
