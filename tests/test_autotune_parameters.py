"""Shared states and parameters (section 2), and what is refused."""

import threading
from collections.abc import Callable
from functools import partial

import pytest

from tests.autotune_models import ARGS, SOON, fixed, free
from torchstage.autotune import (
    AUTOTUNE,
    BUFFER_SIZE,
    CYCLE_LENGTH,
    DETERMINISTIC,
    MAX_BUFFERED_ELEMENTS,
    PARALLELISM,
    SharedState,
    make_async_known_ratio_node,
    make_async_unknown_ratio_node,
    make_interleave_many_node,
    make_known_ratio_node,
    make_non_tunable_parameter,
    make_parameter,
    publish,
)

# Section 2: shared states and parameters.


@pytest.mark.parametrize(("initial", "tunable"), [(AUTOTUNE, True), (-1.0, True), (0, False), (1, False), (8, False)])
def test_only_a_state_that_began_at_autotune_is_tunable(initial: float, tunable: bool) -> None:
    state = SharedState(initial)
    assert state.value == initial
    assert state.tunable is tunable
    state.value = 3
    assert state.value == 3
    assert state.tunable is tunable
    state.value = AUTOTUNE  # what it began at counts, not what it holds
    assert state.tunable is tunable


def test_a_state_is_tunable_by_default() -> None:
    assert SharedState().value == AUTOTUNE
    assert SharedState().tunable


@pytest.mark.parametrize(
    ("state", "value", "expected", "tunable"),
    [
        (None, None, 2, False),
        (SharedState(), None, 2, True),
        (SharedState(5), None, 5, False),
        (SharedState(), 7, 7, True),
        (SharedState(5), 7, 7, False),
        (None, 7, 7, False),
    ],
)
def test_what_the_model_value_of_a_parameter_begins_at(
    state: SharedState | None, value: float | None, expected: float, tunable: bool
) -> None:
    parameter = make_parameter(PARALLELISM, state, 2, 16, value)
    assert (parameter.name, parameter.value, parameter.min, parameter.max) == (PARALLELISM, expected, 2, 16)
    assert parameter.state is state
    assert parameter.tunable is tunable


def test_a_parameter_of_a_set_tunable_state_begins_at_what_was_set() -> None:
    state = SharedState()
    state.value = 6
    parameter = make_parameter(BUFFER_SIZE, state, 2, 16)
    assert parameter.value == 6
    assert parameter.tunable


def test_a_plain_number_is_its_own_min_and_max() -> None:
    parameter = fixed(CYCLE_LENGTH, 3)
    assert (parameter.value, parameter.min, parameter.max, parameter.state) == (3, 3, 3, None)
    assert not parameter.tunable


def test_nothing_is_published_until_it_is() -> None:
    one, other = free(PARALLELISM), free(BUFFER_SIZE)
    assert one.state is not None
    assert other.state is not None
    one.value, other.value = 4, 9
    assert (one.state.value, other.state.value) == (AUTOTUNE, AUTOTUNE)
    publish([one])
    assert (one.state.value, other.state.value) == (4, AUTOTUNE)
    publish([one, other, fixed(CYCLE_LENGTH, 2)])  # a plain number has nowhere to be published
    assert (one.state.value, other.state.value) == (4, 9)
    one.state.value = 5  # the pipeline's own doing does not move the model's number
    assert one.value == 4


