"""Recorder and Stats: the figures, the reading of them, and warnings that wait for the training thread."""

import collections
import dataclasses
import threading
import warnings
from typing import Any

import numpy as np
import pytest

from torchstage import Stats
from torchstage.errors import DroppedBatchWarning, FallbackWarning
from torchstage.stats import Distribution, Recorder


def recorded() -> Recorder:
    recorder = Recorder("Tower")
    for wait, occupancy in ((0.001, 1.0), (0.003, 0.5), (0.002, 0.0), (0.002, 0.5)):
        recorder.took(wait, occupancy)
    recorder.staged(read=0.010, stage=0.020)
    recorder.staged(read=0.030, stage=None)
    for _ in range(3):
        recorder.step()
    recorder.fallback("batch written")
    recorder.drop("timeout")
    recorder.drop("ValueError")
    recorder.drop("timeout")
    return recorder


def test_the_figures_are_those_that_were_recorded() -> None:
    stats = recorded().snapshot({})
    assert (stats.name, stats.batches, stats.staged_steps) == ("Tower", 4, 3)
    assert stats.wait.count == 4
    assert stats.wait.mean == pytest.approx(0.002)
    assert dataclasses.astuple(stats.read) == pytest.approx((2, 0.020, 0.028, 0.0298))
    assert stats.stage == Distribution(1, 0.020, 0.020, 0.020)
    assert stats.occupancy == pytest.approx(0.5)
    assert dict(stats.fallbacks) == {"batch written": 1}
    assert dict(stats.drops) == {"timeout": 2, "ValueError": 1}


def test_nothing_recorded_is_all_zeros() -> None:
    nothing = Distribution(0, 0.0, 0.0, 0.0)
    stats = Recorder("new").snapshot({})
    assert stats == Stats("new", 0, 0, nothing, nothing, nothing, 0.0, {}, {}, {})


def test_the_figures_of_a_table_are_those_of_all_its_lookups() -> None:
    recorder = Recorder("x")
    first, second = recorder.lookup("user"), recorder.lookup("user")
    recorder.lookup("item")
    first.gathers, first.gather_seconds, first.bytes, first.unique = 3, 0.003, 3000, 0.5
    first.used, first.used_seconds, first.repaired, first.staleness = 2, 0.002, 10, 1
    second.gathers, second.gather_seconds, second.bytes, second.unique = 1, 0.005, 1000, 0.25
    second.kept, second.kept_seconds = 4, 0.012
    second.reasons["SGD with momentum"] += 4
    stats = recorder.snapshot({})
    user = stats.tables["user"]
    assert (user.gathers, user.bytes, user.unique) == (4, 1000, 0.5)
    assert (user.gather_seconds, user.used_seconds, user.kept_seconds) == pytest.approx((0.002, 0.001, 0.003))
    assert (user.used, user.repaired, user.staleness, dict(user.kept)) == (2, 5, 1, {"SGD with momentum": 4})
    assert user.saved_seconds == pytest.approx(0.002)
    assert stats.tables["item"].saved_seconds is None
    assert str(user) == (
        "2 of 6 lookups used rows gathered ahead; 50% unique, 0.00 MB gathered; 5 rows repaired, 1.00 ms in the step; "
        "2.00 ms saved each; at most 1 steps stale; in the step: SGD with momentum x4"
    )
    assert "  table `user`: 2 of 6 lookups" in str(stats)


def test_the_models_calls_on_unstaged_batches_are_counted_among_the_fallbacks() -> None:
    unstaged = {"raw batch": 7, "nothing staged": 1}
    assert dict(recorded().snapshot(unstaged).fallbacks) == {"batch written": 1, **unstaged}


def test_percentiles_are_of_the_last_1000_and_the_mean_is_of_all() -> None:
    recorder = Recorder("x")
    times = [100.0, *[float(n) for n in range(1000)]]
    for seconds in times:
        recorder.took(seconds, 0.0)
    wait = recorder.snapshot({}).wait
    assert wait.count == 1001
    assert wait.mean == pytest.approx(sum(times) / 1001)
    assert (wait.p90, wait.p99) == pytest.approx((899.1, 989.01))
    assert (wait.p90, wait.p99) == pytest.approx(tuple(np.percentile(times[1:], [90, 99])))


def test_a_snapshot_is_frozen_and_does_not_follow_the_recorder() -> None:
    recorder = recorded()
    stats: Any = recorder.snapshot({"raw batch": 1})
    recorder.fallback("another")
    recorder.took(1.0, 1.0)
    assert stats.batches == 4
    assert dict(stats.fallbacks) == {"batch written": 1, "raw batch": 1}
    for field in dataclasses.fields(stats):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(stats, field.name, None)
    for mapping in (stats.fallbacks, stats.drops):
        with pytest.raises(TypeError):
            mapping["timeout"] = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.wait.mean = 0.0


