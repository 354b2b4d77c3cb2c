"""The table of all families, with what each costs for a given convolution."""

from pathlib import Path

import pytest
from torch import nn

import dynaconv
from dynaconv.catalogue import catalogue, page
from dynaconv.registry import families

PAGE = Path(__file__).parent.parent / "docs" / "families.md"


@pytest.fixture(scope="module")
def entries():
    return {entry.family.name: entry for entry in catalogue()}


def test_every_family_of_two_dimensions_has_costs(entries):
    assert list(entries) == [name for name, f in families().items() if 2 in f.classes]
    assert [e.family.name for e in entries.values() if e.parameters is None] == []


def test_costs_are_those_beyond_the_static_convolution(entries):
    """DyConv's by hand: three more kernels and biases, the attention, and its products."""
    assert entries["dyconv"].parameters == 3 * (64 * 64 * 9 + 64) + 64 * 17 + 17 * 4 + 4
    mixing = 4 * (64 * 64 * 9 + 64)
    assert entries["dyconv"].macs == mixing + 64 * 17 + 17 * 4
    assert entries["lightconv"].parameters == 9 - 64 * 64 * 9


def test_the_page_is_what_the_command_prints(entries):
    assert PAGE.read_text(encoding="utf-8") == page(list(entries.values()))


def test_for_another_convolution():
    found = {e.family.name: e for e in catalogue(nn.Conv1d(6, 9, 3, groups=3), 20)}
    assert "snake" not in found
    assert found["condconv"].parameters == 3 * (9 * 2 * 3 + 9) + 6 * 4 + 4
    refused = found["contmix"]
    assert refused.parameters is None
    assert len(refused.note) > 20
    assert refused.cells()[4:6] == ("–", "–")


def test_families_as_text_are_the_table():
    text = str(dynaconv.families())
    assert text.startswith("| family |")
    assert all(f"| `{name}` |" in text for name, f in families().items() if 2 in f.classes)
