"""torch.compile without graph breaks, for every class of every family and every primitive."""

import pytest

from dynaconv.testing.features import check_feature
from tests.features.cases import over_families


@over_families("compile")
def test_compiles(cls, arguments):
    check_feature("compile", cls, arguments)


@pytest.mark.slow
@over_families("compile_mask", samples=None)
def test_compiles_with_a_mask(cls, arguments):
    check_feature("compile_mask", cls, arguments)
