"""What the Triton kernels and their launches share.

Kernels see every tensor as (N, C, P), its positions flattened, and every geometry in three
dimensions, those that are missing of length 1. Kernel, stride, padding and dilation are constants
of the compiled code; sizes are not, so that images of any size share it.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from inspect import Parameter, Signature
from math import gcd, prod
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch._library.triton import is_wrap_triton_enabled

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
# Calls: compiled kernel, tile and constants. At most MOST, then they are learned anew.
KNOWN: dict[tuple, tuple] = {}
MOST = 4096
LEARNING = Lock()


class First:
    """A kernel under the interpreter, which has nothing to tune: with its first configuration."""

    def __init__(self, kernel: Any, configs: list[triton.Config]) -> None:
        self.kernel, self.configs = kernel, configs

    def __getitem__(self, grid: Any) -> Callable:
        chosen = self.configs[0].kwargs
        return lambda *args, **kwargs: self.kernel[grid](*args, **chosen, **kwargs)


def seconds(call: Callable[[], object], quantiles: Sequence[float]) -> Any:
    """What tuning compares: fewer calls than Triton would make, for there are many shapes."""
    return triton.testing.do_bench(call, warmup=5, rep=25, quantiles=quantiles)


def tuned(
    configs: Sequence[dict[str, int]], key: Sequence[str], **options: Any
) -> Callable[[Any], Any]:
    """Decorator of a @triton.jit kernel: the fastest of `configs` for each value of `key`.

    "warps" and "stages" of a configuration are Triton's num_warps and num_stages. `options` are
    triton.autotune's. Configurations are not pruned where a trial's traces have to be undone: once
    it has pruned them, torch.compile no longer undoes these.
    """
    if "prune_configs_by" in options and {"reset_to_zero", "restore_value"} & options.keys():
        raise ValueError("a kernel whose configurations are pruned can't undo what a trial did")

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
            return First(kernel, made)
        options.update(cache_results=True, do_bench=seconds)
        return triton.autotune(made, list(key), **options)(kernel)

    return decorate


def fitting(**covered: str) -> dict[str, Any]:
    """An option of `tuned`: without tiles half of which, along a side, cover nothing.

    Args:
        covered: for names of sides, the name of the argument that says how much there is.
    """

    def fits(configs: list[triton.Config], arguments: dict[str, Any], **constants: Any) -> list:
        for side, name in covered.items():
            most = max(2 * arguments[name] - 1, min(config.kwargs[side] for config in configs))
            configs = [config for config in configs if config.kwargs[side] <= most]
        return configs

    return {"prune_configs_by": {"early_config_prune": fits}}


class Launch:
    """A kernel as torch.library.triton_op wants it, called as `Launch(kernel)[grid](...)`.

    What Triton works out anew for each call, some 50 microseconds, is kept for calls of the same
    numbers, dtypes and alignment.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.names = kernel.arg_names

    def __getitem__(self, grid: Any) -> Callable:
        if is_wrap_triton_enabled():
            return torch.library.wrap_triton(self.kernel)[grid]
        return partial(self.run, grid)

    def run(self, grid: Any, *args: Any, **constants: Any) -> None:
        """Tensors are on one device: it need not be the current one."""
        device = args[0].device
        with torch.accelerator.device_index(device.index):
            kinds = [(a.dtype, a.data_ptr() % 16) if isinstance(a, Tensor) else a for a in args]
            key = (id(self.kernel), device, *kinds, *constants.values())
            if key not in KNOWN:
                self.learn(key, grid, args, constants)
            else:
                compiled, tile, rest = KNOWN[key]
                size = grid(tile) if callable(grid) else grid
                compiled[(*size, 1, 1)[:3]](*args, *rest)

    def learn(self, key: tuple, grid: Any, args: tuple, constants: dict[str, Any]) -> None:
        """The first call: Triton compiles, and tunes, which it does not in two threads at once."""
        with LEARNING:
            compiled = self.kernel[grid](*args, **constants)
            tile = self.kernel.best_config.kwargs if hasattr(self.kernel, "best_config") else {}
        given = constants | tile
        if len(KNOWN) >= MOST:
            KNOWN.clear()
        KNOWN[key] = compiled, tile, [given[name] for name in self.names[len(args) :]]


def launch(kernel: Any) -> Any:
    """The kernel, to be called as `launch(kernel)[grid](...)`."""
    return kernel if INTERPRETING else Launch(kernel)


