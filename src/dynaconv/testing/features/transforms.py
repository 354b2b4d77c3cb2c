"""torch.func, forward mode, double backward and activation checkpointing."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from dynaconv.layers.base import DynamicConv
from dynaconv.testing.families import Arguments, example, randomized, require
from dynaconv.testing.features.registry import feature
from dynaconv.testing.tolerance import close

Tensors = dict[str, Tensor]
# Output values whose whole Jacobian is taken.
FEW = 3


@feature("vmap", "torch.vmap")
def check_vmap(cls: type[DynamicConv], arguments: Arguments) -> None:
    """vmap over inputs, over stacked layers, and of gradients a sample, each as a loop gives."""
    layers = [randomized(cls, arguments) for _ in range(2)]
    x = torch.stack([example(cls, arguments, 2) for _ in layers])
    call, parameters = _functional(layers[0])
    name = cls.__name__
    loop = torch.stack([layers[0](one) for one in x])
    close(vmap(call, (None, 0))(parameters, x), loop, f"{name} under vmap over inputs")

    given = [_tensors(layer) for layer in layers]
    stacked = {key: torch.stack([tensors[key] for tensors in given]) for key in given[0]}
    loop = torch.stack([layer(one) for layer, one in zip(layers, x, strict=True)])
    close(vmap(call)(stacked, x), loop, f"{name} under vmap over layers")

    loss = lambda parameters, sample: call(parameters, sample.unsqueeze(0)).sin().sum()
    made = vmap(grad(loss), (None, 0))(parameters, x[0])
    for i, sample in enumerate(x[0]):
        for key, expected in _gradients(layers[0], sample.unsqueeze(0)).items():
            close(made[key][i], expected, f"{name}, gradient of {key} for sample {i} under vmap")


@feature("jvp", "forward mode")
def check_jvp(cls: type[DynamicConv], arguments: Arguments) -> None:
    """jvp and dual numbers are the transpose of backward; jacrev holds backward's rows."""
    layer, x = randomized(cls, arguments), example(cls, arguments, 2)
    call, parameters = _functional(layer)
    primals = {"input": x, **parameters}
    tangents = {key: torch.randn_like(t) for key, t in primals.items()}
    whole = lambda given: call({key: given[key] for key in parameters}, given["input"])
    output, moved = jvp(whole, (primals,), (tangents,))[:2]
    close(output, layer(x), f"{cls.__name__} under jvp")

    cotangent = torch.randn_like(output)
    backward = _gradients(layer, x, lambda y: (y * cotangent).sum(), with_input=True)
    expected = sum((g * tangents[key]).sum() for key, g in backward.items())
    close((moved * cotangent).sum(), torch.as_tensor(expected), f"{cls.__name__}: jvp")

    with torch.autograd.forward_ad.dual_level():
        dual = {k: torch.autograd.forward_ad.make_dual(t, tangents[k]) for k, t in primals.items()}
        tangent = torch.autograd.forward_ad.unpack_dual(whole(dual)).tangent
        close(tangent, moved, f"{cls.__name__} on dual numbers")

    rows = jacrev(lambda x: call(parameters, x).flatten()[:FEW])(x)
    for i, row in enumerate(rows):
        one = lambda y, i=i: y.flatten()[i]
        close(row, _gradients(layer, x, one, with_input=True)["input"], f"{cls.__name__}: jacrev")


@feature("double_backward", "double backward")
def check_double_backward(cls: type[DynamicConv], arguments: Arguments) -> None:
    """The gradient of a gradient is that of torch.func, which the reference serves."""
    layer, x = randomized(cls, arguments), example(cls, arguments, 2)
    call, parameters = _functional(layer)
    loss = lambda parameters, x: call(parameters, x).sin().sum()
    direction = torch.randn_like(x)
    along = lambda parameters, x: (grad(loss, 1)(parameters, x) * direction).sum()
    expected = grad(along, (0, 1))(parameters, x)

    x = x.requires_grad_()
    (first,) = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
    named = dict(layer.named_parameters())
    wanted = [*named.values(), x]
    second = torch.autograd.grad((first * direction).sum(), wanted, allow_unused=True)
    for key, found in zip([*named, "input"], second, strict=True):
        reference = expected[1] if key == "input" else expected[0][key]
        found = torch.zeros_like(reference) if found is None else found
        close(found, reference, f"{cls.__name__}: second gradient of {key}")


@feature("checkpoint", "checkpointing")
def check_checkpoint(cls: type[DynamicConv], arguments: Arguments) -> None:
    """Activation checkpointing, of both kinds, gives the same gradients bit for bit."""
    layer, x = randomized(cls, arguments).train(), example(cls, arguments)
    expected = _trained(copy.deepcopy(layer), x, lambda layer, x: layer(x))
    for reentrant in (False, True):
        run = lambda layer, x, kind=reentrant: checkpoint(layer, x, use_reentrant=kind)
        for key, tensor in _trained(copy.deepcopy(layer), x, run).items():
            what = f"{cls.__name__}, use_reentrant={reentrant}: {key} differs"
            require(torch.equal(tensor, expected[key]), what)


def _functional(layer: DynamicConv) -> tuple[Callable[[Tensors, Tensor], Tensor], Tensors]:
    """The layer as a function of its parameters and buffers and the input, and the parameters."""
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    return lambda tensors, x: functional_call(layer, tensors, (x,)), parameters


def _tensors(layer: DynamicConv) -> Tensors:
    named = (*layer.named_parameters(), *layer.named_buffers())
    return {name: tensor.detach() for name, tensor in named}


def _gradients(
    layer: DynamicConv,
    x: Tensor,
    loss: Callable[[Tensor], Tensor] = lambda y: y.sin().sum(),
    with_input: bool = False,
) -> Tensors:
    """The gradients of loss(layer(x)) by name, zeros where there is none."""
    x = x.detach().requires_grad_()
    named = {**({"input": x} if with_input else {}), **dict(layer.named_parameters())}
    found = torch.autograd.grad(loss(layer(x)), list(named.values()), allow_unused=True)
    filled = [
        torch.zeros_like(t) if g is None else g for g, t in zip(found, named.values(), strict=True)
    ]
    return dict(zip(named, filled, strict=True))


def _trained(layer: DynamicConv, x: Tensor, run: Callable[..., Tensor]) -> Tensors:
    """The output and every gradient of one step of training."""
    torch.manual_seed(0)
    x = x.detach().requires_grad_()
    output = run(layer, x)
    output.sin().sum().backward()
    named = {"input": x, **dict(layer.named_parameters())}
    gradients = {f"gradient of {k}": t.grad for k, t in named.items() if t.grad is not None}
    return {"output": output.detach(), **gradients}
