"""Stage thread pools, and the number of intra-op threads of one thread."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch

from torchstage import _threads, add_stage_thread_pool, close_stage_thread_pools
from torchstage._threads import get_stage_thread_pool, set_intra_op_threads
from torchstage.errors import OptionError

T = TypeVar("T")
SOON = 10.0


def in_new_thread(call: Callable[[], T]) -> T:
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


def default_of_new_threads() -> int:
    return in_new_thread(torch.get_num_threads)


# --- the number of intra-op threads ---------------------------------------------------------------------------------


def test_only_the_calling_thread_changes() -> None:
    torch.set_num_threads(2)

    def change() -> tuple[int, int, int]:
        before = torch.get_num_threads()
        set_intra_op_threads(3)
        return before, torch.get_num_threads(), default_of_new_threads()

    assert in_new_thread(change) == (2, 3, 2)
    assert torch.get_num_threads() == 2
    assert default_of_new_threads() == 2


def test_the_main_thread_can_be_the_one_that_changes() -> None:
    torch.set_num_threads(2)
    set_intra_op_threads(3)
    assert torch.get_num_threads() == 3
    assert default_of_new_threads() == 2


def test_a_second_change_of_a_thread_leaves_the_default_alone_too() -> None:
    torch.set_num_threads(2)

    def change_twice() -> tuple[int, int]:
        set_intra_op_threads(1)
        set_intra_op_threads(3)
        return torch.get_num_threads(), default_of_new_threads()

    assert in_new_thread(change_twice) == (3, 2)
    assert default_of_new_threads() == 2


def test_setting_what_is_set_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "Thread", None)
    set_intra_op_threads(torch.get_num_threads())


def test_threads_that_change_at_the_same_time_leave_the_default_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that reads the default while another one has it changed must not take it for the real one."""
    torch.set_num_threads(4)
    changed, looked = threading.Event(), threading.Event()
    real = torch.set_num_threads

    def slow(count: int) -> None:
        real(count)
        if threading.current_thread() is first:
            changed.set()
            looked.wait(0.2)  # the second thread comes now; not for ever, since a lock may keep it out

    monkeypatch.setattr(torch, "set_num_threads", slow)
    first = threading.Thread(target=set_intra_op_threads, args=(1,))

    def come_second() -> None:
        assert changed.wait(SOON)
        torch.get_num_threads()
        looked.set()
        set_intra_op_threads(2)
        found.append(torch.get_num_threads())

    found: list[int] = []
    second = threading.Thread(target=come_second)
    first.start()
    second.start()
    first.join()
    second.join()
    assert found == [2]
    assert torch.get_num_threads() == 4
    assert default_of_new_threads() == 4


# --- pools ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, 1.0, "2", None, True])
@pytest.mark.parametrize("name", ["inter_op_threads_num", "intra_op_threads_num"])
def test_a_bad_size_is_refused(name: str, value: Any) -> None:
    sizes: dict[str, Any] = {"inter_op_threads_num": 1, "intra_op_threads_num": 1, name: value}
    with pytest.raises(OptionError) as caught:
        add_stage_thread_pool(**sizes)
    assert str(caught.value) == f"{name} must be a whole number >= 1. Found: {value!r}."


def test_each_pool_has_a_number_of_its_own() -> None:
    first, second = add_stage_thread_pool(1, 1), add_stage_thread_pool(2, 3)
    assert second == first + 1
    pool = get_stage_thread_pool(second)
    assert (pool.inter_op, pool.intra_op, pool.name) == (2, 3, "")
    assert get_stage_thread_pool(first) is not pool


def test_pools_of_the_same_name_are_one() -> None:
    number = add_stage_thread_pool(2, 1, "shared")
    add_stage_thread_pool(2, 1)
    assert add_stage_thread_pool(2, 1, "shared") == number
    assert add_stage_thread_pool(2, 1, global_name="other") != number


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2)])
def test_a_pool_of_the_same_name_and_other_sizes_is_refused(sizes: tuple[int, int]) -> None:
    add_stage_thread_pool(2, 1, "shared")
    with pytest.raises(OptionError) as caught:
        add_stage_thread_pool(*sizes, "shared")
    assert str(caught.value) == (
        f"the pool 'shared' has 2 inter-op and 1 intra-op threads. Found: {sizes[0]} and {sizes[1]}. "
        "Use the same sizes or another name."
    )


def test_an_unknown_number_is_refused_and_the_known_ones_are_listed() -> None:
    first, second = add_stage_thread_pool(1, 1), add_stage_thread_pool(1, 1)
    for unknown in (-1, second + 1):
        with pytest.raises(OptionError) as caught:
            get_stage_thread_pool(unknown)
        assert str(caught.value) == (
            "stage_subgraph_thread_pool_id must be a number that add_stage_thread_pool() returned: "
            f"{first}, {second}. Found: {unknown}."
        )


def test_without_any_pool_the_message_says_so() -> None:
    with pytest.raises(OptionError, match=r"returned: there is no pool yet\. Found: 0\.$"):
        get_stage_thread_pool(0)


def test_the_threads_of_a_pool_use_its_intra_op_threads_and_nobody_else_does() -> None:
    torch.set_num_threads(2)
    executor = get_stage_thread_pool(add_stage_thread_pool(2, 3, "hashes")).executor
    both_run = threading.Barrier(2)

    def look() -> tuple[int, str]:
        both_run.wait(SOON)
        return torch.get_num_threads(), threading.current_thread().name

    found = [future.result(SOON) for future in [executor.submit(look) for _ in range(2)]]
    assert [count for count, _ in found] == [3, 3]
    assert {name.rpartition("_")[0] for _, name in found} == {"torchstage-pool-hashes"}
    assert torch.get_num_threads() == 2
    assert default_of_new_threads() == 2


def test_closing_ends_the_threads_and_the_numbers_stay_taken() -> None:
    number = add_stage_thread_pool(2, 1, "closed")
    executor = get_stage_thread_pool(number).executor
    thread = executor.submit(threading.current_thread).result(SOON)
    assert thread.is_alive()
    close_stage_thread_pools()
    assert not thread.is_alive()
    with pytest.raises(OptionError, match=f"Found: {number}"):
        get_stage_thread_pool(number)
    with pytest.raises(RuntimeError, match="shutdown"):
        executor.submit(int)
    close_stage_thread_pools()
    assert add_stage_thread_pool(3, 1, "closed") == number + 1


def test_closing_waits_for_work_that_runs() -> None:
    executor = get_stage_thread_pool(add_stage_thread_pool(1, 1)).executor
    running, go_on = threading.Event(), threading.Event()

    def work() -> str:
        running.set()
        assert go_on.wait(SOON)
        return "done"

    future = executor.submit(work)
    assert running.wait(SOON)
    closer = threading.Thread(target=close_stage_thread_pools)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive()
    go_on.set()
    closer.join()
    assert future.result(SOON) == "done"


def test_a_pool_that_is_added_starts_no_thread_yet() -> None:
    before = set(threading.enumerate())
    add_stage_thread_pool(4, 1)
    assert set(threading.enumerate()) == before
    assert _threads._pools[-1] is not None
