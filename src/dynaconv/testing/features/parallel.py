"""Training on several processes: as one process trains on all of their samples.

With DistributedDataParallel, which raises where a parameter is not used, with gradients summed up
over several batches first, with FSDP2, and with batch norms that take their statistics over all
processes. On the CPU, between two processes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from dynaconv.anneal import keep_inside
from dynaconv.layers.base import DynamicConv
from dynaconv.testing.families import randomized
from dynaconv.testing.features.learning import Classifier, examples
from dynaconv.testing.features.processes import WORLD, processes
from dynaconv.testing.features.registry import Arguments, feature
from dynaconv.testing.tolerance import close

STEPS, RATE = 3, 0.05
# The model's inputs, and the labels.
Batch = tuple[Tensor, ...]


@feature("ddp", "DDP, FSDP2")
def check_parallel(cls: type[DynamicConv], arguments: Arguments) -> None:
    """The losses of one process, on two, in each way of training there."""
    processes().run(check_all_ways, cls, arguments)


def randomized_classifier(cls: type[DynamicConv], arguments: Arguments) -> nn.Module:
    """The same at every call, in float64 and training mode."""
    torch.manual_seed(0)
    classifier = Classifier(cls, arguments).double()
    classifier.layer = randomized(cls, arguments)
    return classifier.train()


def check_all_ways(cls: type[DynamicConv], arguments: Arguments) -> None:
    """Within a process: every way of training against training alone on all samples."""
    torch.manual_seed(1)
    x, labels = examples(cls, arguments)
    check_ways(partial(randomized_classifier, cls, arguments), (x.double(), labels), cls.__name__)


def check_ways(
    model: Callable[[], nn.Module],
    batch: Batch,
    name: str,
    shard: Callable[[nn.Module], nn.Module] | None = None,
) -> None:
    """Every way of training a fresh model() against training it alone on the whole batch.

    Batch norms keep their running statistics but where they are synchronised. `shard` is what
    FSDP2 does to a model, by default `sharded`.
    """
    shard, frozen = shard or sharded, lambda: _freeze_norms(model())
    alone = frozen()
    expected = losses(alone, [batch])
    mine = _parts(batch, WORLD)[dist.get_rank()]
    split = frozen()
    close(losses(DistributedDataParallel(split), [mine]), expected, f"{name}, DDP losses")
    for (what, p), q in zip(split.named_parameters(), alone.parameters(), strict=True):
        close(p, q, f"{name}, {what} after DDP")
    summed = losses(DistributedDataParallel(frozen()), _parts(mine, 2))
    close(summed, expected, f"{name}, losses from summed gradients")
    parts = shard(frozen())
    close(losses(parts, [mine]), expected, f"{name}, FSDP2 losses")
    keep_inside(alone)
    for (what, p), q in zip(parts.named_parameters(), alone.parameters(), strict=True):
        close(p.full_tensor(), q, f"{name}, {what} after FSDP2")  # type: ignore[attr-defined]
    if any(isinstance(module, _BatchNorm) for module in alone.modules()):
        # DistributedDataParallel refuses a SyncBatchNorm on the CPU, fully_shard does not.
        synced = shard(nn.SyncBatchNorm.convert_sync_batchnorm(model()))
        expected = losses(model(), [batch])
        close(losses(synced, [mine]), expected, f"{name}, SyncBatchNorm losses")


def losses(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """The loss at each of STEPS steps, the mean over the processes' equal parts, (STEPS,).

    A step sums up the gradients of `batches`, which have the same size, and exchanges them once.
    """
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for i, (*inputs, labels) in enumerate(batches):
            last = i == len(batches) - 1
            with nullcontext() if last else model.no_sync():  # type: ignore[operator]
                loss = F.cross_entropy(model(*inputs), labels) / len(batches)
                loss.backward()
            total += loss.detach()
        optimizer.step()
        if isinstance(model, FSDPModule):
            keep_inside(model)
        dist.all_reduce(total)
        found.append(total / WORLD)
    return torch.stack(found)


def _parts(batch: Batch, number: int) -> list[Batch]:
    """The batch, cut into equal parts."""
    return list(zip(*(tensor.chunk(number) for tensor in batch), strict=True))


def sharded(model: nn.Module) -> nn.Module:
    """`model` after fully_shard of each dynamic layer, then of the rest."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in list(_dynamic(model)):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _dynamic(model: nn.Module) -> Iterator[DynamicConv]:
    return (module for module in model.modules() if isinstance(module, DynamicConv))


def _freeze_norms(model: nn.Module) -> nn.Module:
    """`model` with batch norms in evaluation mode."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    return model
