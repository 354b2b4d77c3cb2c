"""Training on two processes, for every class of every family; shared kernels; padded batches."""

import pytest

import dynaconv
from dynaconv.testing.features import check_feature
from dynaconv.testing.features import processes as module
from dynaconv.testing.features.processes import processes
from tests.features import workers
from tests.features.cases import over_families


@over_families("ddp")
def test_ddp(cls, arguments):
    check_feature("ddp", cls, arguments)


@pytest.mark.slow
@over_families("ddp", samples=None)
def test_ddp_with_all_options(cls, arguments):
    check_feature("ddp", cls, arguments)


@pytest.mark.parametrize("make", [workers.one_warehouse, workers.one_parent])
def test_shared_kernels(make):
    processes().run(workers.train_shared, make)


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (dynaconv.Involution2d, {"group_channels": 2}),
        (dynaconv.SelectiveKernelConv2d, {}),
        (dynaconv.DCDConv1d, {}),
        (dynaconv.ODConv3d, {}),
    ],
)
def test_padded_batches(cls, arguments):
    sizes = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1}
    processes().run(workers.train_padded, cls, sizes | arguments)


@pytest.mark.parametrize(
    ("cls", "arguments", "name", "start"),
    [
        (dynaconv.LearnedStrideConv1d, {"published": False}, "strides", 0),
        (dynaconv.LearnedStrideConv2d, {"published": False}, "strides", 0),
        (dynaconv.LearnedStrideConv2d, {"max_stride": 1.5, "published": False}, "strides", 9),
        (dynaconv.DCLSConv1d, {"interpolation": "linear", "dilation": 2}, "positions", 99),
        (dynaconv.DCLSConv2d, {"kernel_size": (3, 5), "dilation": (3, 1)}, "positions", 99),
    ],
)
def test_parameters_at_their_bounds(cls, arguments, name, start):
    sizes = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1}
    processes().run(workers.train_at_bounds, cls, sizes | arguments, name, start)


def test_temperature_of_the_first():
    processes().run(workers.temperature_of_the_first)


def test_a_fault_is_told():
    with pytest.raises(AssertionError, match=r"process 1: (.|\n)*this one does not want"):
        processes().run(workers.refuse_second)


def test_new_processes_start_and_do_not_wait_for_each_other_for_ever(monkeypatch):
    processes().close()
    processes().run(workers.temperature_of_the_first)
    monkeypatch.setattr(module, "PATIENCE", 1)
    with pytest.raises(AssertionError, match="no answer: the processes wait for each other"):
        processes().run(workers.wait_for_the_other)
