"""Watches Triton's interpreter as a sanitizer watches a GPU, for what shows on that alone.

Every address that is read or written lies in a tensor that the launch was given. What one program
stores no other reads or adds to, nor reads it again itself, for its threads do not wait for each
other; and whoever else stores there stores the same. What is promised to be a multiple is one.
"""

from contextlib import contextmanager

import numpy as np
import torch
from triton.runtime import interpreter

from dynaconv.backends.triton.launch import reach


class Launched:
    """What one launch may touch, and what its programs touched."""

    def __init__(self, name, tensors):
        self.name = name
        self.spans = [
            (t.data_ptr(), t.data_ptr() + reach(t) * t.element_size()) for t in tensors if t.numel()
        ]
        self.touched = {"load": [], "store": [], "add": []}
        self.program, self.own = -1, []

    def touch(self, kind, program, pointers, mask, value=None):
        """Lanes of one program load, store or add a value each where the mask is true."""
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = pointers.data[mask.data].astype(np.int64)
        inside = np.zeros(addresses.shape, bool)
        for first, end in self.spans:
            inside |= (addresses >= first) & (addresses + size <= end)
        assert inside.all(), f"{self.name}: {kind} outside of all tensors by program {program}"
        bits = np.zeros_like(addresses)
        if kind == "store":
            given = np.ascontiguousarray(value.data[mask.data])
            bits = given.view(f"i{given.itemsize}").astype(np.int64)
            self.own = [*(self.own if program == self.program else []), addresses]
            self.program = program
        elif kind == "load" and program == self.program:
            again = np.isin(addresses, np.concatenate(self.own)).any()
            assert not again, f"{self.name}: program {program} reads what it stored"
        rows = np.stack([addresses, np.full_like(addresses, program), bits], 1)
        self.touched[kind].append(np.unique(rows, axis=0))
        if kind == "store":
            alone(self.touched[kind][-1], [0, 2], f"{self.name}: lanes store different values")

    def check(self):
        """AssertionError where what one program does meets what another does."""
        stored, added, loaded = (
            np.unique(np.concatenate([np.zeros((0, 3), np.int64), *self.touched[kind]]), axis=0)
            for kind in ("store", "add", "load")
        )
        by_many = stored[np.isin(stored[:, 0], repeated(stored[:, :2]))]
        alone(by_many, [0, 2], f"{self.name}: programs store different values")
        for kind, others in (("add", added), ("load", loaded)):
            both = np.concatenate([stored, others[np.isin(others[:, 0], stored[:, 0])]])
            both = both[np.isin(both[:, 0], others[:, 0])]
            alone(both, [0, 1], f"{self.name}: what a program stores meets another's {kind}")
        met = np.isin(added[:, 0], loaded[:, 0])
        assert not met.any(), f"{self.name}: reads what programs add to"


def repeated(rows):
    """The addresses, first in each row, of more than one different row."""
    addresses, counts = np.unique(np.unique(rows, axis=0)[:, 0], return_counts=True)
    return addresses[counts > 1]


def alone(rows, columns, message):
    assert not len(repeated(rows[:, columns])), message


class Watch:
    """Stands in for parts of the interpreter."""

    def __init__(self):
        self.launched = None
        self.launches = 0

    def call(self, plain):
        def run(executor, *args, **kwargs):
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
            self.launched = Launched(executor.fn.__name__, tensors)
            self.launches += 1
            plain(executor, *args, **kwargs)
            self.launched.check()

        return run

    def access(self, plain, kind, *places):
        """`places` of pointers, mask and value among the arguments."""

        def run(builder, *args):
            program = np.ravel_multi_index(builder.grid_idx, builder.grid_dim)
            self.launched.touch(kind, program, *(args[place] for place in places))
            return plain(builder, *args)

        return run

    def promise(self, plain):
        def run(handle, name, values):
            if name == "tt.divisibility":
                assert all((handle.data % v == 0).all() for v in values), "no multiple"
            return plain(handle, name, values)

        return run


@contextmanager
def watched():
    """Raises AssertionError, or Triton's InterpreterError of one, from the launch at fault."""
    watch, builder = Watch(), interpreter.InterpreterBuilder
    changes = [
        (interpreter.GridExecutor, "__call__", watch.call),
        (builder, "create_masked_load", lambda plain: watch.access(plain, "load", 0, 1)),
        (builder, "create_masked_store", lambda plain: watch.access(plain, "store", 0, 2, 1)),
        (builder, "create_atomic_rmw", lambda plain: watch.access(plain, "add", 1, 3)),
        (interpreter.TensorHandle, "set_attr", watch.promise),
    ]
    plain = [getattr(owner, name) for owner, name, _ in changes]
    for (owner, name, made), original in zip(changes, plain, strict=True):
        setattr(owner, name, made(original))
    try:
        yield watch
    finally:
        for (owner, name, _), original in zip(changes, plain, strict=True):
            setattr(owner, name, original)
