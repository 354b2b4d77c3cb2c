"""Every registered family keeps every promise; a family added later is covered as it is."""

import pytest
import torch

from dynaconv.registry import families
from dynaconv.testing import checks

CASES = [
    pytest.param(cls, arguments, check, id=f"{cls.__name__}-{i}-{check.__name__[6:]}")
    for family in families().values()
    for cls in family.all_classes
    for i, arguments in enumerate(cls.samples(cls.rank))
    for check in checks(arguments)
]


@pytest.mark.parametrize(("cls", "arguments", "check"), CASES)
def test_contract(cls, arguments, check):
    torch.manual_seed(0)
    check(cls, arguments)