def cdiv(number: int, part: int) -> int:
    """How many parts hold the number: triton.cdiv without its wrapper, some microseconds a call."""
    return -(-number // part)


def power_of_two(number: int) -> int:
    """The least that is not below the number: triton.next_power_of_2 without its wrapper."""
    return 1 << (int(number) - 1).bit_length()


def three(values: Sequence[Any], fill: Any) -> list[Any]:
    """Values of up to three dimensions as three, `fill` before them."""
    return [fill] * (3 - len(values)) + list(values)


def rows_of(tensor: Tensor, padding: Sequence[int] = ()) -> Tensor:
    """(N, C, *L) as (N, P, C) in one piece: a view where the channels are last in memory.

    With padding P is that of a grid with so many zeros on both sides of each dimension.
    """
    return transposed(tensor.flatten(2)) if not any(padding) else laid(tensor, padding)


def transposed(tensor: Tensor) -> Tensor:
    """(N, A, B) as (N, B, A) in one piece."""
    return laid(tensor, ()) if tensor.stride(1) != 1 else tensor.transpose(1, 2).contiguous()


def laid(tensor: Tensor, padding: Sequence[int]) -> Tensor:
    """(N, A, *L) as (N, P, A), with zeros around L."""
    sizes, around = three(tensor.shape[2:], 1), three(padding, 0)
    framed = [n + 2 * p for n, p in zip(sizes, around, strict=True)]
    flat = tensor.flatten(2)
    batch, rows, length = *flat.shape[:2], prod(framed)
    out = tensor.new_empty(batch, length, rows)
    if not out.numel():
        return out
    tile = tile_of(rows, length)
    grid = (batch * cdiv(rows, tile[0]) * cdiv(length, tile[1]),)
    launch(lay)[grid](
        out, flat, rows, length, *sizes, *framed, *flat.stride(),
        PADDED=any(around), FAR=far(out, flat), P0=around[0], P1=around[1], P2=around[2],
        ROWS=tile[0], LENGTH=tile[1],
    )  # fmt: skip
    return out


def tile_of(rows: int, length: int, numbers: int = 4096) -> tuple[int, int]:
    """The sides of a tile of a matrix: powers of two, 64 or what a short side leaves over."""
    short = lambda n: 64 if n >= 64 else power_of_two(n)
    tall, broad = short(rows), short(length)
    while tall * broad < numbers and rows >= 2 * tall:
        tall *= 2
    while tall * broad < numbers and length >= 2 * broad:
        broad *= 2
    return tall, broad


def framed(tensor: Tensor, padding: Sequence[int]) -> Tensor:
    """With so many zeros on both sides of each spatial dimension."""
    if not any(padding):
        return tensor
    return F.pad(tensor, [p for p in reversed(padding) for _ in range(2)])


def bound(positions: int) -> int:
    """A power of four near the number of positions: what tiles are tuned for, beside channels."""
    return next((4**e for e in range(3, 9) if positions <= 4**e), 4**9)


def sizes_of(input: Tensor, output: Tensor) -> list[int]:
    """The spatial shapes of a convolution's input and output, three numbers each."""
    return three(input.shape[2:], 1) + three(output.shape[2:], 1)


@cache
def constants(geometry: Geometry) -> dict[str, int]:
    """Kernel, stride, padding and dilation as the kernels' constants K0 ... D2, shared."""
    fills = {"K": 1, "S": 1, "P": 0, "D": 1}
    return {
        f"{letter}{d}": value
        for (letter, fill), values in zip(fills.items(), geometry, strict=True)
        for d, value in enumerate(three(values, fill))
    }


def even(**counts: int) -> dict[str, int]:
    """EVEN_..., for `within`: the largest powers of two, up to a tile's side, that divide them."""
    return {f"EVEN_{name}": gcd(int(count), 256) for name, count in counts.items()}


def geometry_of(kernel: Sequence[int], settings: Sequence[Any]) -> Geometry:
    """From the operator's lists. Taps are counted in compiled code: no symbols."""
    return Geometry(tuple(map(int, kernel)), *map(tuple, settings[:3]))


def reach(tensor: Tensor) -> int:
    """One more than the largest offset of an element of the tensor."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((n - 1) * step for n, step in steps)


def precision(tensor: Tensor) -> str:
    """Of products of float32: tf32 where torch's own convolutions may use it."""
    allowed = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if allowed and tensor.dtype == torch.float32 else "ieee"


def summed(tensor: Tensor) -> torch.dtype:
    """In which sums of its numbers are kept."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def far(*tensors: Tensor | None) -> bool:
    """Whether an address in one of the tensors needs 64 bits."""
    large = (t for t in tensors if t is not None and t.untyped_storage().nbytes() >= MANY)
    return any(reach(t) >= MANY for t in large)


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
def lay(
    out, source, rows, length, L0, L1, L2, H0, H1, H2, SN, SR, SP,
    PADDED: tl.constexpr, FAR: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    ROWS: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """out[n, p, r] = source[n, r, p], where L is in the middle of H and zeros are around it."""
    program = wide(tl.program_id(0), FAR)
    blocks, parts = tl.cdiv(length, LENGTH), tl.cdiv(rows, ROWS)
    p = (program % blocks * LENGTH + tl.arange(0, LENGTH))[:, None]
    r = (program // blocks % parts * ROWS + tl.arange(0, ROWS))[None, :]
    n = program // (blocks * parts)
    there = (p < length) & (r < rows)
    q, used = p, there
    if PADDED:
        h0, h1, h2 = p // (H1 * H2) - P0, p // H2 % H1 - P1, p % H2 - P2
        inside = (h0 >= 0) & (h0 < L0) & (h1 >= 0) & (h1 < L1) & (h2 >= 0) & (h2 < L2)
        q, used = (h0 * L1 + h1) * L2 + h2, there & inside
        # But for the ends of lines: threads side by side read numbers side by side.
        q = tl.max_contiguous(q, [LENGTH, 1])
    tile = tl.load(source + n * SN + r * SR + q * SP, mask=used, other=0)
    tl.store(out + n * length * rows + p * rows + r, tile, mask=there)


@triton.jit
def within(index, length, EVEN: tl.constexpr, SIZE: tl.constexpr):
    """Whether index < length: always, where tiles of SIZE are even parts of it."""
    if EVEN % SIZE == 0:
        return tl.full(index.shape, True, tl.int1)
    return index < length


@triton.jit
def index_of(x0, x1, x2, L1, L2, RANK: tl.constexpr):
    """Of a position in the grid, flattened."""
    if RANK == 1:
        return x2
    if RANK == 2:
        return x1 * L2 + x2
    return (x0 * L1 + x1) * L2 + x2
