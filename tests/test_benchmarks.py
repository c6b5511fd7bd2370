import contextlib
import importlib.util
import pathlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

HARNESS = pathlib.Path(__file__).parents[1] / "benchmarks" / "_harness.py"


@pytest.fixture(scope="module")
def harness() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("benchmark_harness", HARNESS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("text", ["tensor", "array", "list"])
def test_the_variants_that_are_compared_compute_the_same(harness: Any, text: str) -> None:
    scenario = harness.Scenario(harness.Light, text=text)
    data = harness.RawBatches(text, rows=40)
    harness.check_equal(scenario, data, ["staged", "thread"])  # a worker process takes too long to start


def test_a_variant_that_computes_something_else_is_noticed(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = harness.ClickModel.ready
    monkeypatch.setattr(harness.ClickModel, "ready", lambda self, raw: (*ready(self, raw)[:2], raw["labels"] * 0))
    with pytest.raises(AssertionError, match="thread differs from plain"):
        harness.check_equal(harness.Scenario(harness.Light), harness.RawBatches("tensor", rows=40), ["thread"])


def test_variants_take_turns(harness: Any) -> None:
    calls: list[str] = []
    variants = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = harness.interleave(variants, rounds=2, steps=2, warmup=1)
    assert calls == list("aaabbbaaabbb")
    assert [len(times[name].rounds) for name in "ab"] == [2, 2]


def test_ratios_are_taken_round_by_round(harness: Any) -> None:
    times = {"base": harness.Times([1.0, 2.0, 4.0]), "other": harness.Times([2.0, 2.0, 4.0])}
    assert times["other"].over(times["base"]) == [2.0, 1.0, 1.0]
    assert times["base"].median == 2.0
    row = "| other | 2.00 | 2.00..4.00 | 1.000 | 1.000..2.000 |"
    assert row in harness.table(times, "base", 1.0, "s").splitlines()


def test_the_hand_written_thread_passes_errors_on(harness: Any) -> None:
    def prepare(batch: int) -> int:
        if batch == 2:
            raise ValueError("batch 2")
        return batch * 10

    loader = harness.PrefetchThread(range(5), prepare, 1)
    batches = iter(loader)
    assert [next(batches), next(batches)] == [0, 10]
    with pytest.raises(ValueError, match="batch 2"):
        next(batches)
    loader.close()


def test_the_hand_written_thread_ends(harness: Any) -> None:
    with contextlib.closing(harness.PrefetchThread(range(3), str, 2)) as loader:
        assert list(loader) == ["0", "1", "2"]
    with contextlib.closing(harness.PrefetchThread(range(100), str, 2)) as loader:
        assert next(iter(loader)) == "0"
