"""Convolution as plain loops over samples, positions and taps: nothing shared with src."""

from itertools import product
from math import floor, prod

import torch


def slow_conv(x, kernel_at, kernel, stride, padding, dilation, groups=1, read=None):
    """y[n, o, p] = sum_{c, k} kernel_at(n, p)[o, c, k] * read(n, p, k, position)[c].

    x (N, C, *L); kernel_at(n, p) gives (C_out, C / groups, *K); `read` gives the C values that a
    tap sees at a position, by default those of x, zero outside.
    """
    rank = x.dim() - 2
    size = [
        (length + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
        for d, length in enumerate(x.shape[2:])
    ]
    read = read or (lambda n, p, k, position: value_at(x[n], position))
    out_channels = kernel_at(0, (0,) * rank).shape[0]
    y = torch.zeros(len(x), out_channels, *size, dtype=x.dtype)
    for n, p in product(range(len(x)), product(*map(range, size))):
        weight = kernel_at(n, p)
        for k in product(*map(range, kernel)):
            position = [p[d] * stride[d] - padding[d] + k[d] * dilation[d] for d in range(rank)]
            seen = read(n, p, k, position).reshape(groups, -1)
            tap = weight[(slice(None), slice(None), *k)].reshape(groups, -1, seen.shape[1])
            y[(n, slice(None), *p)] += torch.stack(
                [tap[g] @ seen[g] for g in range(groups)]
            ).flatten()
    return y


def deformed(x, kernel, offset, modulation=None):
    """`read` for slow_conv: x (N, C, *L) at offset positions, laid out as deform_conv has them."""
    rank, taps = len(kernel), prod(kernel)
    groups = offset.shape[1] // (taps * rank)

    def read(n, p, k, position):
        tap = 0
        for index, length in zip(k, kernel, strict=True):
            tap = tap * length + index
        values = []
        for g, channels in enumerate(x[n].chunk(groups)):
            first = (g * taps + tap) * rank
            moved = [q + offset[(n, first + d, *p)].item() for d, q in enumerate(position)]
            factor = 1.0 if modulation is None else modulation[(n, g * taps + tap, *p)]
            values.append(factor * interpolated(channels, moved))
        return torch.cat(values)

    return read


def value_at(x, position):
    """x (C, *L) at integers, zero outside."""
    if all(0 <= q < length for q, length in zip(position, x.shape[1:], strict=True)):
        return x[(slice(None), *position)]
    return torch.zeros(len(x), dtype=x.dtype)


def interpolated(x, position):
    """x (C, *L) at real numbers, linear between neighbours, zero outside."""
    low = [floor(q) for q in position]
    total = torch.zeros(len(x), dtype=x.dtype)
    for corner in product((0, 1), repeat=len(position)):
        share = 1.0
        for q, start, up in zip(position, low, corner, strict=True):
            share *= (q - start) if up else 1 - (q - start)
        total += share * value_at(x, [s + c for s, c in zip(low, corner, strict=True)])
    return total
