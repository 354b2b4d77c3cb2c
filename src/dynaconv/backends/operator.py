"""What the operators of eager and native share, from two functions each.

That is schema, fake kernel, autograd and vmap.
An operator `dynaconv::name` computes forward; `dynaconv::name_backward` computes the gradients of
its differentiable tensors. The gradient of that backward is taken from the reference formula, so
that double backward works.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

GEOMETRY = "SymInt[] stride, SymInt[] padding, SymInt[] dilation"


class Operator:
    """A forward function and its backward, registered with torch.library.

    Args:
        name: of the operator in namespace "dynaconv".
        tensors: names of the tensor arguments; one with a "?" may be None.
        shared: those among them that have no batch dimension.
        settings: schema of the arguments after the tensors.
        forward: (*tensors, *settings) -> output.
        backward: (grad, *tensors, *settings, mask) -> one gradient a tensor, those that the mask
            does not ask for of any content.
        reference: (*tensors, *settings) -> output, differentiable to any order.
        shape: (*tensors, *settings) -> the output's shape.
        flops: (*shapes of the tensors, *settings, shape of the output) -> operations.
        register: torch.library.custom_op, or what takes the same arguments.
    """

    def __init__(
        self,
        name: str,
        tensors: Sequence[str],
        shared: Sequence[str],
        settings: str,
        forward: Callable[..., Tensor],
        backward: Callable[..., list[Tensor | None]],
        reference: Callable[..., Tensor],
        shape: Callable[..., tuple[int, ...]],
        flops: Callable[..., int],
        register: Callable[..., Any] = custom_op,
    ) -> None:
        self.signature = (tensors, shared, settings)
        self.count = len(tensors)
        self.shared = [t.rstrip("?") in shared for t in tensors]
        self.reference, self.shape, self.flops = reference, shape, flops
        self._forward, self._backward = forward, backward
        arguments = ", ".join(f"Tensor{'?' * t.endswith('?')} {t.rstrip('?')}" for t in tensors)
        schema = f"{arguments}, {settings}"
        self.forward = register(
            f"dynaconv::{name}",
            self._forward_kernel,
            mutates_args=(),
            schema=f"({schema}) -> Tensor",
        )
        self.backward = register(
            f"dynaconv::{name}_backward",
            self._backward_kernel,
            mutates_args=(),
            schema=f"(Tensor grad, {schema}, bool[] mask) -> Tensor[]",
        )
        self.forward.register_fake(self._forward_fake)
        self.backward.register_fake(self._backward_fake)
        self.forward.register_autograd(self._forward_gradient, setup_context=self._save)
        self.backward.register_autograd(self._backward_gradient, setup_context=self._save_backward)
        self.forward.register_vmap(self._forward_vmap)
        self.backward.register_vmap(self._backward_vmap)
        register_flop_formula(getattr(torch.ops.dynaconv, name))(self._forward_flops)
        register_flop_formula(getattr(torch.ops.dynaconv, f"{name}_backward"))(self._backward_flops)

    def __call__(self, *args: Any) -> Tensor:
        return self.forward(*args)

    def twin(
        self,
        name: str,
        forward: Callable[..., Tensor],
        backward: Callable[..., list[Tensor | None]],
        register: Callable[..., Any] = custom_op,
    ) -> "Operator":
        """The same operator computed in another way."""
        formula = (self.reference, self.shape, self.flops)
        return Operator(name, *self.signature, forward, backward, *formula, register)

    # Kernels -------------------------------------------------------------------------------

    def _forward_kernel(self, *args: Any) -> Tensor:
        return self._forward(*args).contiguous(memory_format=memory_format(args[0]))

    def _backward_kernel(self, grad: Tensor, *args: Any) -> list[Tensor]:
        *args, mask = args  # type: ignore[assignment]
        gradients = self._backward(grad, *args, mask)
        return [
            g.reshape(t.shape).contiguous(memory_format=memory_format(t))
            if wanted and g is not None
            else grad.new_empty(0)
            for g, t, wanted in zip(gradients, args, mask, strict=False)
        ]

    def _forward_fake(self, *args: Any) -> Tensor:
        return output_like(args[0], self.shape(*args))

    def _backward_fake(self, grad: Tensor, *args: Any) -> list[Tensor]:
        *args, mask = args  # type: ignore[assignment]
        return [
            gradient_like(t) if wanted else grad.new_empty(0)
            for t, wanted in zip(args, mask, strict=False)
        ]

    def _forward_flops(self, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return self.flops(*args, out_shape)

    def _backward_flops(self, grad: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        """Once for the input's gradient, once for those of everything else that is asked for."""
        *args, mask = args  # type: ignore[assignment]
        return (mask[0] + any(mask[1:])) * self.flops(*args, grad)

    # Gradients -----------------------------------------------------------------------------

    def _save(self, ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[: self.count])
        ctx.settings = inputs[self.count :]

    def _forward_gradient(self, ctx: Any, grad: Tensor) -> tuple:
        tensors = ctx.saved_tensors
        mask = [bool(n) for n in ctx.needs_input_grad[: self.count]]
        gradients = self.backward(grad, *tensors, *ctx.settings, mask)
        wanted = [g if n else None for g, n in zip(gradients, mask, strict=True)]
        return (*wanted, *[None] * len(ctx.settings))

    def _save_backward(self, ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
        ctx.save_for_backward(*inputs[: 1 + self.count])
        ctx.settings = inputs[1 + self.count :]

    def _backward_gradient(self, ctx: Any, grads: list[Tensor]) -> tuple:
        *settings, mask = ctx.settings
        needs = ctx.needs_input_grad[: 1 + self.count]
        with torch.enable_grad():
            # A view, for one tensor may have been computed from another: that path is not ours.
            leaf = lambda t, n: t.view_as(t) if t.requires_grad else t.detach().requires_grad_(n)
            saved: list[Any] = [
                t if t is None else leaf(t, n)
                for t, n in zip(ctx.saved_tensors, needs, strict=True)
            ]
            grad, *tensors = saved
            asked = [
                t.detach().requires_grad_() if t is not None and m and not t.requires_grad else t
                for t, m in zip(tensors, mask, strict=True)
            ]
            output = self.reference(*asked, *settings)
            first = torch.autograd.grad(
                output, [t for t, m in zip(asked, mask, strict=True) if m], grad, create_graph=True
            )
            cotangents = [g for g, m in zip(grads, mask, strict=True) if m]
            # A gradient may depend on nothing that is differentiated, e.g. the bias's.
            pairs = [(f, c) for f, c in zip(first, cotangents, strict=True) if f.requires_grad]
            inputs = [t for t, n in zip([grad, *asked], needs, strict=True) if n and t is not None]
            second = _gradients(pairs, inputs)
        gradients = [
            next(second) if n and t is not None else None
            for t, n in zip([grad, *asked], needs, strict=True)
        ]
        return (*gradients, *[None] * len(ctx.settings))

    # vmap ----------------------------------------------------------------------------------

    def _forward_vmap(self, info: Any, in_dims: tuple, *args: Any) -> tuple[Tensor, int]:
        if any(s and d is not None for s, d in zip(self.shared, in_dims, strict=False)):
            return torch.stack(_each(self.forward, info, in_dims, args)), 0
        folded = _fold(info, in_dims, args, self.shared)
        return self.forward(*folded).unflatten(0, (info.batch_size, -1)), 0

    def _backward_vmap(self, info: Any, in_dims: tuple, *args: Any) -> tuple[list[Tensor], list]:
        mask = args[-1]
        shared = [False, *self.shared]
        mapped = any(s and d is not None for s, d in zip(shared, in_dims, strict=False))
        if mapped or any(s and m for s, m in zip(self.shared, mask, strict=True)):
            runs = _each(self.backward, info, in_dims, args)
            return [torch.stack(g) for g in zip(*runs, strict=True)], [0] * self.count
        gradients = self.backward(*_fold(info, in_dims, args, shared))
        split = [
            g.unflatten(0, (info.batch_size, -1)) if m else g
            for g, m in zip(gradients, mask, strict=True)
        ]
        return split, [0 if m else None for m in mask]


def _gradients(pairs: list[tuple[Tensor, Tensor]], inputs: list[Tensor]) -> Iterator[Tensor | None]:
    """The inputs' gradients of sum_i <output_i, cotangent_i>, None where there is none."""
    if not pairs:
        return iter([None] * len(inputs))
    outputs, cotangents = zip(*pairs, strict=True)
    return iter(
        torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True, create_graph=True)
    )


