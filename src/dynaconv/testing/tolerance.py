"""The one table of tolerances, and the one comparison."""

import torch
from torch import Tensor

# Largest error of a primitive, relative to the largest value of the float64 reference, by the
# dtype of the data.
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}
# Of a layer in float64: several primitives, norms and exponentials one after the other.
LAYER = 1e-9


def close(actual: Tensor, expected: Tensor, what: str, tolerance: float = LAYER) -> None:
    """AssertionError unless shapes agree and errors are within `tolerance` of the largest value."""
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
    if not expected.numel():
        return
    error = (actual.detach().to(expected.device).double() - expected.detach()).abs().max().item()
    scale = expected.detach().abs().max().item()
    if not error <= tolerance * max(scale, 1e-3):
        raise AssertionError(f"{what}: off by {error:.3g} at values up to {scale:.3g}")
