"""One warehouse of kernel cells for many layers of a model (KernelWarehouse, Li, ICML 2024)."""

from torch import nn

from dynaconv.convert import Where, chooser
from dynaconv.functional._checks import check_bool, check_module, check_number
from dynaconv.layers.arguments import room_for
from dynaconv.layers.cells import Warehouse
from dynaconv.layers.kernel_warehouse import KernelWarehouseConv


def share_kernels(
    model: nn.Module,
    where: Where | str | None = None,
    *,
    budget: float = 1.0,
    in_ratio: float = 1.0,
    out_ratio: float = 1.0,
    spatial_partition: bool = True,
    basis_ratio: float = 1.0,
) -> Warehouse:
    """Makes the KernelWarehouseConv layers of `model` mix the cells of one warehouse.

        model, report = dynaconv.convert(model, to="kernel_warehouse")
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            dynaconv.share_kernels(model, dynaconv.select(stage=stage))

    The model is changed in place, its function at temperature 1 kept where the budget is at least
    1; the temperature is left as it is. Parameters are new: share before the optimiser is made and
    before training, and before a saved state of a model that shares is loaded. The warehouse is a
    submodule of each layer: its cells count once among the model's parameters and stand under each
    layer's name in the state_dict.

    Args:
        model: any module; shared layers count once, in the order of `named_modules`.
        where: which layers: a function of (name, module), a regular expression that is searched in
            the name, `dynaconv.select(...)`, or None for all. The paper shares within a stage.
        budget, in_ratio, out_ratio, spatial_partition: as in `Warehouse`.
        basis_ratio: below 1, scores for other layers' cells are combinations of that share of them
            (at least 16), which makes the attention smaller.

    Returns:
        The warehouse.

    Raises:
        ValueError: no layer was selected, or layers that cannot share: of different dimensions,
            devices or dtypes, or of shapes that cannot be cut alike.
    """
    check_module("share_kernels", model=model)
    ratios = {"in_ratio": in_ratio, "out_ratio": out_ratio, "basis_ratio": basis_ratio}
    check_number("share_kernels", budget=budget, **ratios)
    check_bool("share_kernels", spatial_partition=spatial_partition)
    chosen = chooser("share_kernels", where)
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, KernelWarehouseConv) and chosen(name, module)
    ]
    _check_alike(layers)
    kernels = [layer.static_kernel() for layer in layers]
    shapes = [layer.kernel_shape() for layer in layers]
    with room_for(budget=budget):
        warehouse = Warehouse(shapes, budget, in_ratio, out_ratio, spatial_partition)
    cells = layers[0].warehouse.cells
    warehouse.to(cells.device, cells.dtype).train(model.training)
    options = {"budget": budget, "in_ratio": in_ratio, "out_ratio": out_ratio}
    for layer, kernel, share in zip(layers, kernels, warehouse.shares, strict=True):
        layer.draw_from(warehouse, share, basis_ratio)
        layer.options = layer.options | options | {"spatial_partition": spatial_partition}
        if kernel is not None:
            layer.store(kernel)
    return warehouse


def _check_alike(layers: list[KernelWarehouseConv]) -> None:
    """ValueError unless there are layers, and one warehouse can serve them."""
    if not layers:
        raise ValueError(
            "no KernelWarehouseConv was selected; make them with "
            "dynaconv.convert(model, to='kernel_warehouse')"
        )
    for what, values in (
        ("dimensions", {layer.rank for layer in layers}),
        ("devices", {layer.warehouse.cells.device for layer in layers}),
        ("dtypes", {layer.warehouse.cells.dtype for layer in layers}),
    ):
        if len(values) > 1:
            given = ", ".join(sorted(map(str, values)))
            raise ValueError(f"layers of different {what} cannot share kernels: {given}")
