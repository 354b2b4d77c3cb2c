"""Outputs and gradients recorded from the published implementations, with the same weights."""

from pathlib import Path

import pytest
import torch

import dynaconv
from dynaconv.functional import conv_mixture, deform_conv
from dynaconv.testing import close

GOLDEN = Path(__file__).parent.parent / "golden"
STATIC = ("kernel_size", "stride", "padding", "dilation", "groups")


def cases(family):
    recorded = torch.load(GOLDEN / f"{family}.pt", weights_only=True)["cases"]
    return pytest.mark.parametrize("case", recorded, ids=[c["name"] for c in recorded])


def check(layer, case, names):
    """`layer` with the recorded weights gives the recorded output and gradients.

    names: our parameter or buffer -> the published key; 1x1 convolutions are linear layers here.
    """
    layer = layer.double().train(case["config"].get("training", False))
    state = layer.state_dict()
    for ours, theirs in names.items():
        state[ours] = case["state"][theirs].reshape(state[ours].shape)
    layer.load_state_dict(state)
    x = case["inputs"]["input"].clone().requires_grad_()
    output = layer(x)
    close(output, case["output"], case["name"])
    output.backward(case["grad_output"])
    close(x.grad, case["grads"]["input"], f"{case['name']}, input gradient")
    published = {theirs: ours for ours, theirs in names.items()}
    for key, gradient in case["grads"].items():
        if key.startswith("weight:"):
            ours = layer.get_parameter(published[key.removeprefix("weight:")])
            close(ours.grad, gradient.reshape(ours.shape), f"{case['name']}, gradient of {key}")


def with_norm(names):
    """Batch norms: '<ours>.*' -> '<theirs>.*' for the parameters and statistics."""
    keys = ("weight", "bias", "running_mean", "running_var")
    return {f"{ours}.{key}": f"{theirs}.{key}" for ours, theirs in names.items() for key in keys}


def static(config):
    return {key: config[key] for key in STATIC if key in config}


def condconv(config):
    channels = (config["in_channels"], config["out_channels"])
    return dynaconv.CondConv2d(*channels, **static(config), experts=config["num_experts"])


@cases("condconv")
def test_condconv(case):
    config = case["config"]
    shape = (config["num_experts"], config["out_channels"], -1, *[config["kernel_size"]] * 2)
    if case["name"] == "routing":
        layer = condconv(config)
        names = {"weight": "conv.weight", "bias": "conv.bias"}
        names |= {f"routing.{key}": f"routing_fn.{key}" for key in ("weight", "bias")}
        # timm keeps each expert flat
        case["grads"]["weight:conv.weight"] = case["grads"]["weight:conv.weight"].reshape(shape)
        check(layer, case, names)
        return
    x, routing = (v.clone().requires_grad_() for v in case["inputs"].values())
    weight = case["state"]["weight"].reshape(shape).requires_grad_()
    geometry = (
        config.get(key, default) for key, default in zip(STATIC[1:], (1, 0, 1, 1), strict=True)
    )
    output = conv_mixture(x, weight, routing, case["state"].get("bias"), *geometry)
    close(output, case["output"], case["name"])
    output.backward(case["grad_output"])
    close(x.grad, case["grads"]["input"], "input gradient")
    close(routing.grad, case["grads"]["routing_weights"], "routing gradient")
    close(weight.grad, case["grads"]["weight:weight"].reshape(weight.shape), "weight gradient")


@cases("dyconv")
def test_dyconv(case):
    config = case["config"]
    rank = case["inputs"]["input"].dim() - 2
    layer = dynaconv.families()["dyconv"].classes[rank](
        config["in_planes"],
        config["out_planes"],
        **static(config),
        bias=config.get("bias", True),
        experts=config.get("K", 4),
        reduction=config.get("ratio", 0.25),
        temperature=config["temperature"],
    )
    names = {"weight": "weight", "squeeze.fc.weight": "attention.fc1.weight"}
    names |= {f"mix.{key}": f"attention.fc2.{key}" for key in ("weight", "bias")}
    names |= {} if layer.bias is None else {"bias": "bias"}
    if rank == 3:  # published without this bias
        case["state"]["attention.fc2.bias"] = torch.zeros(layer.experts)
    check(layer, case, names)


