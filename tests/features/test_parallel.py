"""Training on two processes, for every class of every family."""

import pytest

from dynaconv.testing.features import check_feature
from tests.features.cases import over_families


@over_families("ddp")
def test_ddp(cls, arguments):
    check_feature("ddp", cls, arguments)


@pytest.mark.slow
@over_families("ddp", samples=None)
def test_ddp_with_all_options(cls, arguments):
    check_feature("ddp", cls, arguments)