def test_printed_it_says_how_to_read_it() -> None:
    assert str(recorded().snapshot({"raw batch": 2})) == "\n".join(
        [
            "stage Tower: 4 batches, 3 staged steps",
            "  wait for a batch:  mean 2.00 ms, p90 2.70 ms, p99 2.97 ms   (near zero: staging keeps ahead)",
            "  stage per batch:   mean 20.00 ms, p90 20.00 ms, p99 20.00 ms   (runs beside the step)",
            "  loader per batch:  mean 20.00 ms, p90 28.00 ms, p99 29.80 ms   (runs beside the step)",
            "  buffer occupancy:  0.50   (near 1: staging keeps ahead; near 0: it limits the step)",
            "  fallbacks:         batch written x1, raw batch x2",
            "  drops:             timeout x2, ValueError x1",
        ]
    )


def test_printed_without_fallbacks_and_drops_it_says_none() -> None:
    lines = str(Recorder("x").snapshot({})).splitlines()
    assert lines[-2:] == ["  fallbacks:         none", "  drops:             none"]


def test_warnings_wait_for_emit_and_come_in_order_once_for_each_key() -> None:
    recorder = Recorder("x")
    recorder.warn_once("a", DroppedBatchWarning, "first")
    recorder.warn_once("b", FallbackWarning, "second")
    recorder.warn_once("a", FallbackWarning, "the key is known")
    with pytest.warns() as caught:
        recorder.emit(stacklevel=1)
    assert [(w.category, str(w.message)) for w in caught] == [
        (DroppedBatchWarning, "first"),
        (FallbackWarning, "second"),
    ]
    recorder.warn_once("b", FallbackWarning, "still known after it was given")
    recorder.warn_once("c", FallbackWarning, "third")
    with pytest.warns() as caught:
        recorder.emit(stacklevel=1)
    assert [str(w.message) for w in caught] == ["third"]
    recorder.emit(stacklevel=1)  # nothing is left: it would be an error here


def test_a_warning_points_at_the_caller_that_stacklevel_names() -> None:
    recorder = Recorder("x")

    def inner(stacklevel: int) -> None:
        recorder.warn_once(f"key {stacklevel}", FallbackWarning, "here")
        recorder.emit(stacklevel)

    lines = []
    for stacklevel in (1, 2):
        with pytest.warns(FallbackWarning) as caught:
            inner(stacklevel)
        assert caught[0].filename == __file__
        lines.append(caught[0].lineno)
    first = inner.__code__.co_firstlineno
    assert lines == [first + 2, first + 7]


def test_a_warning_that_is_an_error_leaves_the_later_ones_for_the_next_emit() -> None:
    recorder = Recorder("x")
    recorder.warn_once("a", FallbackWarning, "first")
    recorder.warn_once("b", FallbackWarning, "second")
    for text in ("first", "second"):
        with pytest.raises(FallbackWarning, match=text):
            recorder.emit(stacklevel=1)  # the test run makes errors of warnings
    recorder.emit(stacklevel=1)


class _Hesitant(list[Any]):
    """A list whose reader is overtaken by another one right after it looked whether something is in it."""

    def overtake(self, run: Any) -> None:
        self.run = run

    def __len__(self) -> int:
        size = super().__len__()
        run, self.run = self.__dict__.get("run"), None
        if run is not None:
            run()
        return size

    def __bool__(self) -> bool:
        return len(self) > 0


def test_two_threads_that_emit_at_once_give_each_warning_once() -> None:
    """With ``num_clients > 1`` several training threads emit."""
    recorder = Recorder("x")
    recorder._pending = pending = _Hesitant()
    recorder.warn_once("a", FallbackWarning, "once")
    other = threading.Thread(target=recorder.emit, args=(1,))

    def overtake() -> None:
        other.start()
        other.join(0.2)  # not for ever: where a lock keeps the other one out, that is as good

    pending.overtake(overtake)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recorder.emit(stacklevel=1)
        if other.ident is not None:
            other.join()
    recorder.emit(stacklevel=1)
    assert [str(w.message) for w in caught] == ["once"]


def test_figures_of_many_threads_add_up() -> None:
    recorder = Recorder("x")
    start = threading.Barrier(4)

    def record() -> None:
        start.wait()
        for _ in range(200):
            recorder.took(0.5, 1.0)
            recorder.staged(0.25, 0.125)
            recorder.step()
            recorder.fallback("f")
            recorder.drop("d")
            recorder.warn_once("w", FallbackWarning, "once")

    threads = [threading.Thread(target=record) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = recorder.snapshot({})
    assert (stats.batches, stats.staged_steps, stats.occupancy) == (800, 800, 1.0)
    assert (stats.wait.mean, stats.read.mean, stats.stage.mean) == (0.5, 0.25, 0.125)
    assert collections.Counter(stats.fallbacks) + collections.Counter(stats.drops) == {"f": 800, "d": 800}
    with pytest.warns(FallbackWarning, match="once") as caught:
        recorder.emit(stacklevel=1)
    assert len(caught) == 1
