"""What every family promises, as checks that anybody can run on a family of their own.

    dynaconv.testing.check_family("odconv")

Each check takes a class (one rank of a family) and constructor arguments, and raises
AssertionError with what was found. `CHECKS` lists them; a family is covered by being registered.
"""

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynaconv.dispatch import backends, down_from
from dynaconv.layers.base import ConvNd, DynamicConv
from dynaconv.masking import mask_from_sizes, sizes_from_mask
from dynaconv.registry import family
from dynaconv.testing.tolerance import close

SIZES = {1: (11,), 2: (9, 10), 3: (6, 7, 8)}
Arguments = dict[str, Any]
Check = Callable[[type[DynamicConv], Arguments], None]


def check_family(name: str) -> int:
    """Runs every check on every rank, form and sample of a family; the number of checks run."""
    run = 0
    for cls in family(name).all_classes:
        for arguments in cls.samples(cls.rank):
            for check in checks(arguments):
                check(cls, arguments)
                run += 1
    return run


def checks(arguments: Arguments) -> list[Check]:
    """Those that apply to a layer of these arguments."""
    return [*CHECKS, check_causal] if arguments.get("causal") else CHECKS


# Tools -------------------------------------------------------------------------------------


def example(cls: type[DynamicConv], arguments: Arguments, batch: int = 3) -> Tensor:
    """Fresh float64 input (batch, C_in, *L) of odd and even sizes."""
    return torch.randn(batch, arguments["in_channels"], *SIZES[cls.rank], dtype=torch.float64)


def randomized(cls: type[DynamicConv], arguments: Arguments) -> DynamicConv:
    """A layer in float64 and evaluation mode with every parameter drawn anew, within its bounds.

    No zero start stays that could hide a fault.
    """
    layer = cls(**arguments).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
        for module in layer.modules():
            if isinstance(module, _BatchNorm):
                module.weight.uniform_(0.5, 1.5)
                module.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    layer.keep_inside()
    return layer


def static_conv(cls: type[DynamicConv], arguments: Arguments) -> ConvNd:
    """The nn.ConvNd (or nn.ConvTransposeNd) of the same arguments, in float64."""
    return cls.static[cls.rank](**cls.as_static(arguments, SIZES[cls.rank])).double()


def output_shape(layer: DynamicConv, arguments: Arguments, x: Tensor) -> tuple[int, ...]:
    """nn.ConvNd's for x, or what the layer's own mask says where it goes its own way."""
    if layer.sized_like_conv:
        return tuple(static_conv(type(layer), arguments)(x).shape)
    size = layer.output_mask(x.new_ones(len(x), *x.shape[2:]).bool()).shape[1:]
    return (len(x), layer.out_channels, *size)


