"""Masks through whole models: a padded batch gives what each sample gives alone."""

import copy

import pytest
import torch
from torch import nn

import dynaconv
from dynaconv import MaskedSequential, Padded, masked, pad_batch, unpad_batch
from dynaconv.masking import each_size, mask_from_sizes
from dynaconv.testing import close

SIZES = {
    1: [(9,), (12,), (7,)],
    2: [(8, 9), (11, 12), (9, 7)],
    3: [(6, 7, 6), (7, 6, 8), (6, 6, 6)],
}
CONV, POOL = (
    {r: getattr(nn, f"Conv{r}d") for r in SIZES},
    {r: getattr(nn, f"MaxPool{r}d") for r in SIZES},
)


def batch(rank, filler=1e3, channels=4):
    samples = [torch.randn(channels, *size, dtype=torch.float64) for size in SIZES[rank]]
    return samples, *pad_batch(samples, value=filler)


def at(name, rank):
    return getattr(nn, f"{name}{rank}d")


def modules(rank):
    """Every kind that has a rule, with settings that matter."""
    named = {
        "conv": CONV[rank](4, 6, 3, stride=2, padding=1),
        "conv same": CONV[rank](4, 6, 3, padding="same", groups=2),
        "conv valid": CONV[rank](4, 6, 2, padding="valid", dilation=2),
        "conv reflect": CONV[rank](4, 6, 3, padding=1, padding_mode="reflect"),
        "dynamic": dynaconv.families()["odconv"].classes[rank](4, 6, 3, padding=1),
        "batch norm": at("BatchNorm", rank)(4),
        "max pool": POOL[rank](2),
        "max pool ceil": POOL[rank](3, 2, 1, ceil_mode=True),
        "mean pool": at("AvgPool", rank)(3, 2, 1),
        "mean pool of real": at("AvgPool", rank)(3, 2, 1, count_include_pad=False),
        "global mean": at("AdaptiveAvgPool", rank)(1),
        "global max": at("AdaptiveMaxPool", rank)(1),
        "adaptive": at("AdaptiveAvgPool", rank)(3),
        "group norm": nn.GroupNorm(2, 4),
        "instance norm": at("InstanceNorm", rank)(4, affine=True),
        "transposed": at("ConvTranspose", rank)(4, 6, 3, 2, 1),
        "upsample": nn.Upsample(scale_factor=2, mode=["linear", "bilinear", "trilinear"][rank - 1]),
        "pad": at("ReplicationPad", rank)(1),
        "gelu": nn.GELU(),
        "dropout": nn.Dropout(0.5),
        "nested": nn.Sequential(CONV[rank](4, 4, 3), nn.Sequential(nn.ReLU(), POOL[rank](2))),
    }
    return {name: module.double().eval() for name, module in named.items()}


CASES = [(rank, name) for rank in SIZES for name in modules(rank)]


@pytest.mark.parametrize(("rank", "name"), CASES)
def test_each_sample_as_alone(rank, name):
    module = modules(rank)[name]
    samples, x, mask = batch(rank)
    output, kept = masked.apply(module, x, mask)
    for sample, ours in zip(samples, unpad_batch(output, kept), strict=True):
        expected = module(sample[None])[0]
        assert ours.shape == expected.shape
        close(ours, expected, name)


@pytest.mark.parametrize("rank", SIZES)
def test_batch_norm_learns_from_real_positions_alone(rank):
    samples, x, mask = batch(rank)
    for momentum in (0.1, None):
        ours = at("BatchNorm", rank)(4, momentum=momentum).double()
        theirs = nn.BatchNorm1d(4, momentum=momentum).double()
        for _ in range(2):
            output, _ = masked.apply(ours, x, mask)
            flat = torch.cat([s.flatten(1) for s in samples], 1)
            expected = theirs(flat.T)
            close(torch.cat([s.flatten(1) for s in unpad_batch(output, mask)], 1).T, expected, "")
        close(ours.running_var, theirs.running_var, "running variance")
        close(ours.running_mean, theirs.running_mean, "running mean")


