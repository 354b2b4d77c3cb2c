"""Layers in graphs of torch.fx: torchvision's feature extractors, timm's, quantisation."""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Proxy


def one_node(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of `forward`: torch.fx takes the layer as one node, as it does torch.nn's own."""

    @functools.wraps(forward)
    def traceable(self: nn.Module, input: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(input, Proxy):
            tracer = input.tracer
            path = tracer.path_of_module(self)  # type: ignore[attr-defined]
            return tracer.create_proxy("call_module", path, (input, *args), kwargs)
        return forward(self, input, *args, **kwargs)

    return traceable
