"""The source: every batch in new objects, and safe from a loader that reuses its memory."""

import gc
import mmap
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from torchstage.errors import BatchOverwrittenError
from torchstage.loaders._source import Batch, Source

BATCHES = 20


def source(loader: Iterable[Any], window: int = 3) -> Source:
    return Source(iter(loader), window, [])


def in_flight(source: Source, window: int) -> Iterator[tuple[int, Batch]]:
    """Read ahead as a pipeline does: each batch is looked at when ``window`` later ones have been read."""
    waiting: list[tuple[int, Batch]] = []
    for index in range(BATCHES):
        waiting.append((index, source.next()))
        if len(waiting) > window:
            yield waiting.pop(0)
    yield from waiting


def first_numbers(leaf: Any) -> list[float]:
    return [float(number) for number in leaf]


# --- reuse of memory ------------------------------------------------------------------------------------------------


def one_tensor() -> Iterator[Any]:
    tensor = torch.zeros(4)
    for index in range(BATCHES):
        tensor.fill_(index)
        yield tensor


def new_views_of_one_tensor() -> Iterator[Any]:
    tensor = torch.zeros(4)
    for index in range(BATCHES):
        tensor.fill_(index)
        yield tensor[:]


def one_array() -> Iterator[Any]:
    array = np.zeros(4)
    for index in range(BATCHES):
        array[:] = index
        yield array


def new_views_of_one_array() -> Iterator[Any]:
    array = np.zeros(4)
    for index in range(BATCHES):
        array[:] = index
        yield array[:]


def one_tensor_over_an_array() -> Iterator[Any]:
    array = np.zeros(4)
    tensor = torch.from_numpy(array)
    for index in range(BATCHES):
        array[:] = index
        yield tensor


def new_tensors_over_one_array() -> Iterator[Any]:
    array = np.zeros(4)
    for index in range(BATCHES):
        array[:] = index
        yield torch.from_numpy(array)


def new_arrays_over_one_tensor() -> Iterator[Any]:
    tensor = torch.zeros(4)
    for index in range(BATCHES):
        tensor.fill_(index)
        yield tensor.numpy()


def new_arrays_over_one_bytearray() -> Iterator[Any]:
    memory = bytearray(32)
    for index in range(BATCHES):
        np.frombuffer(memory)[:] = index
        yield np.frombuffer(memory)


def new_tensors_over_one_bytearray() -> Iterator[Any]:
    memory = bytearray(16)
    for index in range(BATCHES):
        torch.frombuffer(memory, dtype=torch.float32).fill_(index)
        yield torch.frombuffer(memory, dtype=torch.float32)


def new_arrays_over_one_map() -> Iterator[Any]:
    memory = mmap.mmap(-1, 32)
    for index in range(BATCHES):
        np.frombuffer(memory)[:] = index
        yield np.frombuffer(memory)


@pytest.mark.parametrize(
    "loader",
    [
        one_tensor,
        new_views_of_one_tensor,
        one_array,
        new_views_of_one_array,
        one_tensor_over_an_array,
        new_tensors_over_one_array,
        new_arrays_over_one_tensor,
        new_arrays_over_one_bytearray,
        new_tensors_over_one_bytearray,
        new_arrays_over_one_map,
    ],
)
@pytest.mark.parametrize("window", [1, 3])
def test_a_loader_that_writes_each_batch_over_the_last_one_loses_none(
    loader: Callable[[], Iterator[Any]], window: int
) -> None:
    for index, batch in in_flight(source(loader(), window), window):
        batch.check_not_overwritten(index)
        assert first_numbers(batch.value) == [index] * 4


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("buffers", [1, 2, 3, 4, 5])
def test_a_ring_of_buffers_loses_no_batch_whatever_its_size(buffers: int, tensors: bool) -> None:
    """Up to one more than the window is found; a larger ring is never written while its batches are in flight."""
    window = 4
    ring = [np.zeros(4) for _ in range(buffers)]

    def loader() -> Iterator[Any]:
        for index in range(BATCHES):
            array = ring[index % buffers]
            array[:] = index
            yield torch.from_numpy(array) if tensors else array

    for index, batch in in_flight(source(loader(), window), window):
        batch.check_not_overwritten(index)
        assert first_numbers(batch.value) == [index] * 4