@pytest.mark.parametrize("rank", SIZES)
def test_sequential(rank):
    model = MaskedSequential(
        CONV[rank](4, 6, 3, padding=1),
        at("BatchNorm", rank)(6),
        nn.ReLU(),
        dynaconv.families()["deform_v2"].classes[rank](6, 6, 3, padding=1),
        POOL[rank](2),
    ).double()
    head = MaskedSequential(at("AdaptiveAvgPool", rank)(1), nn.Flatten(), nn.Linear(6, 3)).double()
    samples, x, mask = batch(rank)
    model.eval()
    output, kept = model(x, mask)
    assert not output.masked_select(~kept.unsqueeze(1)).any()
    logits, none = head(output, kept)
    assert none is None
    for sample, ours, logit in zip(samples, unpad_batch(output, kept), logits, strict=True):
        alone = model(sample[None])
        assert alone.mask is None
        close(ours, alone.data[0], "masked sequential")
        close(logit, head(*alone).data[0], "logits")


def test_gradients_never_reach_the_padding():
    model = MaskedSequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2)).double()
    _, x, mask = batch(2)
    x.requires_grad_()
    model(x, mask).data.square().sum().backward()
    assert x.grad.masked_select(~mask.unsqueeze(1)).abs().max() == 0
    assert x.grad.masked_select(mask.unsqueeze(1)).any()


def test_own_modules():
    class Twice(nn.Module):
        def masked_forward(self, x, mask):
            return Padded(2 * x, mask)

    class Halved(nn.Module):
        def forward(self, x):
            return x[..., : x.shape[-1] // 2]

    class Derived(Halved):
        pass

    _, x, mask = batch(1)
    assert torch.equal(masked.apply(Twice(), x, mask).data, 2 * x)
    with pytest.raises(TypeError, match=r"Halved has no rule for padded batches.*masked_forward"):
        masked.apply(Halved(), x, mask)
    try:
        masked.rule(Halved)(each_size)
        assert masked.apply(Derived(), x, mask).data.shape[-1] == x.shape[-1] // 2
    finally:
        masked.RULES.pop(Halved)


def test_refusals():
    _, x, mask = batch(1)
    with pytest.raises(ValueError, match="padding_mask has shape"):
        MaskedSequential(nn.ReLU())(x, mask[:, :-1])


def test_sync_batch_norm_in_one_process_is_batch_norm():
    _, x, mask = batch(1)
    norms = (nn.SyncBatchNorm(4).double(), nn.BatchNorm1d(4).double())
    synced, plain = (masked.apply(norm, x, mask).data for norm in norms)
    torch.testing.assert_close(synced, plain, rtol=0, atol=0)


def test_deepcopy_and_state():
    model = MaskedSequential(nn.Conv1d(4, 4, 3), nn.ReLU())
    assert list(copy.deepcopy(model).state_dict()) == ["0.weight", "0.bias"]


@pytest.mark.parametrize("rank", SIZES)
def test_pad_batch_round_trip(rank):
    samples, x, mask = batch(rank, filler=7)
    assert (x.masked_select(~mask.unsqueeze(1)) == 7).all()
    for a, b in zip(samples, unpad_batch(x, mask), strict=True):
        assert torch.equal(a, b)
    rounded, _ = pad_batch(samples, multiple=8)
    assert all(n % 8 == 0 for n in rounded.shape[2:])


def test_pad_batch_refuses():
    with pytest.raises(ValueError, match="there are no samples"):
        pad_batch([])
    with pytest.raises(ValueError, match="differ in more than size"):
        pad_batch([torch.zeros(2, 3), torch.zeros(3, 3)])


def test_each_size_of_an_empty_batch():
    x, mask = torch.zeros(0, 4, 9), mask_from_sizes(torch.zeros(0, 1), (9,))
    output, kept = each_size(nn.MaxPool1d(2), x, mask)
    assert output.shape == (0, 4, 4)
    assert kept.shape == (0, 4)


def test_each_size_leaves_out_samples_without_a_position():
    x, mask = torch.randn(3, 4, 9), mask_from_sizes([4, 0, 9], (9,))
    output, kept = each_size(nn.MaxPool1d(2), x, mask)
    assert kept.sum(1).tolist() == [2, 0, 4]
    assert not output[1].any()
    assert torch.equal(output[2:], nn.MaxPool1d(2)(x[2:]))