def _each(op: Callable, info: Any, in_dims: tuple, args: tuple) -> list:
    """The operator once for each slice along the mapped dimension."""
    at = lambda a, d, i: a.select(d, i) if isinstance(a, Tensor) and d is not None else a
    return [
        op(*[at(a, d, i) for a, d in zip(args, in_dims, strict=True)])
        for i in range(info.batch_size)
    ]


def _fold(info: Any, in_dims: tuple, args: tuple, shared: Sequence[bool]) -> list:
    """The arguments with the mapped dimension folded into the batch."""
    folded = []
    for i, (a, d) in enumerate(zip(args, in_dims, strict=True)):
        if isinstance(a, Tensor) and not (i < len(shared) and shared[i]):
            a = a.expand(info.batch_size, *a.shape) if d is None else a.movedim(d, 0)
            a = a.flatten(0, 1)
        folded.append(a)
    return folded


def few_at_a_time(batch: int, size: int) -> Iterator[slice]:
    """Slices of the batch of `size` samples, the last perhaps shorter."""
    for start in range(0, batch, size):
        yield slice(start, min(start + size, batch))


def memory_format(input: Tensor) -> torch.memory_format:
    """channels_last where the input is (and not contiguous as well), else contiguous."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    format = formats.get(input.dim())
    if format is None or input.is_contiguous() or not input.is_contiguous(memory_format=format):
        return torch.contiguous_format
    return format


def output_like(input: Tensor, shape: Sequence[int]) -> Tensor:
    """An empty output (N, C_out, *L_out) in the input's layout and dtype."""
    return torch.empty(
        tuple(shape), dtype=input.dtype, device=input.device, memory_format=memory_format(input)
    )


def gradient_like(tensor: Tensor) -> Tensor:
    """An empty gradient in the tensor's layout (dense)."""
    return torch.empty(
        tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=memory_format(tensor)
    )
