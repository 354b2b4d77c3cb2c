"""What the watch over Triton's interpreter finds, and what it lets pass."""

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from tests.backends.watch import watched

# mypy: disable-error-code="no-untyped-def"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="watches the interpreter")


@triton.jit
def add(out, x, n, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at, mask=at < n) + 1, mask=at < n)


@triton.jit
def overlapping(out, x, n, SIZE: tl.constexpr):
    """The last program begins earlier, and stores again what another did."""
    at = tl.minimum(tl.program_id(0) * SIZE, n - SIZE) + tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at))


@triton.jit
def summed(out, x, n, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.atomic_add(out + at * 0, tl.load(x + at, mask=at < n, other=0))


@triton.jit
def reads_too_far(out, x, n, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at), mask=at < n)


@triton.jit
def stores_too_far(out, x, n, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at, mask=at < n))


@triton.jit
def programs_store_different(out, x, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.program_id(0) + at)


@triton.jit
def lanes_store_different(out, x, n, SIZE: tl.constexpr):
    tl.store(out + tl.arange(0, SIZE) * 0, tl.arange(0, SIZE) + 0.5)


@triton.jit
def reads_what_another_stores(out, x, n, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(out + (at + SIZE) % n, mask=at < n)
    tl.store(out + at, value, mask=at < n)


@triton.jit
def reads_what_it_stored(out, x, n, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, at, mask=at < n)
    tl.store(out + at, tl.load(out + at, mask=at < n), mask=at < n)


@triton.jit
def adds_to_what_another_stores(out, x, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    if tl.program_id(0) == 0:
        tl.store(out + at, at)
    else:
        tl.atomic_add(out + at, 1.0)


@triton.jit
def reads_what_is_added_to(out, x, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.atomic_add(out + at, tl.load(out + at))


@triton.jit
def promises_too_much(out, x, n, SIZE: tl.constexpr):
    at = tl.multiple_of(tl.program_id(0) * SIZE + tl.arange(0, SIZE), 4)
    tl.store(out + at, at, mask=at < n)


def run(kernel):
    """On 11 of 16 numbers, four a program: others are there, but not given."""
    memory = torch.zeros(2, 16)
    with watched() as watch:
        kernel[(3,)](memory[0, 2:13], memory[1, 2:13], 11, SIZE=4)
    return watch.launches


@pytest.mark.parametrize("kernel", [add, overlapping, summed])
def test_what_is_right_passes(kernel):
    assert run(kernel) == 1


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (reads_too_far, "load outside of all tensors by program 2"),
        (stores_too_far, "store outside of all tensors by program 2"),
        (programs_store_different, "programs store different values"),
        (lanes_store_different, "lanes store different values"),
        (reads_what_another_stores, "what a program stores meets another's load"),
        (reads_what_it_stored, "program 0 reads what it stored"),
        (adds_to_what_another_stores, "what a program stores meets another's add"),
        (reads_what_is_added_to, "reads what programs add to"),
        (promises_too_much, "no multiple"),
    ],
)
def test_what_is_wrong_is_found(kernel, message):
    with pytest.raises(Exception, match=message):
        run(kernel)


def test_nothing_is_watched_afterwards():
    run(add)
    memory = torch.zeros(16)
    programs_store_different[(3,)](memory, memory, 11, SIZE=4)
    assert memory[:4].tolist() == [2, 3, 4, 5]
