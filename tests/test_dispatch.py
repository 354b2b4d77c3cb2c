"""The choice of a backend: pure, forced on request, explained."""

import pytest
import torch

import dynaconv
from dynaconv import dispatch
from dynaconv.functional.conv_per_sample import prepare


@pytest.fixture
def call():
    return torch.randn(2, 4, 9), torch.randn(2, 6, 4, 3)


def test_reference_is_the_last_resort():
    assert dispatch.backends()[-1] == "reference"


def test_problem_from_metadata_alone():
    with torch.device("meta"):
        problem, _ = prepare(torch.empty(2, 4, 9), torch.empty(2, 6, 4, 3, requires_grad=True))
    assert problem.device == "meta"
    assert problem.rank == 1
    assert problem.needs_grad
    assert dict(problem.shapes) == {"input": (2, 4, 9), "weight": (2, 6, 4, 3)}
    with torch.no_grad():
        assert not prepare(torch.empty(2, 4, 9), torch.empty(2, 6, 4, 3))[0].needs_grad


def test_channels_last_is_seen():
    x = torch.randn(2, 4, 5, 6).to(memory_format=torch.channels_last)
    assert prepare(x, torch.randn(2, 6, 4, 3, 3))[0].channels_last
    assert not prepare(x.contiguous(), torch.randn(2, 6, 4, 3, 3))[0].channels_last


def test_backend_forces_and_nests(call):
    seen = []
    fake = dispatch.Backend(
        "fake", lambda problem: None, {"conv_per_sample": lambda *a: seen.append(1) or a[0]}
    )
    dispatch.BACKENDS.append(fake)
    try:
        with dynaconv.backend("fake"):
            dynaconv.functional.conv_per_sample(*call)
            with dynaconv.backend("reference"):
                dynaconv.functional.conv_per_sample(*call)
        assert len(seen) == 1
        with (
            dynaconv.backend("fake"),
            pytest.raises(RuntimeError, match=r"no backend serves(.|\n)*fake: has no conv_mixture"),
        ):
            dynaconv.functional.conv_mixture(call[0], call[1], torch.randn(2, 2))
    finally:
        dispatch.BACKENDS.remove(fake)


def test_down_from(call, monkeypatch):
    problem, _ = prepare(*call)
    order = [dispatch.Backend(n, lambda p: None, {problem.primitive: max}) for n in "abc"]
    monkeypatch.setattr(dispatch, "BACKENDS", order)
    with dynaconv.backend("a"), dispatch.down_from("b"):
        assert dispatch.backends() == ["b", "c"]
        assert "b: chosen" in dispatch.report(problem)
    assert dispatch.backends() == ["a", "b", "c"]


def test_unsupported_gives_every_reason(call, monkeypatch):
    picky = dispatch.Backend(
        "picky", lambda p: f"only 2-D, got {p.rank}-D", {"conv_per_sample": max}
    )
    monkeypatch.setattr(dispatch, "BACKENDS", [picky])
    with pytest.raises(RuntimeError, match="picky: only 2-D, got 1-D"):
        dynaconv.functional.conv_per_sample(*call)


def test_a_fault_in_supports_is_not_swallowed(call, monkeypatch):
    broken = dispatch.Backend("broken", lambda p: 1 / 0, {"conv_per_sample": max})
    monkeypatch.setattr(dispatch, "BACKENDS", [broken, *dispatch.BACKENDS])
    with pytest.raises(ZeroDivisionError):
        dynaconv.functional.conv_per_sample(*call)


def test_explain(call):
    text = dynaconv.explain(dynaconv.functional.conv_per_sample, *call)
    assert "conv_per_sample: input (2, 4, 9), weight (2, 6, 4, 3), torch.float32, cpu" in text
    assert [line.split(":")[0].strip() for line in text.splitlines()[1:]] == dispatch.backends()
    assert text.count(": chosen") == 1
    with dynaconv.backend("reference"):
        text = dynaconv.explain(dynaconv.functional.conv_per_sample, *call)
    assert "reference: chosen" in text
    layer = dynaconv.CondConv1d(4, 4, 3)
    assert "conv_mixture" in dynaconv.explain(layer, call[0])
    assert dynaconv.explain(torch.nn.Conv1d(4, 4, 3), call[0]).startswith("no primitive")


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend 'cuda' does not exist; there are"):
        dynaconv.backend("cuda").__enter__()
