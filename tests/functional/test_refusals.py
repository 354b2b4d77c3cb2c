"""Bad input is refused before any work: what was given, and what is needed."""

import pytest
import torch

from dynaconv import functional
from dynaconv.shapes import ntuple

T = torch.randn
X = T(4, 16, 9, 9)
OFFSET = T(4, 18, 9, 9)
PER_SAMPLE, MIXTURE = functional.conv_per_sample, functional.conv_mixture
PER_POSITION, DEFORM = functional.conv_per_position, functional.deform_conv
CONV, TRANSPOSE = functional.conv, functional.conv_transpose_per_sample
GRID = functional.conv_on_grid
W4, W = T(4, 8, 16, 3, 3), T(8, 16, 3, 3)

VALUES = [
    (
        PER_SAMPLE,
        (X, T(3, 8, 16, 3, 3)),
        {},
        r"weight has 3 kernels for a batch of 4; "
        r"give one kernel per sample, shape \(4, C_out, 16, 3, 3\)",
    ),
    (PER_SAMPLE, (X, W), {}, r"weight has shape \(8, 16, 3, 3\); give \(4, C_out, 16, k, k\)"),
    (PER_SAMPLE, (X, T(4, 8, 5, 3, 3)), {}, r"give \(4, C_out, 16, 3, 3\)"),
    (PER_SAMPLE, (X[0, 0], W4), {}, r"input has shape \(9, 9\); give \(N, C, \*L\) with 1 to 3"),
    (PER_SAMPLE, (X, W4, T(7)), {}, r"bias has shape \(7,\); give \(8,\)"),
    (PER_SAMPLE, (X, W4, T(3, 8)), {}, r"bias has shape \(3, 8\); give \(4, 8\)"),
    (PER_SAMPLE, (X, W4), {"groups": 3}, "groups=3 does not divide 16 input channels"),
    (
        PER_SAMPLE,
        (X, T(4, 7, 8, 3, 3)),
        {"groups": 2},
        "groups=2 does not divide 7 output channels",
    ),
    (PER_SAMPLE, (X, W4), {"groups": 0}, "groups=0 does not divide"),
    (PER_SAMPLE, (X, W4), {"stride": 0}, "stride=0 must be at least 1"),
    (PER_SAMPLE, (X, W4), {"padding": -1}, "padding=-1 must be at least 0"),
    (
        PER_SAMPLE,
        (X, W4),
        {"dilation": (1, 2, 3)},
        r"dilation=\(1, 2, 3\) has 3 entries; give 1 or 2",
    ),
    (PER_SAMPLE, (X, W4), {"padding": "full"}, "padding='full'; the words are 'same' and 'valid'"),
    (PER_SAMPLE, (X, W4), {"padding": "same", "stride": 2}, "padding='same' needs stride 1"),
    (
        PER_SAMPLE,
        (X, W4),
        {"dilation": 5},
        "a kernel of 3 taps, dilation 5, spans 11 positions, more than the padded input's 9",
    ),
    (
        MIXTURE,
        (X, T(3, 8, 16, 3, 3), T(4, 2)),
        {},
        r"coefficients has shape \(4, 2\); give \(4, 3\)",
    ),
    (MIXTURE, (X, W, T(4, 3)), {}, r"weight has shape .* give \(E, C_out, 16, k, k\)"),
    (
        MIXTURE,
        (X, T(3, 8, 16, 3, 3), T(4, 3), T(2, 8)),
        {},
        r"bias has shape \(2, 8\); give \(3, 8\)",
    ),
    (MIXTURE, (X, T(3, 8, 16, 3, 3), T(4, 3), T(3)), {}, r"bias has shape \(3,\); give \(8,\)"),
    (
        MIXTURE,
        (X, T(3, 8, 16, 3, 3), T(4, 3, 3, 2)),
        {},
        r"coefficients has shape \(4, 3, 3, 2\); give \(4, 3, 3, 3\)",
    ),
    (
        MIXTURE,
        (X, T(3, 8, 16, 3, 3), T(4, 3, 3, 3), T(3, 8)),
        {},
        r"bias has shape \(3, 8\); give \(8,\)",
    ),
    (PER_POSITION, (X, T(4, 2, 3, 3, 9, 9)), {}, r"weight has shape .*; give \(4, G, 3, 3, 7, 7\)"),
    (PER_POSITION, (X, T(4, 5, 3, 3, 7, 7)), {}, "groups=5 does not divide 16 input channels"),
    (PER_POSITION, (X, T(4, 9, 7, 7)), {}, r"give \(4, G, k, k, l_out, l_out\)"),
    (PER_POSITION, (X, T(2, 2, 3, 3, 7, 7)), {}, r"give \(4, G, 3, 3, 7, 7\)"),
    (
        DEFORM,
        (X, T(4, 18, 7, 7), W),
        {"padding": 1},
        r"offset has shape \(4, 18, 7, 7\); give \(4, 18, 9, 9\)",
    ),
    (
        DEFORM,
        (X, T(4, 20, 7, 7), W),
        {},
        r"offset has 20 channels; give a multiple of 18 \(9 taps \* 2 dimensions\)",
    ),
    (DEFORM, (X, T(4, 0, 7, 7), W), {}, "offset has 0 channels"),
    (
        DEFORM,
        (X, T(4, 18, 7), W),
        {},
        r"offset has shape \(4, 18, 7\); give \(4, offset_groups \* 9",
    ),
    (DEFORM, (X, T(4, 54, 9, 9), W), {"padding": 1}, "groups=3 does not divide 16 input channels"),
    (
        DEFORM,
        (X, OFFSET, T(8, 5, 3, 3)),
        {"padding": 1},
        r"weight has shape .* give \(C_out, 16, 3, 3\)",
    ),
    (DEFORM, (X, OFFSET, W, T(5)), {"padding": 1}, r"bias has shape \(5,\); give \(8,\)"),
    (
        DEFORM,
        (X, OFFSET, W),
        {"padding": 1, "modulation": T(4, 18, 9, 9)},
        r"modulation has shape .* give \(4, 9, 9, 9\)",
    ),
    (CONV, (X[0, 0], W), {}, r"input has shape \(9, 9\); give \(N, C, \*L\) with 1 to 3"),
    (CONV, (X, W4), {}, r"weight has shape \(4, 8, 16, 3, 3\); give \(C_out, 16, k, k\)"),
    (CONV, (X, T(8, 5, 3, 3)), {}, r"weight has shape .* give \(C_out, 16, 3, 3\)"),
    (CONV, (X, T(7, 8, 3, 3)), {"groups": 2}, "groups=2 does not divide 7 output channels"),
    (CONV, (X, W, T(5)), {}, r"bias has shape \(5,\); give \(8,\)"),
    (CONV, (X, W), {"dilation": 5}, "a kernel of 3 taps, dilation 5, spans 11 positions"),
    (CONV, (X, W), {"padding": "same", "stride": 2}, "padding='same' needs stride 1"),
    (CONV, (X, W.to("meta")), {}, "weight is on meta, input on cpu; move one of them"),
    (PER_SAMPLE, (X, W4.to("meta")), {}, "weight is on meta, input on cpu; move one of them"),
    (DEFORM, (X, OFFSET.to("meta"), W), {"padding": 1}, "offset is on meta"),
    (CONV, (X, W), {"stride": 2**31}, "stride=2147483648 must be at most 2147483647"),
    (CONV, (X, W), {"padding": (0, 2**63)}, r"padding=\(0, 9223372036854775808\) must be at most"),
    (CONV, (X, W), {"padding": 2**30}, "GiB, more than there is memory; give less padding"),
    (CONV, (X, T(8, 16, 0, 3)), {}, r"weight has a kernel of shape \(0, 3\); give at least 1 tap"),
    (CONV, (T(4, 16, 0, 9), W), {"padding": 3}, "give at least 1 position"),
    (CONV, (T(4, 0, 9, 9), T(8, 0, 3, 3)), {}, "there are 0 input channels; give at least 1"),
    (PER_SAMPLE, (X, T(4, 0, 16, 3, 3)), {}, "there are 0 output channels"),
    (DEFORM, (X, OFFSET, T(8, 16, 3, 0)), {"padding": 1}, "weight has a kernel of shape"),
    (TRANSPOSE, (X, T(4, 16, 0, 3, 3)), {}, "there are 0 output channels"),
    (TRANSPOSE, (X, T(4, 16, 8, 0, 3)), {}, "weight has a kernel of shape"),
    (TRANSPOSE, (X, T(4, 16, 8, 3, 3)), {"stride": 2**30}, "GiB, more than there is memory"),
    (GRID, (X, [T(4, 5, 3), T(4, 5, 3)], W, T(5)), {}, r"bias has shape \(5,\); give \(8,\)"),
]
SPARSE, NESTED = X.to_sparse(), torch.nested.nested_tensor([T(2, 3)], layout=torch.jagged)
TYPES = [
    (CONV, ([1.0], W), {}, "conv: input is of <class 'list'>; give a tensor"),
    (CONV, (X, None), {}, "conv: weight is of <class 'NoneType'>; give a tensor"),
    (CONV, (X, W, 1.0), {}, "conv: bias is of <class 'float'>; give a tensor"),
    (CONV, (SPARSE, W), {}, "conv: input is torch.sparse_coo; give a dense tensor"),
    (CONV, (NESTED, W), {}, "conv: input is nested; give a dense tensor"),
    (CONV, (X, W), {"padding": b"ab"}, "padding=b'ab' must be int or a tuple of 2 ints"),
    (MIXTURE, (X, W, "abc"), {}, "conv_mixture: coefficients is of <class 'str'>"),
    (GRID, (X, 5, W), {}, "conv_on_grid: positions is of <class 'int'>"),
    (GRID, (X, [1, 2], W), {}, r"conv_on_grid: positions\[0\] is of <class 'int'>"),
    (DEFORM, (X, OFFSET.to(torch.float8_e4m3fn), W), {"padding": 1}, "offset has dtype"),
    (CONV, (X.long(), W), {}, "input has dtype torch.int64; give a floating-point tensor"),
    (CONV, (X, W.double()), {}, r"weight has dtype torch.float64, input torch.float32; cast"),
    (CONV, (X, W), {"groups": 1.0}, r"groups=1.0 must be an int"),
    (PER_SAMPLE, (X.long(), W4), {}, "input has dtype torch.int64; give a floating-point tensor"),
    (
        PER_SAMPLE,
        (X, W4.double()),
        {},
        r"weight has dtype torch.float64, input torch.float32; cast",
    ),
    (MIXTURE, (X, T(3, 8, 16, 3, 3), T(4, 3).half()), {}, "coefficients has dtype torch.float16"),
    (PER_POSITION, (X, T(4, 2, 3, 3, 7, 7).double()), {}, "weight has dtype torch.float64"),
    (DEFORM, (X.double(), OFFSET.half(), W.double()), {"padding": 1}, "offset has dtype"),
    (PER_SAMPLE, (X, W4), {"groups": 1.0}, r"groups=1.0 must be an int"),
    (PER_SAMPLE, (X, W4), {"stride": 1.5}, r"stride=1.5 must be int or a tuple of 2 ints"),
    (PER_SAMPLE, (X, W4), {"stride": (1, True)}, "must be int or a tuple of 2 ints"),
]


