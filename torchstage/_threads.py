"""Thread pools of the stage, and the number of intra-op threads of a single thread."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from torchstage.errors import OptionError

T = TypeVar("T")
_lock = threading.Lock()


def set_intra_op_threads(count: int) -> None:
    """Set the calling thread's intra-op threads, and no other's.

    `torch.set_num_threads` also becomes the default of threads created later in the process. A new thread has that default
    and can put it back.
    """
    if torch.get_num_threads() == count:
        return
    with _lock:
        default = _in_new_thread(torch.get_num_threads)
        torch.set_num_threads(count)
        _in_new_thread(lambda: torch.set_num_threads(default))


def _in_new_thread(function: Callable[[], T]) -> T:
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(function()), name="torchstage-intra-op")
    thread.start()
    thread.join()
    return results[0]


class StageThreadPool:
    """Threads that run independent branches of a stage graph side by side.

    Attributes:
        inter_op: how many branches run at once.
        intra_op: how many threads each operation may use.
        name: the pool's global name; empty if it has none.
    """

    def __init__(self, inter_op: int, intra_op: int, name: str) -> None:
        self.inter_op = inter_op
        self.intra_op = intra_op
        self.name = name
        self.executor = ThreadPoolExecutor(
            max_workers=inter_op,
            thread_name_prefix=f"torchstage-pool-{name or 'unnamed'}",
            initializer=set_intra_op_threads,
            initargs=(intra_op,),
        )


_pools: list[StageThreadPool | None] = []


def add_stage_thread_pool(inter_op_threads_num: int, intra_op_threads_num: int, global_name: str = "") -> int:
    """Make a thread pool for stages and return its number, for ``stage_subgraph_thread_pool_id``.

    Args:
        inter_op_threads_num: how many independent branches of a stage graph run at once, at least 1.
        intra_op_threads_num: how many threads each operation may use, at least 1. If it differs from the training
            thread's, operations whose floating-point result may depend on it stay in the step.
        global_name: pools of the same name are one pool; empty for a pool of its own.

    Raises:
        OptionError: a count is no whole number of at least 1, or a pool of that name has other sizes.
    """
    for what, count in (("inter_op_threads_num", inter_op_threads_num), ("intra_op_threads_num", intra_op_threads_num)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise OptionError(f"{what} must be a whole number >= 1. Found: {count!r}.")
    with _lock:
        for number, pool in enumerate(_pools):
            if pool is not None and global_name and pool.name == global_name:
                if (pool.inter_op, pool.intra_op) != (inter_op_threads_num, intra_op_threads_num):
                    raise OptionError(
                        f"the pool {global_name!r} has {pool.inter_op} inter-op and {pool.intra_op} intra-op threads. "
                        f"Found: {inter_op_threads_num} and {intra_op_threads_num}. Use the same sizes or another name."
                    )
                return number
        _pools.append(StageThreadPool(inter_op_threads_num, intra_op_threads_num, global_name))
        return len(_pools) - 1


def get_stage_thread_pool(number: int) -> StageThreadPool:
    """Return the pool with that number.

    Raises:
        OptionError: there is none.
    """
    with _lock:
        pool = _pools[number] if 0 <= number < len(_pools) else None
        if pool is None:
            there = [str(n) for n, p in enumerate(_pools) if p is not None]
            raise OptionError(
                f"stage_subgraph_thread_pool_id must be a number that add_stage_thread_pool() returned: "
                f"{', '.join(there) or 'there is no pool yet'}. Found: {number}."
            )
        return pool


def close_stage_thread_pools() -> None:
    """End the threads of all stage pools. Their numbers stay taken; loaders that still use one get an error."""
    with _lock:
        pools = [pool for pool in _pools if pool is not None]
        _pools[:] = [None] * len(_pools)
    for pool in pools:
        pool.executor.shutdown(wait=True)