def require(condition: object, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def _crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """The first `size` positions of each spatial dimension."""
    for d, length in enumerate(size):
        x = x.narrow(2 + d, 0, length)
    return x


# Checks ------------------------------------------------------------------------------------


def check_shapes(cls: type[DynamicConv], arguments: Arguments) -> None:
    """Output shapes are nn.ConvNd's, over stride, padding and dilation."""
    for change in (
        {},
        {"stride": 2, "padding": 1},
        {"stride": 3, "padding": 0, "dilation": 2},
        {"dilation": 2, "padding": 2},
        {"stride": 1, "padding": "same"},
        {"stride": 1, "padding": "valid"},
    ):
        changed = arguments | change
        try:
            layer = cls(**changed).double()
        except ValueError:
            require(change, f"{cls.__name__} refuses its own sample {arguments}")
            continue
        x = example(cls, changed)
        expected = output_shape(layer, changed, x)
        require(layer(x).shape == expected, f"{layer}: {layer(x).shape}, nn.ConvNd {expected}")
        require(layer(x[0]).shape == expected[1:], f"{layer}: unbatched input")
        require(layer(x[:0]).shape == (0, *expected[1:]), f"{layer}: empty batch")


def check_backends(cls: type[DynamicConv], arguments: Arguments) -> None:
    """Every backend gives the reference's output and gradients."""
    layer, x = randomized(cls, arguments), example(cls, arguments)
    results = {}
    for name in ("reference", *backends()):
        with down_from(name):
            x = x.detach().requires_grad_()
            output = layer(x)
            results[name] = (
                output,
                *torch.autograd.grad(output.sin().sum(), [x, layer_weight(layer)]),
            )
    for name, tensors in results.items():
        for what, tensor, expected in zip(
            ("output", "input gradient", "weight gradient"),
            tensors,
            results["reference"],
            strict=True,
        ):
            close(tensor, expected, f"{cls.__name__} {what} on backend {name}")


def layer_weight(layer: nn.Module) -> nn.Parameter:
    """The largest parameter: the kernels, whatever their name."""
    return max(layer.parameters(), key=torch.numel)


def check_padding_promise(cls: type[DynamicConv], arguments: Arguments) -> None:
    """Real positions of a padded batch hold what each sample gives alone."""
    layer, x = randomized(cls, arguments), example(cls, arguments)
    full = torch.tensor(SIZES[cls.rank])
    sizes = torch.stack([full, full - 1, (full * 2) // 3])
    mask = mask_from_sizes(sizes, SIZES[cls.rank])
    x = x.masked_fill(~mask.unsqueeze(1), 1e3)  # what lies in the padding must not matter
    output, out_sizes = layer(x, mask), sizes_from_mask(layer.output_mask(mask))
    for n, size in enumerate(sizes.tolist()):
        alone = layer(_crop(x[n : n + 1], size))
        require(
            list(alone.shape[2:]) == out_sizes[n].tolist(),
            f"{cls.__name__}: output_mask says {out_sizes[n].tolist()}, alone {alone.shape}",
        )
        real = _crop(output[n : n + 1], alone.shape[2:])
        close(real, alone, f"{cls.__name__}, sample {n} in a padded batch")


def check_from_conv(cls: type[DynamicConv], arguments: Arguments) -> None:
    """from_conv keeps the function, or says why the family cannot."""
    x = example(cls, arguments)
    static = cls.as_static(arguments, SIZES[cls.rank])
    options = {k: v for k, v in arguments.items() if k not in static}
    depthwise = {"in_channels": 4, "out_channels": 4, "groups": 4}
    for change in ({}, depthwise):
        conv = static_conv(cls, arguments | change)
        try:
            layer = cls.from_conv(conv, **options)
        except ValueError as error:
            require(len(str(error)) > 20, f"{cls.__name__}: a refusal without a reason: {error}")
            continue
        for mode in (True, False):
            output = layer.train(mode)(x[:, : conv.in_channels])
            close(output, conv(x[:, : conv.in_channels]), f"{cls.__name__}.from_conv")


def check_batch_independence(cls: type[DynamicConv], arguments: Arguments) -> None:
    """In evaluation a sample's output does not depend on its neighbours."""
    layer, x = randomized(cls, arguments), example(cls, arguments)
    for n in range(len(x)):
        close(layer(x)[n], layer(x[n : n + 1])[0], f"{cls.__name__}, sample {n} in a batch")


def check_training(cls: type[DynamicConv], arguments: Arguments) -> None:
    """Gradients reach every parameter, and steps lower the loss, at batch 3 and at batch 1."""
    for batch in (3, 1):
        layer = randomized(cls, arguments).train()
        x = example(cls, arguments, batch)
        target = torch.randn_like(layer(x))
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
        losses = []
        for _ in range(5):
            loss = (layer(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.item())
            for name, parameter in layer.named_parameters():
                require(parameter.grad is not None, f"{cls.__name__}: {name} has no gradient")
                require(parameter.grad.isfinite().all(), f"{cls.__name__}: {name} is not finite")  # type: ignore[union-attr]
                # With one expert or branch a softmax is 1 whatever its logits.
                excused = "select" in name or name in cls.absorbed or batch == 1
                alive = excused or parameter.grad.any()  # type: ignore[union-attr]
                require(alive, f"{cls.__name__}: the gradient of {name} is zero")
            optimizer.step()
        require(losses[-1] < losses[0], f"{cls.__name__}: losses {losses} at batch {batch}")


def check_masked_training(cls: type[DynamicConv], arguments: Arguments) -> None:
    """With a padding mask, what lies in the padding gets no gradient and has no influence."""
    layer, x = randomized(cls, arguments).train(), example(cls, arguments)
    full = torch.tensor(SIZES[cls.rank])
    mask = mask_from_sizes(torch.stack([full, full - 1, full - 2]), SIZES[cls.rank])
    out_mask = layer.output_mask(mask).unsqueeze(1)
    outputs = []
    for filler in (0.0, 1e3):
        filled = x.masked_fill(~mask.unsqueeze(1), filler).requires_grad_()
        output = copy.deepcopy(layer)(filled, mask).masked_fill(~out_mask, 0)
        outputs.append(output)
        (gradient,) = torch.autograd.grad(output.square().sum(), filled)
        leak = gradient.masked_select(~mask.unsqueeze(1)).abs().max()
        require(leak == 0, f"{cls.__name__}: padding gets gradient {leak:.3g}")
    close(outputs[1], outputs[0], f"{cls.__name__} in training with another padding")


def check_state(cls: type[DynamicConv], arguments: Arguments) -> None:
    """state_dict, deepcopy and saving keep the function; the repr names the options."""
    layer, x = randomized(cls, arguments), example(cls, arguments)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = cls(**arguments).double().eval()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    close(fresh(x), layer(x), f"{cls.__name__} from its state_dict", 0)
    close(copy.deepcopy(layer)(x), layer(x), f"{cls.__name__}, deep copy", 0)
    for name, value in arguments.items():
        shown = f"{name}={value!r}" in repr(layer) or name in ("in_channels", "out_channels")
        shown = shown or value in (layer.kernel_size, True) or name in ("kernel_size", "padding")
        require(shown or name in ("groups", "stride"), f"{name} is not in {layer!r}")


def check_kernels(cls: type[DynamicConv], arguments: Arguments) -> None:
    """kernels(input) names finite tensors, one entry a sample."""
    layer, x = randomized(cls, arguments), example(cls, arguments)
    kernels = layer.kernels(x)
    require(kernels, f"{cls.__name__}: kernels() is empty")
    for name, tensor in kernels.items():
        require(len(tensor) == len(x), f"{cls.__name__}: {name} has shape {tuple(tensor.shape)}")
        require(tensor.isfinite().all(), f"{cls.__name__}: {name} is not finite")


def check_dtypes(cls: type[DynamicConv], arguments: Arguments) -> None:
    """Half precision, plain and under autocast: the dtype that nn.ConvNd gives, finite values."""
    x = example(cls, arguments)
    expected = randomized(cls, arguments)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = copy.deepcopy(expected).to(dtype)
        output = layer(x.to(dtype))
        require(output.dtype == dtype, f"{cls.__name__} in {dtype} gives {output.dtype}")
        require(output.isfinite().all(), f"{cls.__name__} in {dtype} is not finite")
    layer = copy.deepcopy(expected).float()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x.float())
        static = static_conv(cls, arguments).float()(x.float())
    require(output.dtype == static.dtype, f"{cls.__name__} under autocast gives {output.dtype}")
    error = (output.double() - expected(x)).abs().max() / expected(x).abs().max()
    require(error < 0.1, f"{cls.__name__} under autocast is off by {error:.3g}")


def check_layouts(cls: type[DynamicConv], arguments: Arguments) -> None:
    """Non-contiguous and channels_last input give the same, the latter in its layout."""
    layer, x = randomized(cls, arguments), example(cls, arguments)
    expected = layer(x)
    views = {"transposed": x.transpose(0, -1).contiguous().transpose(0, -1)}
    views["strided"] = torch.stack([x, x], -1)[..., 0]
    if cls.rank > 1:
        format = torch.channels_last if cls.rank == 2 else torch.channels_last_3d
        views["channels_last"] = x.to(memory_format=format)
    for name, view in views.items():
        output = layer(view)
        close(output, expected, f"{cls.__name__} on {name} input")
    if cls.rank > 1:
        kept = output.is_contiguous(memory_format=format)
        require(kept, f"{cls.__name__} loses channels_last: strides {output.stride()}")


def check_refusals(cls: type[DynamicConv], arguments: Arguments) -> None:
    """Bad input is refused before any work, by name."""
    layer, x = cls(**arguments).double(), example(cls, arguments)
    shape = (len(x), *x.shape[2:])
    refused: list[tuple[type[Exception], str, Callable]] = [
        (ValueError, "input has shape", lambda: layer(x[:, :-1])),
        (ValueError, "input has shape", lambda: layer(x[0, 0])),
        (ValueError, "padding_mask has shape", lambda: layer(x, torch.ones(2, 2).bool())),
        (TypeError, "padding_mask has dtype", lambda: layer(x, torch.ones(shape))),
        (TypeError, "has no option", lambda: cls(**arguments, no_such_option=1)),
        (ValueError, "groups", lambda: cls(**arguments | {"in_channels": 5, "groups": 2})),
        (ValueError, "stride", lambda: cls(**arguments | {"stride": 0})),
        (ValueError, "replaces", lambda: cls.from_conv(nn.Linear(2, 2))),  # type: ignore[arg-type]
    ]
    for error, text, call in refused:
        try:
            call()
        except error as raised:
            require(text in str(raised), f"{cls.__name__}: {raised!r} does not say {text!r}")
        else:
            raise AssertionError(f"{cls.__name__}: no {error.__name__} about {text!r}")


def check_causal(cls: type[DynamicConv], arguments: Arguments) -> None:
    """An output depends on nothing after it, and comes out of steps as out of the whole."""
    layer, x = randomized(cls, arguments), example(cls, arguments)
    whole = layer(x)
    require(whole.shape[2] == x.shape[2], f"{cls.__name__}: {tuple(whole.shape)} for {x.shape}")
    for length in (1, x.shape[2] // 2):
        close(layer(x[..., :length]), whole[..., :length], f"{cls.__name__} of a beginning")
    state, outputs = None, []
    for position in x.unbind(2):
        output, state = layer.step(position, state)
        outputs.append(output)
    close(torch.stack(outputs, 2), whole, f"{cls.__name__} step by step")


CHECKS: list[Check] = [
    check_shapes,
    check_backends,
    check_padding_promise,
    check_from_conv,
    check_batch_independence,
    check_training,
    check_masked_training,
    check_state,
    check_kernels,
    check_dtypes,
    check_layouts,
    check_refusals,
]