def odconv(config):
    return dynaconv.ODConv2d(
        config["in_planes"],
        config["out_planes"],
        **static(config),
        bias=False,
        experts=config["kernel_num"],
        reduction=config.get("reduction", 1 / 16),
        temperature=config["temperature"],
    )


@cases("odconv")
def test_odconv(case):
    layer = odconv(case["config"])
    names = {"weight": "weight", "attention.fc.weight": "attention.fc.weight"}
    names |= with_norm({"attention.bn": "attention.bn"})
    for head in ("channel_fc", "filter_fc", "spatial_fc", "kernel_fc"):
        ours = getattr(layer, head)
        assert (ours is not None) == (f"attention.{head}.weight" in case["state"])
        if ours is not None:
            names |= {f"{head}.{key}": f"attention.{head}.{key}" for key in ("weight", "bias")}
    check(layer, case, names)


def involution(config):
    channels, size, stride = (config[k] for k in ("channels", "kernel_size", "stride"))
    return dynaconv.Involution2d(channels, channels, size, stride, size // 2, bias=False)


@cases("involution")
def test_involution(case):
    layer = involution(case["config"])
    names = {"reduce.weight": "conv1.conv.weight"} | with_norm({"bn": "conv1.bn"})
    names |= {f"span.{key}": f"conv2.conv.{key}" for key in ("weight", "bias")}
    check(layer, case, names)


def selective_kernel(config):
    dilation = config.get("dilation", 1)
    return dynaconv.SelectiveKernelConv2d(
        config["in_channels"],
        config["out_channels"],
        3,
        config.get("stride", 1),
        dilation,
        dilation,
        config.get("groups", 1),
        bias=False,
        branches=len(config.get("kernel_size", [3, 5])),
        dilated=config.get("keep_3x3", True),
        min_hidden=config["rd_channels"],
    )


@cases("selective_kernel")
def test_selective_kernel(case):
    layer = selective_kernel(case["config"])
    branches = len(layer.convs)
    names = {f"convs.{b}.weight": f"paths.{b}.conv.weight" for b in range(branches)}
    names |= with_norm({f"norms.{b}": f"paths.{b}.bn" for b in range(branches)})
    names |= {
        "squeeze.fc.weight": "attn.fc_reduce.weight",
        "select.weight": "attn.fc_select.weight",
    }
    check(layer, case, names | with_norm({"squeeze.bn": "attn.bn"}))


def deform_pack(config):
    kind = dynaconv.ModulatedDeformConv2d if config["modulated"] else dynaconv.DeformConv2d
    return kind(
        config["in_channels"],
        config["out_channels"],
        **static(config),
        bias=config["modulated"],
        offset_groups=config["deform_groups"],
    )


@cases("deform_conv")
def test_deform(case):
    config = case["config"]
    if "modulated" in config:
        layer = deform_pack(config)
        names = {key.replace("conv_offset", "offset_conv"): key for key in case["state"]}
        check(layer, case, names)
        return
    tensors = {
        name: None if t is None else t.clone().requires_grad_()
        for name, t in case["inputs"].items()
    }
    weight, mask = tensors["weight"], tensors.pop("mask")
    groups = tensors["input"].shape[1] // weight.shape[1]
    output = deform_conv(**tensors, **config, groups=groups, modulation=mask)
    close(output, case["output"], case["name"])
    output.backward(case["grad_output"])
    for name, tensor in (tensors | {"mask": mask}).items():
        if tensor is not None:
            close(tensor.grad, case["grads"][name], f"gradient of {name}")
