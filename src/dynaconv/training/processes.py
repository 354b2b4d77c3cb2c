"""Training on several processes: what each of them reads, draws and says."""

import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.utils.data import BatchSampler, Sampler

from dynaconv.data.errors import InputError


class Part(Sampler[list[int]]):
    """Each process's part of every batch: together they take the batches of a single process.

    Args:
        batches: with a `sampler` that is told the epoch, as in torch's BatchSampler.
    """

    def __init__(self, batches: BatchSampler) -> None:
        self.batches, self.sampler = batches, batches.sampler

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        rank, number = process(), dist.get_world_size()
        for batch in self.batches:
            # The rest of the last batch may be too small for all.
            yield batch[rank::number] or [batch[rank % len(batch)]]


def process() -> int:
    """Which process of the training this is, 0 for the first, which tells and writes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0)))


def check_devices(devices: int, batch: int) -> None:
    """InputError unless there are as many devices, and samples of a batch for each."""
    there = torch.cuda.device_count()
    if torch.cuda.is_available() and devices > there:
        raise InputError(f"--devices {devices}: there are {there} GPUs")
    if batch % devices:
        raise InputError(f"--batch {batch} cannot be dealt out evenly to --devices {devices}")