@pytest.mark.parametrize("by", ["publishing", "assignment"])
def test_all_who_wait_for_a_value_are_woken(by: str) -> None:
    parameter = free(PARALLELISM)
    state = parameter.state
    assert state is not None
    inside = threading.Semaphore(0)
    seen: list[float] = []

    def wait() -> None:
        with state.condition:
            inside.release()
            # The value can only change while this waits, and not before all three do: see below.
            if state.condition.wait(SOON):
                seen.append(state.value)

    threads = [threading.Thread(target=wait, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert inside.acquire(timeout=SOON)
    # Each held the lock when it let us go on and gives it back only by waiting, so whoever gets it now finds all waiting.
    if by == "publishing":
        parameter.value = 4
        publish([parameter])
    else:
        state.value = 4
    for thread in threads:
        thread.join(SOON)
    assert seen == [4, 4, 4]


@pytest.mark.parametrize("by", ["publishing", "assignment"])
def test_a_value_is_set_under_the_lock(by: str) -> None:
    parameter = free(PARALLELISM, 4)
    state = parameter.state
    assert state is not None
    done = threading.Event()

    def change() -> None:
        if by == "publishing":
            publish([parameter])
        else:
            state.value = 4
        done.set()

    thread = threading.Thread(target=change, daemon=True)
    asked = threading.Event()

    class Announced(threading.Condition):
        """Tells when another thread asks for the lock."""

        def __enter__(self) -> bool:
            if threading.current_thread() is thread:
                asked.set()
            return super().__enter__()

    state.condition = Announced()
    with state.condition:
        thread.start()
        assert asked.wait(SOON)
        assert state.value == AUTOTUNE
        assert not done.is_set()
    assert done.wait(SOON)
    thread.join(SOON)
    assert state.value == 4


# What is refused.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(make_known_ratio_node, ARGS, -0.5), "ratio.*>= 0.*-0.5"),
        (partial(make_known_ratio_node, ARGS, float("nan")), "ratio.*nan"),
        (partial(make_async_known_ratio_node, ARGS, -1, [fixed(PARALLELISM, 1)]), "ratio.*>= 0.*-1"),
        (partial(make_async_known_ratio_node, ARGS, 1, [fixed(PARALLELISM, 1)], -2), "memory.ratio.*>= 0.*-2"),
        (partial(make_parameter, PARALLELISM, SharedState(), 9, 8), "min.*'parallelism'.*max.*9.*8"),
        (partial(make_parameter, BUFFER_SIZE, None, float("nan"), 8), "min.*'buffer_size'.*nan"),
        (partial(make_parameter, "threads", SharedState(), 1, 8), "name.*buffer_size.*'threads'"),
        (partial(make_non_tunable_parameter, "", 1), "name.*parallelism.*''"),
        (partial(make_async_known_ratio_node, ARGS, 1, []), r"'parallelism' or 'buffer_size'.*op\(id:7\).*none"),
        (
            partial(make_async_unknown_ratio_node, ARGS, [fixed(CYCLE_LENGTH, 2)]),
            r"'parallelism' or 'buffer_size'.*op\(id:7\).*'cycle_length'",
        ),
        (
            partial(make_async_unknown_ratio_node, ARGS, [fixed(BUFFER_SIZE, 2), fixed(BUFFER_SIZE, 3)]),
            "differ in name.*'buffer_size'",
        ),
        (
            partial(make_interleave_many_node, ARGS, [fixed(CYCLE_LENGTH, 2), fixed(CYCLE_LENGTH, 2)]),
            "differ in name.*'cycle_length'",
        ),
        (partial(make_non_tunable_parameter, CYCLE_LENGTH, 0), "'cycle_length'.*> 0.*0"),
        (partial(make_parameter, PARALLELISM, SharedState(), 0, 8), "'parallelism'.*> 0.*0"),
    ],
)
def test_what_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("name", [BUFFER_SIZE, CYCLE_LENGTH, DETERMINISTIC, MAX_BUFFERED_ELEMENTS, "threads"])
def test_a_parameter_that_is_not_there(name: str) -> None:
    made = make_async_known_ratio_node(ARGS, 1, [fixed(PARALLELISM, 1)])
    with pytest.raises(KeyError, match=rf"op\(id:7\).*'{name}'.*parallelism"):
        made.parameter_value(name)


@pytest.mark.parametrize("name", [BUFFER_SIZE, DETERMINISTIC, MAX_BUFFERED_ELEMENTS])
def test_these_may_be_zero(name: str) -> None:
    assert fixed(name, 0).value == 0
