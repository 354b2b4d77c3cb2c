"""What processes of test_parallel run: found there by its name."""

from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dynaconv
from dynaconv.masking import mask_from_sizes
from dynaconv.testing.families import SIZES
from dynaconv.testing.features.learning import examples
from dynaconv.testing.features.parallel import check_ways, randomized_classifier


def body(channels):
    return (
        nn.Conv2d(3, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 4),
    )


def one_warehouse():
    torch.manual_seed(0)
    model = dynaconv.convert(nn.Sequential(*body(8)), "kernel_warehouse", r"[24]")[0]
    dynaconv.share_kernels(model)
    dynaconv.anneal(model, 0.5)
    return model.double()


def one_parent():
    torch.manual_seed(0)
    model = nn.Sequential(*body(6))
    child = dynaconv.KernelDNAConv2d(6, 6, 3, padding=1, bias=False)
    model[2] = child.derive_from(model[4])
    return model.double()


def in_one_group(model):
    """fully_shard of the layers that share a parameter, together."""
    mesh = init_device_mesh("cpu", (2,))
    fully_shard([model[2], model[4]], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train_shared(make):
    torch.manual_seed(1)
    batch = torch.randn(4, 3, 9, 9).double(), torch.arange(4)
    check_ways(make, batch, make.__name__, in_one_group)


def train_padded(cls, arguments):
    """Samples of other sizes in each process: the statistics are those of all real positions."""
    torch.manual_seed(1)
    x, labels = examples(cls, arguments)
    full = torch.tensor(SIZES[cls.rank])
    mask = mask_from_sizes(torch.stack([full, full - 1, full - 2, full - 1]), x.shape[2:])
    model = partial(randomized_classifier, cls, arguments)
    check_ways(model, (x.double(), mask, labels), cls.__name__)


def train_at_bounds(cls, arguments, name, start):
    """Parameters `name` start at their bounds, and some of them are drawn outwards."""

    def model():
        found = randomized_classifier(cls, arguments)
        torch.nn.init.constant_(getattr(found.layer, name), start)
        dynaconv.keep_inside(found)
        return found

    torch.manual_seed(1)
    x, labels = examples(cls, arguments)
    check_ways(model, (x.double(), labels), cls.__name__)


def temperature_of_the_first():
    """DistributedDataParallel sends buffers: one process may anneal for all."""
    layer = dynaconv.DyConv2d(3, 4, 3)
    model = DistributedDataParallel(layer)
    if dist.get_rank() == 0:
        dynaconv.anneal(model, 0.5)
    model(torch.randn(2, 3, 5, 5))
    assert layer.temperature == 15.5


def refuse_second():
    if dist.get_rank() == 1:
        raise ValueError("this one does not want")


def wait_for_the_other():
    if dist.get_rank() == 1:
        dist.barrier()
