"""Faults: whatever is raised, wherever, arrives at its batch's position as it is, and nothing before it is lost."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest
import torch

import torchstage
from tests.support import Scale, numbers
from torchstage import StagedDataLoader
from torchstage.errors import DroppedBatchWarning


class TwoArguments(Exception):
    """Cannot be made again from its message, as a wrapper would try to."""

    def __init__(self, code: int, where: str) -> None:
        super().__init__(f"{code} in {where}")
        self.code = code


class Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__("holds what cannot be pickled")
        self.held = lambda: None

    def __reduce__(self) -> NoReturn:
        raise TypeError("not picklable")


class TakesNoNotes(Exception):
    def add_note(self, note: str) -> None:
        raise RuntimeError("no notes")


ERRORS = [
    ValueError("bad row"),
    KeyError("column"),
    KeyboardInterrupt(),
    SystemExit(3),
    MemoryError(),
    GeneratorExit(),
    TwoArguments(7, "shard"),
    Unpicklable(),
    TakesNoNotes("silent"),
]


class Source:
    """Batches 0, 1, 2, ...; raises for those of ``at``, and goes on after each."""

    def __init__(self, error: BaseException, at: set[int], count: int = 8) -> None:
        self.error, self.at, self.count, self.place = error, at, count, -1

    def __iter__(self) -> "Source":
        return self

    def __next__(self) -> torch.Tensor:
        self.place += 1
        if self.place >= self.count:
            raise StopIteration
        if self.place in self.at:
            raise self.error
        return torch.full((3,), float(self.place))


def until_error(loader: Any, model: Any = None) -> tuple[list[int], BaseException]:
    seen = []
    try:
        for x in loader:
            seen.append(int(x[0]))
            if model is not None:
                model(x)
    except BaseException as error:
        return seen, error
    raise AssertionError("nothing was raised")


def names_of(error: BaseException) -> list[str]:
    frames, traceback = [], error.__traceback__
    while traceback is not None:
        frames.append(traceback.tb_frame.f_code.co_name)
        traceback = traceback.tb_next
    return frames


def _named(error: BaseException) -> str:
    return type(error).__name__


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("at", [0, 1, 5])
@pytest.mark.parametrize("error", ERRORS, ids=_named)
def test_an_exception_of_the_loader_arrives_as_it_is(error: BaseException, at: int, num_threads: int) -> None:
    error.__traceback__, error.__notes__ = None, []
    loader = StagedDataLoader(Source(error, {at}), capacity=4, num_threads=num_threads)
    seen, caught = until_error(loader)
    assert seen == list(range(at))
    assert caught is error
    assert "__next__" in names_of(caught)[-1:]
    if at > 0 and not isinstance(error, TakesNoNotes):
        assert f"raised by the loader for batch {at}, on a torchstage thread" in caught.__notes__
    assert [int(x[0]) for x in loader] == list(range(at + 1, 8))  # nothing that was read ahead is lost


@pytest.mark.parametrize("error", ERRORS, ids=_named)
def test_an_exception_of_iter_arrives_as_it_is(error: BaseException) -> None:
    class Broken:
        broken = True

        def __iter__(self) -> Iterator[torch.Tensor]:
            if self.broken:
                raise error
            return iter(numbers(3))

    source = Broken()
    loader = StagedDataLoader(source)
    assert until_error(loader) == ([], error)
    source.broken = False
    assert [int(x[0]) for x in loader] == [0, 1, 2]


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("error", ERRORS, ids=_named)
def test_an_exception_while_binding_arrives_at_its_batch_and_what_was_read_behind_it_is_not_lost(
    error: BaseException, num_threads: int
) -> None:
    error.__traceback__, error.__notes__ = None, []

    def inputs(x: torch.Tensor) -> Any:
        if int(x[0]) == 4:
            raise error
        return (x,), {}

    staged, loader = torchstage.smart_stage(
        Scale(), Source(error, set()), inputs=inputs, capacity=4, num_threads=num_threads
    )
    seen, caught = until_error(loader, staged)
    assert seen == [0, 1, 2, 3]
    assert caught is error
    assert "inputs" in names_of(caught)
    if not isinstance(error, TakesNoNotes):
        assert "raised while staging batch 4, on a torchstage thread" in caught.__notes__
    assert [int(x[0]) for x in loader] == [5, 6, 7]


STAGES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]] = {
    "reshape": (lambda x: x.sin().reshape(3, 1).cos(), torch.zeros(5)),
    "one_hot": (lambda x: torch.nn.functional.one_hot(x.long(), 8).float(), torch.full((3,), 9.0)),
    "index": (lambda x: torch.arange(8.0)[x.long()].exp(), torch.full((3,), 8.0)),
}


@pytest.mark.parametrize("name", list(STAGES))
def test_an_exception_in_the_stage_names_the_node(name: str) -> None:
    stage, bad = STAGES[name]

    class Strict(Scale):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return stage(x) * self.weight

    plain = Strict()
    with pytest.raises((RuntimeError, IndexError)) as expected:
        plain(bad)
    staged, loader = torchstage.smart_stage(plain, [*numbers(3), bad, *numbers(1)], capacity=2)
    seen, caught = until_error(loader, staged)
    assert seen == [0, 1, 2]
    assert (type(caught), str(caught)) == (expected.type, str(expected.value))
    notes = "".join(caught.__notes__)
    assert "staging batch 3" in notes
    assert "in node `" in notes or "node `" in notes
    assert "test_faults.py" in notes


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("at", [set(), {0}, {0, 1}, {2, 3}, {7}, {0, 3, 7}])
@pytest.mark.filterwarnings("ignore::torchstage.errors.DroppedBatchWarning")
def test_ignored_exceptions_skip_their_batches_and_are_counted(at: set[int], num_threads: int) -> None:
    loader = StagedDataLoader(
        Source(ValueError("bad row"), at), ignored_exception_types=(ValueError,), num_threads=num_threads, capacity=3
    )
    assert [int(x[0]) for x in loader] == [i for i in range(8) if i not in at]
    assert sum(loader.stats.drops.values()) == len(at)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize(
    ("at", "most", "seen"), [({1, 4}, 1, [0, 2, 3]), ({0, 1, 2}, 2, []), ({2}, 0, [0, 1]), ({3}, 1, None)]
)
@pytest.mark.filterwarnings("ignore::torchstage.errors.DroppedBatchWarning")
def test_one_more_than_max_ignored_is_raised_at_its_position(
    at: set[int], most: int, seen: list[int] | None, num_threads: int
) -> None:
    error = ValueError("bad row")
    loader = StagedDataLoader(
        Source(error, at), ignored_exception_types=(ValueError,), max_ignored=most, num_threads=num_threads, capacity=4
    )
    if seen is None:
        assert len(list(loader)) == 7
        return
    assert until_error(loader) == (seen, error)
    if at != {0, 1, 2}:
        assert f"{most} batches of this pass were ignored before it: max_ignored is {most}" in error.__notes__
    assert loader.stats.drops.get("ValueError", 0) == most
    assert [int(x[0]) for x in loader] == [i for i in range(8) if i > max(at)]


def test_exceptions_of_the_stage_are_ignored_in_the_order_of_their_batches() -> None:
    """Whichever worker comes first: the third bad batch is the one that is too many."""

    def inputs(x: torch.Tensor) -> Any:
        if int(x[0]) in (2, 3, 6):
            raise ValueError(f"row {int(x[0])}")
        return (x,), {}

    staged, loader = torchstage.smart_stage(
        Scale(),
        numbers(9),
        inputs=inputs,
        ignored_exception_types=(ValueError,),
        max_ignored=2,
        capacity=8,
        num_threads=4,
    )
    with pytest.warns(DroppedBatchWarning, match="staging batch 2 raised ValueError"):
        seen, caught = until_error(loader, staged)
    assert (seen, str(caught)) == ([0, 1, 4, 5], "row 6")


def test_the_bound_is_for_each_pass() -> None:
    class Fresh:
        def __iter__(self) -> Iterator[torch.Tensor]:
            return Source(ValueError("bad row"), {1})

    loader = StagedDataLoader(Fresh(), ignored_exception_types=(ValueError,), max_ignored=1)
    with pytest.warns(DroppedBatchWarning):
        assert [len(list(loader)) for _ in range(3)] == [7, 7, 7]
    assert loader.stats.drops == {"ValueError": 3}


def test_nothing_of_the_batches_is_left_after_an_error() -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    def batches() -> Iterator[torch.Tensor]:
        for x in numbers(6):
            alive.add(x)
            yield x
        raise OSError("broken")

    staged, loader = torchstage.smart_stage(Scale(), batches(), capacity=4, num_threads=2)
    iterator = iter(loader)
    handed = [weakref.ref(next(iterator)) for _ in range(3)]
    with pytest.raises(OSError, match="broken"):
        for x in iterator:
            handed.append(weakref.ref(x))
            staged(x)
    del x
    gc.collect()
    assert len(handed) == 6
    assert not [reference for reference in handed if reference() is not None]
