"""Kernels at other sizes: sums and responses are kept, and FlexiViT's resize is met."""

from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaconv.functional import resample_kernel
from dynaconv.testing import close

GOLDEN = Path(__file__).parent.parent / "golden" / "resample_kernel.pt"
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
ranks = pytest.mark.parametrize("rank", [1, 2, 3])


def kernel(rank, size=(5, 3, 4)):
    return torch.randn(2, 3, *size[:rank], dtype=torch.float64)


@ranks
@pytest.mark.parametrize("mode", ["area", "pinv"])
def test_same_size_is_the_kernel_itself(rank, mode):
    weight = kernel(rank)
    assert torch.equal(resample_kernel(weight, weight.shape[2:], mode), weight)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=3))
def test_area_keeps_the_sum(sizes):
    old, new = zip(*sizes, strict=True)
    weight = torch.randn(2, 3, *old, dtype=torch.float64)
    resampled = resample_kernel(weight, new, "area")
    assert resampled.shape == (2, 3, *new)
    close(resampled.flatten(2).sum(2), weight.flatten(2).sum(2), "sum")


@ranks
@pytest.mark.parametrize("factor", [2, 3])
def test_area_answers_an_enlarged_image_as_before(rank, factor):
    weight, x = kernel(rank), torch.randn(1, 3, *(7, 6, 5)[:rank], dtype=torch.float64)
    larger = x
    for d in range(rank):
        larger = larger.repeat_interleave(factor, 2 + d)
    enlarged = resample_kernel(weight, [factor * k for k in weight.shape[2:]], "area")
    close(CONV[rank](larger, enlarged, stride=factor), CONV[rank](x, weight), "response")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 7)), min_size=1, max_size=3))
def test_pinv_answers_an_enlarged_window_as_before(sizes):
    old = [k for k, _ in sizes]
    new = [k + more for k, more in sizes]
    weight, window = (torch.randn(2, *old, dtype=torch.float64) for _ in range(2))
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(old)]
    larger = F.interpolate(window[None], new, mode=mode, align_corners=False)[0]
    resampled = resample_kernel(weight, new, "pinv")
    over = list(range(1, len(old) + 1))
    close((resampled * larger).sum(over), (weight * window).sum(over), "response", 1e-8)


@ranks
@pytest.mark.parametrize("mode", ["area", "pinv"])
def test_against_loops(rank, mode):
    """W'[j] = sum_i prod_d M_d[j_d, i_d] W[i], with matrices made in another way."""
    weight = kernel(rank)
    new = (3, 7, 2)[:rank]
    matrices = [slow_matrix(k, n, mode) for k, n in zip(weight.shape[2:], new, strict=True)]
    expected = torch.zeros(2, 3, *new, dtype=torch.float64)
    for j in product(*map(range, new)):
        for i in product(*map(range, weight.shape[2:])):
            share = 1.0
            for m, a, b in zip(matrices, j, i, strict=True):
                share = share * m[a, b]
            expected[(..., *j)] += share * weight[(..., *i)]
    close(resample_kernel(weight, new, mode), expected, mode)


def slow_matrix(old, new, mode):
    if mode == "area":  # by sampling each old cell at 2520 points, which 1 to 10 divide
        points = (torch.arange(2520) + 0.5) / 2520
        matrix = torch.zeros(new, old, dtype=torch.float64)
        for i in range(old):
            cells = ((i + points) / old * new).floor().long()
            matrix[:, i] = torch.bincount(cells, minlength=new).double() / 2520
        return matrix
    columns = torch.eye(old, dtype=torch.float64).reshape(old, 1, old, 1).expand(-1, -1, -1, old)
    resized = F.interpolate(columns, (new, old), mode="bilinear", antialias=True)[:, 0, :, 0].T
    return (
        resized @ torch.linalg.inv(resized.T @ resized)
        if new >= old
        else (torch.linalg.inv(resized @ resized.T) @ resized)
    )


@pytest.mark.parametrize("mode", ["area", "pinv"])
def test_gradients(mode):
    weight = kernel(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: resample_kernel(w, (4, 6), mode), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    assert resample_kernel(kernel(2).to(dtype), 4).dtype == dtype


def test_one_number_a_kernel():
    assert resample_kernel(torch.randn(2, 3, 5, 5), 7).shape == (2, 3, 7, 7)
    assert resample_kernel(torch.randn(5), (3,)).shape == (3,)


def test_compiles_without_a_break():
    compiled = torch.compile(
        lambda w: resample_kernel(w, (4, 6), "pinv"), fullgraph=True, backend="aot_eager"
    )
    weight = kernel(2)
    close(compiled(weight), resample_kernel(weight, (4, 6), "pinv"), "compiled")


def cases():
    return torch.load(GOLDEN, weights_only=True)["cases"]


@pytest.mark.parametrize("case", cases(), ids=lambda c: c["name"])
def test_published_pseudo_inverse_resize(case):
    weight = case["inputs"]["weight"].clone().requires_grad_()
    output = resample_kernel(weight, case["config"]["new_size"], "pinv")
    close(output, case["output"], case["name"])
    output.backward(case["grad_output"])
    close(weight.grad, case["grads"]["weight"], f"{case['name']}, gradient")


@pytest.mark.parametrize(
    ("error", "text", "shape", "size", "mode"),
    [
        (ValueError, "mode='cubic'", (2, 3, 5), 3, "cubic"),
        (ValueError, r"size=\(0, 3\) must be at least 1", (2, 3, 5, 5), (0, 3), "area"),
        (ValueError, "give 1 to 3 sizes", (5,), (3, 3), "area"),
        (ValueError, "give 1 to 3 sizes", (3, 5), 3, "area"),
        (TypeError, "size=2.5 must be int", (2, 3, 5), 2.5, "area"),
    ],
)
def test_refusals(error, text, shape, size, mode):
    with pytest.raises(error, match=text):
        resample_kernel(torch.zeros(shape), size, mode)


def test_refuses_integers():
    with pytest.raises(TypeError, match="floating-point"):
        resample_kernel(torch.zeros(2, 3, 5).long(), 3)
