"""Models of other libraries, with every part at work, and what is asked of them converted."""

import torch
from torch import nn

import dynaconv
from dynaconv.layers.base import DynamicConv

# A convolution's own error in float32, through a deep model.
TOLERANCE = 1e-4


def awake(model, x):
    """`model` in eval mode, its norms and layer scales drawn, so that no branch is near zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.momentum = 1.0
        model.train()(x)
    return model.eval()


def keeps_the_function(model, family, outputs, where=None):
    """The converted model and the report; its `outputs(model)` are those of `model`."""
    converted, report = dynaconv.convert(model, to=family, where=where)
    with torch.no_grad():
        for got, expected in zip(outputs(converted), outputs(model), strict=True):
            assert expected.std() > 1e-3
            error = (got - expected).abs().max() / expected.abs().max()
            assert error <= TOLERANCE, f"{family}: {error:.2g}"
    return converted, report


def trains(model, loss_of):
    """One step of training: a finite loss, gradients for all of every dynamic layer."""
    model.train()
    optimizer = torch.optim.SGD(dynaconv.parameter_groups(model, lr=1e-4))
    loss = loss_of(model)
    assert loss.isfinite()
    loss.backward()
    layers = [m for m in model.modules() if isinstance(m, DynamicConv)]
    assert layers
    for layer in layers:
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, f"{type(layer).__name__}.{name} has no gradient"
            assert parameter.grad.isfinite().all(), f"{type(layer).__name__}.{name}"
    optimizer.step()
    assert loss_of(model).isfinite()
