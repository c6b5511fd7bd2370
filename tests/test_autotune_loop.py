"""The loop around the searches (10.1): its period, its thread, and how it ends."""

import gc
import threading
import weakref
from functools import partial

import pytest

from tests.autotune_models import PLENTY, FakeClock, parallel_map, worked
from torchstage.autotune import (
    AUTOTUNE,
    BUFFER_SIZE,
    PARALLELISM,
    AutotuneAlgorithm,
    CancellationToken,
    Clock,
    Model,
    OptimizationLoop,
    SharedState,
    make_async_known_ratio_node,
    make_parameter,
    make_source_node,
)

PATIENCE = 20.0  # seconds, for what happens at once


def published(model: Model) -> list[float]:
    states = [node.parameters[PARALLELISM].state for node in model.nodes if PARALLELISM in node.parameters]
    return [state.value for state in states if state is not None]


# The loop.


def loop_of(
    model: Model, clock: Clock, algorithm: AutotuneAlgorithm = AutotuneAlgorithm.HILL_CLIMB
) -> OptimizationLoop:
    return OptimizationLoop(model, algorithm, 4, PLENTY, clock=clock)


def test_the_period_doubles_up_to_a_minute() -> None:
    model, clock, token = Model(), FakeClock(last=15), CancellationToken()
    parallel_map(model, None, 1000.0)
    loop = loop_of(model, clock)
    loop.run(token)
    expected = [20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 10240, 20480, 40960, 60000, 60000, 60000]
    assert clock.waits_ms == pytest.approx(expected)
    assert published(model) == [5]  # 1000 / 5 is the first below 1000 / 4
    assert token.cancelled
    loop.run(token)  # a cancelled token: nothing at all
    assert len(clock.waits_ms) == 15


def test_the_first_optimization_runs_before_any_wait() -> None:
    model, clock = Model(), FakeClock(last=1)
    parallel_map(model, None, 1000.0)
    loop_of(model, clock).run(CancellationToken())
    assert clock.waits_ms == pytest.approx([20])
    assert published(model) == [5]


def test_a_cancelled_loop_does_not_begin() -> None:
    model, clock, token = Model(), FakeClock(), CancellationToken()
    parallel_map(model, None, 1000.0)
    token.cancel()
    loop_of(model, clock).run(token)
    assert clock.waits_ms == []
    assert published(model) == [AUTOTUNE]


def test_a_step_optimizes_at_once_and_doubles_the_period() -> None:
    model, clock = Model(), FakeClock()
    parallel_map(model, None, 1000.0)
    loop = loop_of(model, clock)
    result = loop.step()
    assert result is not None
    assert result.published
    assert result.algorithm == AutotuneAlgorithm.HILL_CLIMB
    assert published(model) == [5]
    periods = [loop.period_ms]
    for _ in range(2):
        loop.step()
        periods.append(loop.period_ms)
    model.add_node(make_source_node, "late", model.output)
    loop.step()
    periods.append(loop.period_ms)  # a new node does not reset it
    loop.reset_period()
    loop.step()
    periods.append(loop.period_ms)
    assert periods == [20, 40, 80, 160, 20]
    assert clock.waits_ms == []


@pytest.mark.parametrize(
    ("algorithm", "expected"), [(AutotuneAlgorithm.STAGE_BASED, 400.0), (AutotuneAlgorithm.MAX_PARALLELISM, 0.0)]
)
def test_only_the_stage_based_search_gets_the_target_time(algorithm: AutotuneAlgorithm, expected: float) -> None:
    model = Model()
    root = parallel_map(model, None, 1000.0)
    buffer = make_parameter(BUFFER_SIZE, SharedState(1), 1, 1)
    below = partial(make_async_known_ratio_node, ratio=1, parameters=[buffer])
    worked(model.add_node(make_source_node, "source", worked(model.add_node(below, "ahead", root), 0.0)), 100.0)
    model.record_iterator_gap_time(0.4)
    result = loop_of(model, FakeClock(), algorithm).step()
    assert result is not None
    assert published(model) == [3 if expected else 8]
    times = {input_time: model.output_time(root, input_time) for input_time in (0.0, 400.0)}
    assert times[0.0] != times[400.0]  # a slower consumer leaves the buffer time to fill
    assert result.output_time == pytest.approx(times[expected])


def test_the_loop_flushes_the_metrics() -> None:
    model = Model()
    worked(model.add_node(make_source_node, "files", None), 1.0, elements=3)
    loop = loop_of(model, FakeClock())
    for _ in range(2):
        loop.step()
        assert model.metrics.elements == {"files": 3}


def test_the_loop_ends_with_its_model() -> None:
    models = [Model()]
    parallel_map(models[0], None, 1000.0)
    died = weakref.ref(models[0])

    class Forgets(FakeClock):
        def wait(self, token: CancellationToken, seconds: float) -> bool:
            super().wait(token, seconds)
            models.clear()
            gc.collect()
            return False

    clock, token = Forgets(), CancellationToken()
    loop = loop_of(models[0], clock)
    loop.run(token)
    assert len(clock.waits_ms) == 1
    assert not token.cancelled
    assert died() is None
    assert loop.step() is None


class Announces(Clock):
    """Says when the loop has begun to wait, and waits until it is cancelled."""

    def __init__(self) -> None:
        self.waits = threading.Event()

    def wait(self, token: CancellationToken, seconds: float) -> bool:
        self.waits.set()
        return super().wait(token, PATIENCE)


def test_the_thread_ends_when_it_is_stopped() -> None:
    before = set(threading.enumerate())
    model, clock = Model(), Announces()
    parallel_map(model, None, 1000.0)
    loop = loop_of(model, clock)
    loop.stop()  # never started
    for _ in range(2):
        clock.waits.clear()
        loop.start()
        loop.start()
        assert clock.waits.wait(PATIENCE)
        (thread,) = set(threading.enumerate()) - before
        assert thread.daemon
        assert published(model) == [5]
        loop.stop()
        loop.stop()
        assert set(threading.enumerate()) == before


def test_a_clock_wakes_up_when_cancelled() -> None:
    token, clock = CancellationToken(), Clock()
    assert not token.cancelled
    assert not clock.wait(token, 0)
    assert not token.wait(0)
    token.cancel()
    assert token.cancelled
    assert clock.wait(token, PATIENCE)
    assert token.wait(PATIENCE)
    assert clock.now_ns() <= clock.now_ns()
