"""Layers and tools refuse what they cannot take, by the argument's name, before any work."""

import pytest
import torch
from torch import nn

import dynaconv
from dynaconv.masking import Padded, output_mask
from dynaconv.shapes import Geometry

X = torch.randn(2, 4, 9, 9)
REAL = torch.ones(2, 9, 9, dtype=torch.bool)


def layer(**arguments):
    return dynaconv.ODConv2d(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3} | arguments)


@pytest.mark.parametrize(
    ("error", "text", "call"),
    [
        (TypeError, "reduction='x' must be a finite number", lambda: layer(reduction="x")),
        (TypeError, "experts=2.5 must be an int", lambda: dynaconv.DyConv1d(2, 2, 1, experts=2.5)),
        (TypeError, "experts=True must", lambda: dynaconv.DyConv1d(2, 2, 1, experts=True)),
        (TypeError, "reduction=nan must be a finite", lambda: layer(reduction=float("nan"))),
        (TypeError, "bias=None must be True or False", lambda: layer(bias=None)),
        (TypeError, "causal=1 must be True or False", lambda: layer(causal=1)),
        (ValueError, r"padding_mode=\[\]; choose from", lambda: layer(padding_mode=[])),
        (TypeError, "dtype=torch.int8; give a floating", lambda: layer(dtype=torch.int8)),
        (TypeError, "dtype=torch.complex64; give", lambda: layer(dtype=torch.complex64)),
        (ValueError, "device='nowhere' is not here", lambda: layer(device="nowhere")),
        (ValueError, "in_channels=2147483648 must be at most", lambda: layer(in_channels=2**31)),
        (ValueError, "kernel_size=300000.*no memory", lambda: layer(kernel_size=300_000)),
        (TypeError, "input is of <class 'list'>", lambda: layer()([1.0])),
        (TypeError, "input is torch.sparse_coo", lambda: layer()(X.to_sparse())),
        (TypeError, "input has dtype torch.float64, the layer torch.float32",
         lambda: layer()(X.double())),
        (TypeError, "input has dtype torch.int64; give", lambda: layer()(X.long())),
        (ValueError, "input is on meta, the layer on cpu", lambda: layer()(X.to("meta"))),
        (ValueError, "give at least 1 position", lambda: layer()(X[..., :0])),
        (ValueError, "a kernel of 3 taps, dilation 5, spans 11", lambda: layer(dilation=5)(X)),
        (ValueError, "padding_mode='reflect' makes 9 positions of padding from an input of 9",
         lambda: layer(padding=9, padding_mode="reflect")(X)),
        (ValueError, "more than there is memory", lambda: layer(padding=2**30)(X)),
        (TypeError, "padding_mask is of <class 'list'>", lambda: layer()(X, [True])),
        (TypeError, "padding_mask has dtype", lambda: layer().output_mask(REAL.long())),
        (ValueError, "padding_mask has shape", lambda: layer().output_mask(REAL[0])),
        (ValueError, "a kernel of 9 taps", lambda: output_mask(REAL[:, :5], Geometry(
            (9, 9), (1, 1), (0, 0), (1, 1)))),
        (TypeError, "step: state=5", lambda: dynaconv.DyConv1d(2, 2, 3, causal=True).step(
            torch.ones(1, 2), 5)),
        (ValueError, "no real position in any sample", lambda: dynaconv.ContMixConv2d(
            4, 4, 3, padding=1)(X, REAL & False)),
        (TypeError, "convert: model is of <class 'int'>", lambda: dynaconv.convert(5, "odconv")),
        (ValueError, r"where='\(' is no", lambda: dynaconv.convert(nn.ReLU(), "odconv", "(")),
        (TypeError, "select: min_channels='x'", lambda: dynaconv.select(min_channels="x")),
        (TypeError, "anneal: progress=None", lambda: dynaconv.anneal(nn.ReLU(), None)),
        (TypeError, "lr='x' must be a number", lambda: dynaconv.parameter_groups(nn.ReLU(), "x")),
        (TypeError, r"samples\[0\] is of", lambda: dynaconv.pad_batch([1])),
        (TypeError, "multiple=1.5 must be", lambda: dynaconv.pad_batch([X[0]], multiple=1.5)),
        (TypeError, "sizes have dtype", lambda: dynaconv.mask_from_sizes([1.5], (3,))),
        (TypeError, r"shape\[0\] is of", lambda: dynaconv.mask_from_sizes([1], ("x",))),
        (TypeError, "costs is of", lambda: dynaconv.sparsity_loss(X, 0.5)),
        (TypeError, "stride_cost: model is of", lambda: dynaconv.stride_cost(None)),
        (TypeError, "explain: call=5", lambda: dynaconv.explain(5)),
        (TypeError, "catalogue: conv=", lambda: dynaconv.catalogue(nn.ReLU())),
    ],
)  # fmt: skip
def test_refusal(error, text, call):
    with pytest.raises(error, match=text):
        call()


def test_far_strides_take_no_memory():
    """A stride beyond the input leaves one position; families that pool by strides included."""
    for cls in (dynaconv.SKAConv2d, dynaconv.DynamicFilterConv2d, dynaconv.DyConv2d):
        made = cls(4, 4, 3, stride=2**30, **({"local": True} if "Filter" in cls.__name__ else {}))
        assert made.eval()(X).shape == (2, 4, 1, 1)


def test_a_padded_batch_is_still_one():
    assert isinstance(dynaconv.MaskedSequential(nn.ReLU())(X, REAL), Padded)