def test_one_reused_part_of_a_batch_is_enough() -> None:
    shared = np.zeros(2)

    def loader() -> Iterator[Any]:
        for index in range(BATCHES):
            shared[:] = index
            yield {"new": torch.full((2,), float(index)), "rows": ["t"], "shared": (shared, index)}

    for index, batch in in_flight(source(loader()), 3):
        assert first_numbers(batch.value["shared"][0]) == first_numbers(batch.value["new"]) == [index] * 2


def test_a_list_that_holds_one_batch_many_times_gives_each_its_own_memory() -> None:
    batch = (torch.arange(3.0), np.arange(3))
    read = [source([batch] * BATCHES)] * BATCHES
    handed_out = [s.next().value for s in read]
    handed_out[7][0].fill_(-1)
    handed_out[7][1].fill(-1)
    others = [pair for index, pair in enumerate(handed_out) if index != 7]
    assert all(t.tolist() == [0, 1, 2] and a.tolist() == [0, 1, 2] for t, a in [batch, *others])


def test_slices_of_one_tensor_are_not_copied_once_no_reuse_was_seen() -> None:
    window = 3
    data = torch.arange(8.0 * BATCHES)
    read = source(data.split(8), window)
    pointers = [read.next().value.data_ptr() for _ in range(BATCHES)]
    own = [piece.data_ptr() for piece in data.split(8)]
    assert not set(pointers[: window + 1]) & set(own)
    assert pointers[window + 1 :] == own[window + 1 :]


@pytest.mark.parametrize(
    "make",
    [
        lambda index: torch.full((1000,), float(index)),
        lambda index: torch.from_numpy(np.full(1000, float(index))),
        lambda index: np.full(1000, float(index)),
    ],
)
def test_new_memory_for_each_batch_is_not_copied_although_the_allocator_gives_it_out_again(
    make: Callable[[int], Any],
) -> None:
    """Each batch is dropped before the next one is made, so the addresses do repeat."""
    window = 2
    pointers: list[int] = []

    def loader() -> Iterator[Any]:
        for index in range(BATCHES):
            leaf = make(index)
            pointers.append(leaf.data_ptr() if isinstance(leaf, torch.Tensor) else leaf.ctypes.data)
            yield leaf
            del leaf

    read = source(loader(), window)
    same = []
    for index in range(BATCHES):
        leaf = read.next().value
        assert first_numbers(leaf[:2]) == [index] * 2
        same.append((leaf.data_ptr() if isinstance(leaf, torch.Tensor) else leaf.ctypes.data) == pointers[-1])
        del leaf
    assert same == [False] * (window + 1) + [True] * (BATCHES - window - 1)


def test_a_source_that_has_ended_holds_no_batch() -> None:
    tensors = [torch.zeros(1) for _ in range(2)]
    ends = [weakref.ref(tensor) for tensor in tensors]
    read = source(iter([tensors.pop(), tensors.pop()]))
    for _ in range(2):
        read.next()
    with pytest.raises(StopIteration):
        read.next()
    gc.collect()
    assert [end() for end in ends] == [None, None]


def test_a_late_overwrite_is_an_error_that_names_the_batch_and_the_way_out() -> None:
    data = [torch.full((8,), float(i)) for i in range(BATCHES)]
    read = source(iter(data))
    batches = [read.next() for _ in range(BATCHES)]
    for index, batch in enumerate(batches):
        batch.check_not_overwritten(index)
    data[10][0] = -1.0
    with pytest.raises(BatchOverwrittenError) as caught:
        batches[10].check_not_overwritten(10)
    assert str(caught.value) == (
        "the loader wrote into batch 10 (a tensor of shape [8]) while it was waiting for "
        "its step. Let the loader make new tensors for each batch, or yield copies."
    )


