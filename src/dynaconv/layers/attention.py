"""Heads over pooled features, and a batch norm that bears one value and padding."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynaconv.layers.base import without_autocast
from dynaconv.masking import masked_detail, masked_mean


class SafeBatchNorm(_BatchNorm):
    """Batch norm over (N, C, *L) that works where nn.BatchNorm cannot.

    One value a channel has no variance: nn.BatchNorm then raises, or turns the features into its
    bias. Here the running statistics serve. With a mask, statistics are those of real positions.
    Keys and, otherwise, results are those of nn.BatchNormNd.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions from (N, C) on."""

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self.training:
            return self._plain(input)
        if input.numel() // input.shape[1] <= 1:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        if mask is None:
            return self._plain(input)
        return masked_batch_norm(self, input, mask)

    def _plain(self, input: Tensor) -> Tensor:
        """nn.BatchNormNd's result, one sample as lines.

        For one sample of 2-D or 3-D torch's backward on the CPU gives wrong gradients where the
        gradient above it has channels that lie together (seen in 2.13 and 2.14).
        """
        if input.dim() < 4 or input.shape[0] != 1:
            return super().forward(input)
        return super().forward(input.flatten(2)).unflatten(2, input.shape[2:])


def batch_norm(norm: nn.Module, input: Tensor, mask: Tensor | None = None) -> Tensor:
    """What a layer calls: `norm`, a SafeBatchNorm or the SyncBatchNorm in its place.

    torch.nn.SyncBatchNorm.convert_sync_batchnorm replaces every batch norm of a model; its own
    knows neither masks nor the CPU.
    """
    if isinstance(norm, SafeBatchNorm):
        return norm(input, mask)
    if norm.training and (mask is not None or input.device.type == "cpu"):
        return masked_batch_norm(norm, input, mask)  # type: ignore[arg-type]
    return norm(input)


def masked_batch_norm(norm: _BatchNorm, input: Tensor, mask: Tensor | None) -> Tensor:
    """`norm` in training mode, with the statistics of the real positions; mask (N, *L).

    Those of a SyncBatchNorm are taken over all processes. Statistics are float32 at least: in half
    precision sums and squares leave its range.
    """
    real = input.new_ones(()).bool() if mask is None else mask.unsqueeze(1)
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    over = [d for d in range(input.dim()) if d != 1]
    shape = (1, -1, *[1] * (input.dim() - 2))
    count = real.expand_as(x[:, :1]).sum().to(x.dtype)
    sums = torch.cat([x.masked_fill(~real, 0).sum(over), count.unsqueeze(0)])
    total, count = _over_processes(norm, sums).split([x.shape[1], 1])
    count = count.detach().clamp(min=1)
    mean = total / count
    centred = x - mean.reshape(shape)
    variance = _over_processes(norm, centred.masked_fill(~real, 0).square().sum(over)) / count
    if norm.track_running_stats:
        with torch.no_grad():
            unbiased = variance * count / (count - 1).clamp(min=1)
            norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            momentum = norm.momentum or 1 / float(norm.num_batches_tracked)  # type: ignore[arg-type]
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)  # type: ignore
            norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)  # type: ignore
    output = centred * (variance + norm.eps).rsqrt().reshape(shape)
    if norm.affine:
        output = output * norm.weight.reshape(shape) + norm.bias.reshape(shape)
    return output.to(input.dtype)


def _over_processes(norm: _BatchNorm, total: Tensor) -> Tensor:
    """The sum of the processes' `total` where `norm` is a SyncBatchNorm, else `total` itself."""
    synced = isinstance(norm, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized()
    if not synced:
        return total
    from torch.distributed.nn.functional import all_reduce  # not in every build of torch

    return all_reduce(total, group=norm.process_group or dist.group.WORLD)


def masked_group_norm(norm: nn.GroupNorm, x: Tensor, mask: Tensor | None) -> Tensor:
    """`norm` of x (N, C, *L) with the statistics of the real positions; mask (N, *L)."""
    if mask is None:
        return norm(x)
    real = mask.unflatten(0, (-1, 1, 1))
    groups = x.unflatten(1, (norm.num_groups, -1))
    groups = groups.to(torch.promote_types(x.dtype, torch.float32))
    over = tuple(range(2, groups.dim()))
    count = (real.sum(over, keepdim=True) * groups.shape[2]).clamp(min=1)
    centred = groups - groups.masked_fill(~real, 0).sum(over, keepdim=True) / count
    variance = centred.masked_fill(~real, 0).square().sum(over, keepdim=True) / count
    normal = (centred * (variance + norm.eps).rsqrt()).flatten(1, 2).to(x.dtype)
    shape = (-1, *[1] * (x.dim() - 2))
    return normal * norm.weight.reshape(shape) + norm.bias.reshape(shape)


class Squeeze(nn.Module):
    """What a sample is about: relu(norm(fc(mean(x)))), (N, C, *L) -> (N, hidden).

    The mean is over real positions, the statistics of `norm` over samples that have any. Without
    `norm`, fc stands alone, as in Dynamic Convolution.
    """

    def __init__(self, channels: int, hidden: int, norm: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, hidden, bias=False)
        self.bn = SafeBatchNorm(hidden) if norm else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = self.fc(masked_mean(x, mask))
        if self.bn is None:
            return F.relu(hidden)
        there = mask.flatten(1).any(1) if mask is not None and self.training else None
        return F.relu(batch_norm(self.bn, hidden, there))


class Regulator(nn.Module):
    """A few numbers in -1 ... 1 a sample: tanh(fc(relu(squeeze([mean(x), mean(|dx|)])))).

    (N, C, *L) -> (N, outputs), zero at first. dx is the difference to the next position: how fine
    the detail is, which tells what size or stride fits. Sizes and strides need more digits than
    half precision has, so there is no autocast here, and the result is float32 at least.
    """

    def __init__(self, channels: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(2 * channels, hidden)
        self.fc = nn.Linear(hidden, outputs)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        pooled = torch.cat([masked_mean(x, mask), masked_detail(x, mask)], 1)
        with without_autocast(x.device.type):
            return torch.tanh(_precise(self.fc, F.relu(_precise(self.squeeze, pooled))))


def _precise(linear: nn.Linear, x: Tensor) -> Tensor:
    """linear(x) in float32 at least, whatever the dtype of its parameters; x is."""
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    return F.linear(x, linear.weight.to(x.dtype), bias)
