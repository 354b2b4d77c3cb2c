"""Every registered family keeps every promise; a family added later is covered as it is."""

import pytest
import torch

from dynaconv.registry import families
from dynaconv.testing import CHECKS

CASES = [
    pytest.param(cls, arguments, id=f"{cls.__name__}-{i}")
    for family in families().values()
    for rank, cls in family.classes.items()
    for i, arguments in enumerate(cls.samples(rank))
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__.removeprefix("check_"))
@pytest.mark.parametrize(("cls", "arguments"), CASES)
def test_contract(cls, arguments, check):
    torch.manual_seed(0)
    check(cls, arguments)
