"""What the Triton kernels and their launches share.

Kernels see every tensor as (N, C, P), its positions flattened, and every geometry in three
dimensions, those that are missing of length 1. Kernel, stride, padding and dilation are constants
of the compiled code; sizes are not, so that images of any size share it.
"""

from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynaconv.shapes import Geometry

# mypy: disable-error-code="no-untyped-def"
INTERPRETING: bool = triton.knobs.runtime.interpret
ANNOTATIONS: dict[str, Any] = {
    "Tensor": Tensor,
    "Optional[Tensor]": Tensor | None,
    "List[Tensor]": list[Tensor],
    "List[int]": list[int],
    "List[bool]": list[bool],
    "int": int,
}
# Elements from which on an address needs 64 bits.
MANY = 2**31


class First:
    """A kernel under the interpreter, which has nothing to tune: with its first configuration."""

    def __init__(self, kernel: Any, config: triton.Config) -> None:
        self.kernel, self.config = kernel, config

    def __getitem__(self, grid: Any) -> Callable:
        chosen = self.config.kwargs
        return lambda *args, **kwargs: self.kernel[grid](*args, **chosen, **kwargs)


def tuned(
    configs: Sequence[dict[str, int]], key: Sequence[str], **options: Any
) -> Callable[[Any], Any]:
    """Decorator of a @triton.jit kernel: the fastest of `configs` for each value of `key`.

    "warps" and "stages" of a configuration are Triton's num_warps and num_stages.
    """

    def decorate(kernel: Any) -> Any:
        made = [
            triton.Config(
                {name: n for name, n in config.items() if name not in ("warps", "stages")},
                num_warps=config.get("warps", 4),
                num_stages=config.get("stages", 2),
            )
            for config in configs
        ]
        if INTERPRETING:
            return First(kernel, made[0])
        return triton.autotune(made, list(key), cache_results=True, **options)(kernel)

    return decorate


def launch(kernel: Any) -> Any:
    """The kernel as torch.library.triton_op wants it."""
    return kernel if INTERPRETING else torch.library.wrap_triton(kernel)


def three(values: Sequence[Any], fill: Any) -> list[Any]:
    """Values of up to three dimensions as three, `fill` before them."""
    return [fill] * (3 - len(values)) + list(values)


def rows_of(tensor: Tensor) -> Tensor:
    """(N, C, *L) as (N, P, C) in one piece: a view where the channels are last in memory."""
    return tensor.flatten(2).transpose(1, 2).contiguous()


def bound(positions: int) -> int:
    """A power of four near the number of positions: what tiles are tuned for, beside channels."""
    return next((4**e for e in range(3, 9) if positions <= 4**e), 4**9)


def sizes_of(input: Tensor, output: Tensor) -> list[int]:
    """The spatial shapes of a convolution's input and output, three numbers each."""
    return three(input.shape[2:], 1) + three(output.shape[2:], 1)


def constants(geometry: Geometry) -> dict[str, int]:
    """Kernel, stride, padding and dilation as the kernels' constants K0 ... D2."""
    fills = {"K": 1, "S": 1, "P": 0, "D": 1}
    return {
        f"{letter}{d}": value
        for (letter, fill), values in zip(fills.items(), geometry, strict=True)
        for d, value in enumerate(three(values, fill))
    }


def geometry_of(kernel: Sequence[int], settings: Sequence[Any]) -> Geometry:
    """From the operator's lists."""
    return Geometry(tuple(kernel), *map(tuple, settings[:3]))


def reach(tensor: Tensor) -> int:
    """One more than the largest offset of an element of the tensor."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((n - 1) * step for n, step in steps)


def precision(tensor: Tensor) -> str:
    """Of products of float32: tf32 where torch's own convolutions may use it."""
    allowed = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if allowed and tensor.dtype == torch.float32 else "ieee"


def far(*tensors: Tensor | None) -> bool:
    """Whether an address in one of the tensors needs 64 bits."""
    return any(t is not None and reach(t) >= MANY for t in tensors)


def register(name: str, function: Callable, mutates_args: Sequence[str], schema: str) -> Any:
    """torch.library.triton_op with the schema that is given, which it else reads off a signature.

    A triton_op is open to torch.compile, a custom_op is not.
    """
    parsed = torch._C.parse_schema(f"name{schema}")
    made = lambda *args: function(*args)
    parameters = [
        Parameter(a.name, Parameter.POSITIONAL_OR_KEYWORD, annotation=ANNOTATIONS[str(a.type)])
        for a in parsed.arguments
    ]
    returned = ANNOTATIONS[str(parsed.returns[0].type)]
    made.__signature__ = Signature(parameters, return_annotation=returned)  # type: ignore[attr-defined]
    return torch.library.triton_op(name, made, mutates_args=mutates_args)


# Inside kernels ---------------------------------------------------------------------------------


@triton.jit
def wide(index, FAR: tl.constexpr):
    """The index in 64 bits where addresses need them."""
    if FAR:
        index = index.to(tl.int64)
    return index


@triton.jit
def seen_at(
    o0, o1, o2, k, L0, L1, L2,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """Which input position tap k sees from output position (o0, o1, o2), and whether it exists.

    What depends on one of the two only is computed before they are broadcast against each other.
    """
    b0, b1, b2 = o0 * S0 - P0, o1 * S1 - P1, o2 * S2 - P2
    d0, d1, d2 = k // (K1 * K2) * D0, k // K2 % K1 * D1, k % K2 * D2
    inside = (b2 + d2 >= 0) & (b2 + d2 < L2)
    if K1 > 1 or P1 > 0:
        inside = inside & (b1 + d1 >= 0) & (b1 + d1 < L1)
    if K0 > 1 or P0 > 0:
        inside = inside & (b0 + d0 >= 0) & (b0 + d0 < L0)
    return ((b0 * L1 + b1) * L2 + b2) + ((d0 * L1 + d1) * L2 + d2), inside


@triton.jit
def seen_from(
    q0, q1, q2, k, O0, O1, O2,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """Which output position sees input position (q0, q1, q2) by tap k, and whether one does."""
    b0, b1, b2 = q0 + P0, q1 + P1, q2 + P2
    d0, d1, d2 = k // (K1 * K2) * D0, k // K2 % K1 * D1, k % K2 * D2
    if S0 == 1 and S1 == 1 and S2 == 1:
        inside = (b2 - d2 >= 0) & (b2 - d2 < O2)
        inside = inside & (b1 - d1 >= 0) & (b1 - d1 < O1)
        inside = inside & (b0 - d0 >= 0) & (b0 - d0 < O0)
        at = ((b0 * O1 + b1) * O2 + b2) - ((d0 * O1 + d1) * O2 + d2)
    else:
        t0, t1, t2 = b0 - d0, b1 - d1, b2 - d2
        inside = (t0 >= 0) & (t1 >= 0) & (t2 >= 0)
        inside = inside & (t0 % S0 == 0) & (t1 % S1 == 0) & (t2 % S2 == 0)
        inside = inside & (t0 // S0 < O0) & (t1 // S1 < O1) & (t2 // S2 < O2)
        at = (t0 // S0 * O1 + t1 // S1) * O2 + t2 // S2
    return at, inside