# --- objects --------------------------------------------------------------------------------------------------------


def test_each_batch_is_made_of_objects_of_its_own() -> None:
    batch: dict[str, Any] = {"t": torch.zeros(1), "a": np.zeros(1), "rows": ["x"], "pair": (("y",), [torch.ones(1)])}
    read = source([batch] * BATCHES)
    batches = [read.next() for _ in range(BATCHES)]
    leaves = [leaf for b in batches for leaf in b.leaves] + [batch["t"], batch["a"], batch["rows"], batch["pair"][0]]
    assert len({id(leaf) for leaf in leaves}) == len(leaves) == 5 * BATCHES + 4
    assert all(b.value is not batch and list(b.value) == list(batch) for b in batches)
    assert [leaf for leaf in batches[0].leaves if isinstance(leaf, (list, tuple))] == [["x"], ("y",)]


def test_the_leaves_of_a_batch_are_those_of_its_value() -> None:
    batch = source([{"t": torch.zeros(1), "n": (1, "word")}]).next()
    assert batch.leaves[0] is batch.value["t"]
    assert batch.leaves[1:] == [1, "word"]


def test_inference_tensors_can_be_read_although_they_have_no_version() -> None:
    with torch.inference_mode():
        batch = source([torch.ones(2)]).next()
    batch.check_not_overwritten(0)
    assert batch.value.tolist() == [1, 1]


# --- peek, next, skip, unread ---------------------------------------------------------------------------------------


def test_peeking_reads_ahead_by_one_and_next_returns_what_was_seen() -> None:
    numbers = iter(range(5))
    read = source(numbers)
    seen = read.peek()
    assert isinstance(seen, Batch)
    assert read.peek() is seen
    assert next(numbers) == 1
    assert read.next() is seen
    assert read.next().value == 2


def test_an_error_that_was_peeked_at_is_raised_by_next_and_the_loader_goes_on() -> None:
    class Stumbles:
        def __init__(self) -> None:
            self.reads = 0

        def __iter__(self) -> Iterator[int]:
            return self

        def __next__(self) -> int:
            self.reads += 1
            if self.reads == 1:
                raise ValueError("the first")
            return self.reads

    read = source(Stumbles())
    error = read.peek()
    assert isinstance(error, ValueError)
    with pytest.raises(ValueError, match="the first") as caught:
        read.next()
    assert caught.value is error
    assert read.next().value == 2


def test_peeking_at_the_end_is_a_stop_iteration() -> None:
    read = source([])
    assert isinstance(read.peek(), StopIteration)
    with pytest.raises(StopIteration):
        read.next()


def test_skipping_drops_what_was_peeked_at() -> None:
    read = source([1, 2])
    read.peek()
    read.skip()
    assert read.next().value == 2


def test_what_was_peeked_at_and_not_read_is_handed_back() -> None:
    read = source([1, 2])
    assert read.unread() == []
    seen = read.peek()
    assert read.unread() == [seen]
    read.next()
    assert read.unread() == []


def test_outcomes_that_were_handed_back_come_first_and_as_they_are() -> None:
    first = source([torch.zeros(1)]).next()
    error = KeyError("kept")
    read = Source(iter([2]), 3, [first, error])
    assert read.peek() is first
    assert read.next() is first
    assert read.unread() == [error]
    with pytest.raises(KeyError) as caught:
        read.next()
    assert caught.value is error
    assert read.next().value == 2


def test_an_interrupt_of_a_peek_is_not_kept() -> None:
    """Ctrl-C in the user's loader must reach the user at once."""

    def loader() -> Iterator[int]:
        raise KeyboardInterrupt
        yield 0

    read = source(loader())
    with pytest.raises(KeyboardInterrupt):
        read.peek()
    assert read.unread() == []
