"""The list of features itself: limits are strict, and the page in docs is that of the code."""

from pathlib import Path

import pytest

import dynaconv
from dynaconv.testing.features import FEATURES, check_feature, feature
from dynaconv.testing.features.page import page

PAGE = Path(__file__).parents[2] / "docs" / "features.md"


@pytest.fixture
def wide(monkeypatch):
    """A feature that layers with more than 4 output channels lack."""
    monkeypatch.setattr("dynaconv.testing.features.registry.FEATURES", dict(FEATURES))

    def check(cls, arguments):
        assert arguments["out_channels"] <= 4, "too wide"

    feature("narrow", "narrow")(check)


ARGUMENTS = {"in_channels": 4, "out_channels": 4, "kernel_size": 3}


@pytest.mark.parametrize("width", [4, 6])
@pytest.mark.parametrize("declared", [True, False])
def test_limits_are_strict(wide, monkeypatch, width, declared):
    limits = {"narrow": "it is made wide"} if declared else {}
    monkeypatch.setattr(dynaconv.DyConv2d, "limits", classmethod(lambda cls, arguments: limits))
    call = lambda: check_feature("narrow", dynaconv.DyConv2d, ARGUMENTS | {"out_channels": width})
    if declared == (width > 4):
        call()
    else:
        with pytest.raises(AssertionError, match="made wide" if declared else "too wide"):
            call()


def test_the_page_is_that_of_the_code():
    assert PAGE.read_text(encoding="utf-8") == page()
