"""Memory is scarce in these tests, so that a call that wants gigabytes is seen."""

import resource
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.reliability.judge import COUNTS

GIBIBYTE = 2**30


@contextmanager
def limited(room):
    """At most `room` bytes of address space more than now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    least = pages * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_AS, (least, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def pytest_terminal_summary(terminalreporter):
    """How many calls were made, and how they ended."""
    total = Counter()
    for label, counts in COUNTS.items():
        total += counts
        terminalreporter.write_line(f"{label}: {dict(counts)}")
    if total:
        terminalreporter.write_line(f"all: {dict(total)}")


@pytest.fixture
def small_memory():
    return lambda: limited(GIBIBYTE)


@pytest.fixture(autouse=True)
def _bounded():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with limited(3 * GIBIBYTE):
        yield
    torch.set_num_threads(threads)
