"""Which backend serves a call, and why.

The choice is a pure question about a `Problem`, which is built from metadata alone: it works on
fake tensors and inside torch.compile, and `explain` gives the same answer as the call itself.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """One call of a primitive, without its data."""

    primitive: str
    rank: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    dtype: torch.dtype
    device: str
    channels_last: bool
    needs_grad: bool
    exporting: bool
    transformed: bool

    @classmethod
    def of(cls, primitive: str, input: Tensor, **others: Tensor | None) -> "Problem":
        tensors = {"input": input} | {k: t for k, t in others.items() if t is not None}
        return cls(
            primitive=primitive,
            rank=input.dim() - 2,
            shapes=tuple((name, tuple(t.shape)) for name, t in tensors.items()),
            dtype=input.dtype,
            device=input.device.type,
            channels_last=is_channels_last(input),
            needs_grad=torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values()),
            exporting=torch.compiler.is_exporting(),
            transformed=under_transform(),
        )


@dataclass(frozen=True)
class Backend:
    """One way of computing. `supports` answers None for yes, and a text for why not."""

    name: str
    supports: Callable[[Problem], str | None]
    functions: dict[str, Callable[..., Tensor]]
    has_fft: bool = True


# In order of preference: the first that supports a problem serves it.
BACKENDS: list[Backend] = []
_forced: list[str | None] = []
_watched: list[list[Problem]] = []


def register_backend(backend: Backend) -> None:
    """Adds a backend before all others (the reference is registered first, so it comes last)."""
    BACKENDS.insert(0, backend)


def backends() -> list[str]:
    """Names of the registered backends, the preferred one first."""
    return [b.name for b in BACKENDS]


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces one backend inside the `with` block; a call that it cannot serve raises.

    >>> with dynaconv.backend("reference"):
    ...     y = layer(x)
    """
    if not isinstance(name, str) or name not in backends():
        raise ValueError(f"backend {name!r} does not exist; there are {backends()}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def is_forced(name: str) -> bool:
    """Whether `with backend(name)` is in force."""
    return bool(_forced) and _forced[-1] == name


@contextmanager
def down_from(name: str) -> Iterator[None]:
    """Inside the `with` block, a backend comes first, and those after it serve what it does not.

    No outer `backend(...)` is in force there.
    """
    kept = BACKENDS[:]
    del BACKENDS[: backends().index(name)]
    _forced.append(None)
    try:
        yield
    finally:
        _forced.pop()
        BACKENDS[:] = kept


@contextmanager
def preferring(candidate: Backend) -> Iterator[None]:
    """Inside the `with` block, `candidate` comes before all that are registered.

    No outer `backend(...)` is in force there.
    """
    register_backend(candidate)
    _forced.append(None)
    try:
        yield
    finally:
        _forced.pop()
        BACKENDS.remove(candidate)


def reason_against(candidate: Backend, problem: Problem) -> str | None:
    """None where the backend serves the problem, otherwise why not."""
    if problem.primitive not in candidate.functions:
        return f"has no {problem.primitive}"
    if _forced and _forced[-1] not in (None, candidate.name):
        return f"dynaconv.backend({_forced[-1]!r}) is in force"
    return candidate.supports(problem)


def choose(problem: Problem) -> Callable[..., Tensor]:
    """The function of the first backend that serves the problem.

    RuntimeError: none does; the text gives each backend's reason.
    """
    for problems in _watched:
        problems.append(problem)
    for candidate in BACKENDS:
        if reason_against(candidate, problem) is None:
            return candidate.functions[problem.primitive]
    raise RuntimeError(f"no backend serves this call\n{report(problem)}")


def report(problem: Problem) -> str:
    """One line a backend: chosen, not needed, or why not."""
    lines, chosen = [], False
    for candidate in BACKENDS:
        why = reason_against(candidate, problem)
        verdict = why or ("not needed: an earlier one serves" if chosen else "chosen")
        chosen = chosen or why is None
        lines.append(f"  {candidate.name}: {verdict}")
    shapes = ", ".join(f"{name} {shape}" for name, shape in problem.shapes)
    head = f"{problem.primitive}: {shapes}, {problem.dtype}, {problem.device}"
    return "\n".join([head, *lines])


def explain(call: Callable, *args: Any, **kwargs: Any) -> str:
    """Which backend serves each primitive in `call(*args, **kwargs)`, and why.

    `call` is a primitive, a layer or a whole model; it is run once.

    >>> print(dynaconv.explain(dynaconv.functional.conv_per_sample, x, weight))
    """
    if not callable(call):
        raise TypeError(f"explain: call={call!r} must be a primitive, a layer or a model")
    problems: list[Problem] = []
    _watched.append(problems)
    try:
        call(*args, **kwargs)
    finally:
        _watched.pop()
    if not problems:
        return "no primitive of dynaconv was called"
    counts = Counter(report(problem) for problem in problems)
    return "\n".join(f"{text}\n  ({n} calls)" if n > 1 else text for text, n in counts.items())


def has_fft() -> bool:
    """Whether layers can use FFT: not where a graph is made for a runtime that has none."""
    return all(candidate.has_fft for candidate in BACKENDS)


def under_transform() -> bool:
    """Whether torch.func.grad, jvp, jacrev ... or forward mode is at work (not vmap alone)."""
    if torch.compiler.is_compiling():
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(i.key() != torch._C._functorch.TransformType.Vmap for i in stack)


def values_unknown() -> bool:
    """Whether no size can follow a tensor's values: under torch.compile, export and vmap."""
    if torch.compiler.is_compiling():
        return True
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(i.key() == torch._C._functorch.TransformType.Vmap for i in stack)


def is_channels_last(input: Tensor) -> bool:
    """Whether the channels are the fastest-moving dimension in memory (2-D and 3-D)."""
    return input.dim() in (4, 5) and input.shape[1] > 1 and input.stride(1) == 1
