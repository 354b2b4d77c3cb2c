"""torch.export: one graph for all batch and spatial sizes, with the layer's values."""

import io
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dynaconv.layers.base import DynamicConv
from dynaconv.testing.families import SIZES, Arguments, example, randomized
from dynaconv.testing.features.registry import feature
from dynaconv.testing.tolerance import close

# Batch, and positions added to each dimension of SIZES, of the calls of an exported graph.
CALLS = ((2, (3, 1, 2)), (1, (-1, 2, -1)), (4, (0, 0, 1)))


@feature("export", "torch.export")
def check_export(cls: type[DynamicConv], arguments: Arguments) -> None:
    """Exported with free batch and spatial sizes, saved and loaded, it computes the same."""
    layer, file = randomized(cls, arguments), io.BytesIO()
    torch.export.save(exported(layer, example(cls, arguments)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    with torch.no_grad():
        for x in others(cls, arguments):
            close(loaded(x), layer(x), f"{cls.__name__} exported, input {tuple(x.shape)}")


def exported(model: nn.Module, *inputs: Tensor) -> ExportedProgram:
    """`model` with every size free but the channels; masks have none."""
    free = [
        {d: Dim.DYNAMIC for d in range(t.dim()) if d != 1 or not t.is_floating_point()}
        for t in inputs
    ]
    with torch.no_grad():
        return torch.export.export(model, inputs, dynamic_shapes=tuple(free))


def others(cls: type[DynamicConv], arguments: Arguments) -> Iterator[Tensor]:
    """Inputs of other batch and spatial sizes."""
    for batch, more in CALLS:
        size = [n + m for n, m in zip(SIZES[cls.rank], more, strict=False)]
        yield torch.randn(batch, arguments["in_channels"], *size, dtype=torch.float64)
