"""Half precision for every class of every family: the plain ones in 2-D, all in `slow`."""

import pytest

from dynaconv.layers.transposed import Transposed
from dynaconv.testing.features import cases, check_feature
from tests.features.cases import over_families

PLAIN = [
    pytest.param(cls, arguments, id=cls.__name__)
    for cls, arguments in cases()
    if cls.rank == 2 and not issubclass(cls, Transposed)
]


@pytest.mark.parametrize("feature", ["fp16", "bf16"])
@pytest.mark.parametrize(("cls", "arguments"), PLAIN)
def test_half(cls, arguments, feature):
    check_feature(feature, cls, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("feature", ["fp16", "bf16"])
@over_families("fp16", samples=None)
def test_half_with_all_options(cls, arguments, feature):
    check_feature(feature, cls, arguments)