@pytest.mark.parametrize(("call", "args", "keys", "text"), VALUES)
def test_value(call, args, keys, text):
    with pytest.raises(ValueError, match=text):
        call(*args, **keys)


@pytest.mark.parametrize(("call", "args", "keys", "text"), TYPES)
def test_type(call, args, keys, text):
    with pytest.raises(TypeError, match=text):
        call(*args, **keys)


@pytest.mark.parametrize("call", [CONV, PER_SAMPLE, MIXTURE, PER_POSITION, DEFORM])
def test_every_refusal_names_the_primitive(call):
    cases = [(a, k) for c, a, k, _ in VALUES + TYPES if c is call]
    assert len(cases) >= 4
    for args, keys in cases:
        with pytest.raises((ValueError, TypeError)) as caught:
            call(*args, **keys)
        named = str(caught.value).startswith(f"{call.__name__}: ")
        assert named or any(f"{key}=" in str(caught.value) for key in keys)


def test_ntuple():
    assert ntuple(3, 2, "stride") == (3, 3)
    assert ntuple((3,), 2, "stride") == (3, 3)
    assert ntuple([1, 2], 2, "stride") == (1, 2)


def test_a_bias_has_a_gradient_in_an_empty_batch():
    bias = T(8).requires_grad_()
    TRANSPOSE(X[:0], T(0, 16, 8, 3, 3), bias).sum().backward()
    assert torch.equal(bias.grad, torch.zeros(8))
