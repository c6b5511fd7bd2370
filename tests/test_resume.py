"""Resume: a run that is stopped anywhere and resumed hands out what the run that was not stopped does."""

import copy
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import torchstage
from tests.support import Clicks, assert_same, click_data, click_loader, numbers
from torchstage import StagedDataLoader
from torchstage.errors import ResumeWarning, StateError, TorchstageError
from torchstage.loaders._resume import Keeper

EPOCHS, ROWS, BATCH = 3, 22, 4
BATCHES = 6  # of a pass
SIZES = [{"num_threads": 1, "capacity": 1}, {"num_threads": 3, "capacity": 4}]

pytestmark = [
    pytest.mark.filterwarnings("ignore::torchstage.errors.ResumeWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # by torch, called by torchdata
]


class Numbers(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(float(index))


class Stateful:
    """A loader with a state of its own: another order in each pass."""

    def __init__(self) -> None:
        self.passes = self.place = 0
        self.resumed = False
        self.over = True

    def __iter__(self) -> Iterator[torch.Tensor]:
        if not self.resumed:
            self.passes, self.place = self.passes + 1, 0
        self.resumed = self.over = False
        while self.place < BATCHES:
            self.place += 1
            yield torch.full((2,), 100.0 * self.passes + self.place)
        self.over = True

    def state_dict(self) -> dict[str, int]:
        return {"passes": self.passes, "place": self.place, "over": self.over}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.__dict__.update(state)
        self.resumed = not state["over"]


def stateful_data_loader(num_workers: int = 0) -> Any:
    module = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")
    return module.StatefulDataLoader(Numbers(), batch_size=BATCH, shuffle=True, num_workers=num_workers)


LOADERS: dict[str, Callable[[], Any]] = {
    "a list": lambda: numbers(BATCHES),
    "DataLoader": lambda: DataLoader(Numbers(), batch_size=BATCH),
    "shuffled": lambda: DataLoader(Numbers(), batch_size=BATCH, shuffle=True),
    "shuffled by a generator": lambda: DataLoader(
        Numbers(), batch_size=BATCH, shuffle=True, generator=torch.Generator().manual_seed(5)
    ),
    "shuffled, with worker processes": lambda: DataLoader(Numbers(), batch_size=BATCH, shuffle=True, num_workers=2),
    "an object with a state": Stateful,
    "StatefulDataLoader": stateful_data_loader,
    "StatefulDataLoader with worker processes": lambda: stateful_data_loader(2),
}


def go_on(loader: Any, taken: list[torch.Tensor], stop_at: int = -1, epochs: int = EPOCHS) -> bool:
    """Take batches, drawing after each as a step would; return whether it was stopped at ``stop_at`` batches."""
    for _ in range(epochs):
        for x in loader:
            taken.append(x + torch.rand(()))
            if len(taken) == stop_at:
                return True
    return False


def plain_run(make: Callable[[], Any]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    taken: list[torch.Tensor] = []
    go_on(make(), taken)
    return taken


def resumed_run(make: Callable[[], Any], stop_at: int, tmp_path: Any, **sizes: Any) -> list[torch.Tensor]:
    """Stop after so many batches, write a checkpoint as a user would, and go on in new objects."""
    torch.manual_seed(0)
    taken: list[torch.Tensor] = []
    with StagedDataLoader(make(), **sizes) as loader:
        assert go_on(loader, taken, stop_at) or stop_at > len(taken)
        torch.save({"loader": loader.state_dict(), "random": torch.get_rng_state()}, tmp_path / "checkpoint.pt")
    torch.manual_seed(12345)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=not _has_other_state(loader))
    with StagedDataLoader(make(), **sizes) as loader:
        loader.load_state_dict(checkpoint["loader"])
        torch.set_rng_state(checkpoint["random"])
        done = (len(taken) - 1) // BATCHES if not checkpoint["loader"]["ended"] else len(taken) // BATCHES
        go_on(loader, taken, epochs=EPOCHS - done)
    return taken


def _has_other_state(loader: StagedDataLoader) -> bool:
    return "Stateful" in type(loader._shared.loader).__name__


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", list(LOADERS))
def test_a_resumed_run_hands_out_what_the_plain_run_does(name: str, sizes: dict[str, int], tmp_path: Any) -> None:
    make = LOADERS[name]
    plain = plain_run(make)
    assert len(plain) == EPOCHS * BATCHES
    stops = [2, 6, 13] if "processes" in name else [1, 2, 5, 6, 7, 12, 16, 18]
    for stop_at in stops:
        assert_same(plain, resumed_run(make, stop_at, tmp_path, **sizes))


@pytest.mark.parametrize("name", ["shuffled", "an object with a state"])
def test_a_run_that_is_resumed_twice_in_one_pass_is_the_plain_run(name: str) -> None:
    make = LOADERS[name]
    plain = plain_run(make)
    torch.manual_seed(0)
    taken: list[torch.Tensor] = []
    state, stream = None, torch.get_rng_state()
    for stop_at in (8, 10, 15):
        with StagedDataLoader(make(), capacity=4, num_threads=2) as loader:
            if state is not None:
                loader.load_state_dict(state)
            torch.set_rng_state(stream)
            assert go_on(loader, taken, stop_at)
            state, stream = loader.state_dict(), torch.get_rng_state()
    assert_same(plain[:15], taken)


def test_a_state_that_is_loaded_and_not_used_yet_is_the_state() -> None:
    loader = StagedDataLoader(numbers(6), capacity=3)
    iterator = iter(loader)
    next(iterator), next(iterator)
    state = loader.state_dict()
    iterator.close()
    other = StagedDataLoader(numbers(6))
    other.load_state_dict(state)
    again = other.state_dict()
    assert {key: again[key] for key in ("epoch", "consumed", "position")} == {"epoch": 1, "consumed": 2, "position": 2}
    with other:
        assert [int(x[0]) for x in other] == [2, 3, 4, 5]
    assert other.state_dict()["ended"]
    assert [int(x[0]) for x in other] == [0, 1, 2, 3, 4, 5]
    assert other.state_dict()["epoch"] == 2


def test_the_state_counts_what_was_handed_out_whatever_was_read_ahead() -> None:
    read = threading.Event()

    def batches() -> Iterator[torch.Tensor]:
        for x in numbers(9):
            if int(x[0]) == 5:
                read.set()
            yield x

    with StagedDataLoader(batches(), capacity=8) as loader:
        iterator = iter(loader)
        next(iterator), next(iterator)
        assert read.wait(10)
        state = loader.state_dict()
    assert (state["consumed"], state["position"], state["ended"]) == (2, 2, False)


def test_a_generator_goes_on_where_it_stood_over_breaks_and_passes() -> None:
    def batches() -> Iterator[torch.Tensor]:
        yield from numbers(10)

    loader = StagedDataLoader(batches(), capacity=4)
    taken = []
    for count in (3, 2):
        for x in loader:
            taken.append(int(x[0]))
            count -= 1
            if not count:
                break
    state = loader.state_dict()
    loader.close()
    resumed = StagedDataLoader(batches(), capacity=2)
    resumed.load_state_dict(state)
    assert taken + [int(x[0]) for x in resumed] == list(range(10))
    assert list(resumed) == []
    ended = StagedDataLoader(batches())
    ended.load_state_dict(resumed.state_dict())
    assert list(ended) == []


class Flawed:
    """Raises for some of its batches and goes on."""

    def __init__(self, bad: set[int], count: int = 10) -> None:
        self.bad, self.count = bad, count

    def __iter__(self) -> Iterator[torch.Tensor]:
        return _Flaws(self.bad, self.count)


class _Flaws:
    def __init__(self, bad: set[int], count: int) -> None:
        self.bad, self.count, self.place = bad, count, -1

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        self.place += 1
        if self.place >= self.count:
            raise StopIteration
        if self.place in self.bad:
            raise ValueError(f"row {self.place}")
        return torch.full((2,), float(self.place))


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5])
@pytest.mark.filterwarnings("ignore::torchstage.errors.DroppedBatchWarning")
def test_batches_that_were_ignored_are_passed_over_again(stop_at: int) -> None:
    options: dict[str, Any] = {
        "ignored_exception_types": (ValueError,),
        "max_ignored": 3,
        "capacity": 4,
        "num_threads": 2,
    }
    loader = StagedDataLoader(Flawed({0, 3, 4}), **options)
    taken = []
    for x in loader:
        taken.append(int(x[0]))
        if len(taken) == stop_at:
            break
    state = loader.state_dict()
    loader.close()
    resumed = StagedDataLoader(Flawed({0, 3, 4}), **options)
    resumed.load_state_dict(state)
    assert taken + [int(x[0]) for x in resumed] == [1, 2, 5, 6, 7, 8, 9]
    more = StagedDataLoader(Flawed({0, 3, 4, 9}), **options)
    more.load_state_dict(state)
    with pytest.raises(ValueError, match="row 9"):  # the fourth of the pass
        list(more)


@pytest.mark.parametrize("stop_at", [1, 4])
def test_two_passes_side_by_side_are_resumed_in_their_orders(stop_at: int) -> None:
    """`zip` asks for both iterators before it reads, and each iterator draws: so does a sampler at its first read."""

    def pairs(loaders: list[Any]) -> Iterator[list[torch.Tensor]]:
        return (list(pair) for pair in zip(*loaders, strict=True))

    def make() -> list[Any]:
        return [LOADERS["shuffled"](), LOADERS["shuffled by a generator"](), LOADERS["shuffled"]()]

    torch.manual_seed(0)
    plain = list(pairs(make()))
    torch.manual_seed(0)
    loaders = [StagedDataLoader(loader, capacity=2) for loader in make()]
    taken = [pair for _, pair in zip(range(stop_at), pairs(loaders), strict=False)]
    states, random = [loader.state_dict() for loader in loaders], torch.get_rng_state()
    torch.manual_seed(12345)
    loaders = [StagedDataLoader(loader, capacity=2) for loader in make()]
    for loader, state in zip(loaders, states, strict=True):
        loader.load_state_dict(state)
    torch.set_rng_state(random)
    for expected, found in zip(plain, [*taken, *pairs(loaders)], strict=True):
        assert_same(expected, found)


def test_a_generator_that_shuffles_is_resumed_from_its_beginning() -> None:
    """Its second pass draws nothing: the state of that one must hold what the first began with."""

    def shuffled() -> Iterator[torch.Tensor]:
        yield from numbers(12)[:1]
        yield from [numbers(12)[i] for i in torch.randperm(12)]

    def take(loader: StagedDataLoader, count: int) -> list[torch.Tensor]:
        return [x for _, x in zip(range(count), loader, strict=False)]

    torch.manual_seed(0)
    with StagedDataLoader(shuffled()) as loader:
        take(loader, 3)
        torch.rand(5)
        take(loader, 2)
        state = loader.state_dict()
        rest = list(loader)
    torch.manual_seed(12345)
    with StagedDataLoader(shuffled()) as loader:
        loader.load_state_dict(state)
        assert_same(rest, list(loader))


@pytest.mark.parametrize("num_clients", [2, 3])
def test_several_clients_share_a_state(num_clients: int) -> None:
    loader = StagedDataLoader(numbers(40), num_clients=num_clients, capacity=3, num_threads=2)
    taken: list[int] = []
    barrier = threading.Barrier(num_clients)

    def client() -> None:
        iterator = iter(loader)
        barrier.wait(10)
        for _ in range(5):
            taken.append(int(next(iterator)[0]))
        barrier.wait(10)

    run_all([client] * num_clients)
    state = loader.state_dict()
    loader.close()
    assert state["consumed"] == state["position"] == len(taken) == 5 * num_clients
    assert sorted(taken) == list(range(5 * num_clients))
    resumed = StagedDataLoader(numbers(40), num_clients=num_clients, capacity=3)
    resumed.load_state_dict(state)
    run_all([lambda: taken.extend(int(x[0]) for x in resumed)] * num_clients)
    assert sorted(taken) == list(range(40))


def run_all(functions: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)


def test_training_that_is_stopped_and_resumed_ends_with_the_same_parameters() -> None:
    def train(model: Any, loader: Any, optimizer: Any, steps: int, epochs: int) -> None:
        for _ in range(epochs):
            for x, ids, y in loader:
                loss = (model(x, ids) - y).square().mean() + torch.rand(())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                steps -= 1
                if not steps:
                    return

    def fresh() -> tuple[Any, Any]:
        torch.manual_seed(1)
        model = Clicks()
        return model, torch.optim.Adagrad(model.parameters(), lr=0.1)

    model, optimizer = fresh()
    torch.manual_seed(0)
    train(model, click_loader(), optimizer, -1, 2)

    first, first_optimizer = fresh()
    staged, loader = torchstage.smart_stage(first, click_loader(), capacity=3, num_threads=2, lookups="exact")
    torch.manual_seed(0)
    train(staged, loader, first_optimizer, len(click_loader()) + 3, 2)
    saved = copy.deepcopy(
        (staged.state_dict(), first_optimizer.state_dict(), loader.state_dict(), torch.get_rng_state())
    )
    loader.close()

    second, second_optimizer = fresh()
    staged, loader = torchstage.smart_stage(second, click_loader(), capacity=1, lookups="exact")
    staged.load_state_dict(saved[0])
    second_optimizer.load_state_dict(saved[1])
    loader.load_state_dict(saved[2])
    torch.set_rng_state(saved[3])
    train(staged, loader, second_optimizer, -1, 1)
    assert_same([p.detach() for p in model.parameters()], [p.detach() for p in second.parameters()])


def test_resuming_leaves_the_random_streams_as_they_are() -> None:
    loader = StagedDataLoader(LOADERS["shuffled"]())
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    iterator.close()
    loader.load_state_dict(state)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    iterator = iter(loader)
    next(iterator)
    assert torch.equal(torch.rand(2), expected)
    iterator.close()


def test_loading_closes_the_iterations_that_are_under_way() -> None:
    loader = StagedDataLoader(numbers(6))
    iterator = iter(loader)
    next(iterator)
    loader.load_state_dict(loader.state_dict())
    with pytest.raises(TorchstageError, match="this iteration was closed"):
        next(iterator)
    assert [int(x[0]) for x in loader] == [1, 2, 3, 4, 5]


@pytest.mark.filterwarnings("default::torchstage.errors.ResumeWarning")
def test_reading_again_is_warned_about_and_a_state_of_the_loaders_own_is_not() -> None:
    for make, match in (
        (LOADERS["DataLoader"], "resuming reads 2 batches again and drops them, since DataLoader"),
        (Stateful, ""),
    ):
        loader = StagedDataLoader(make())
        iterator = iter(loader)
        next(iterator), next(iterator)
        state = loader.state_dict()
        iterator.close()
        loader = StagedDataLoader(make())
        loader.load_state_dict(state)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            list(loader)
        found = [str(warning.message) for warning in caught if warning.category is ResumeWarning]
        assert len(found) == bool(match)
        assert not match or match in found[0]


@pytest.mark.parametrize("one_shot", [False, True])
def test_an_error_on_the_way_to_the_place_does_not_lose_the_place(one_shot: bool) -> None:
    loader = StagedDataLoader(Flawed(set()) if not one_shot else _Flaws(set(), 10))
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
    state = loader.state_dict()
    iterator.close()
    flawed = _Flaws({1, 3}, 10) if one_shot else Flawed({3})
    other = StagedDataLoader(flawed)
    state["loader"]["type"] = type(flawed).__name__
    other.load_state_dict(state)
    if one_shot:
        with pytest.raises(ValueError, match="row 1"):
            next(iter(other))
    with pytest.raises(ValueError, match="row 3"):
        next(iter(other))
    if isinstance(flawed, Flawed):
        flawed.bad = set()
    assert [int(x[0]) for x in other] == [5, 6, 7, 8, 9]


# ---------------------------------------------------------------- what is no state


def a_state(**changes: Any) -> dict[str, Any]:
    loader = StagedDataLoader(numbers(6))
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    iterator.close()
    return {key: value for key, value in {**state, **changes}.items() if value is not ...}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([], r"state must be what StagedDataLoader.state_dict\(\) returned. Found: list."),
        ({"a": 1}, "this one has no version. Found the keys: a."),
        ({"version": 2}, "the state has version 2, this torchstage reads 1 to 1. Use the one that wrote it."),
        ({"version": "1"}, "the state has version '1'"),
        (
            {"version": 1},
            "the state lacks loader, epoch, consumed, position, ignored, ended, start, snapshot: it is damaged.",
        ),
        ({"position": ...}, "the state lacks position: it is damaged. Take it from another checkpoint."),
        ({"consumed": -1}, "the state's consumed must be a whole number >= 0. Found: -1."),
        ({"epoch": True}, "the state's epoch must be a whole number >= 0. Found: True."),
        ({"consumed": 4}, "the state's position must not be below what is consumed. Found: 1 and 4."),
        (
            {"loader": {"type": "DataLoader", "length": 6}},
            "of a loader of type 'DataLoader', this loader has type 'list'",
        ),
        ({"loader": {"type": "list", "length": 9}}, "of a loader of length 9, this loader has length 6"),
        ({"snapshot": {"position": 1, "state": {}}}, "a state of the list itself, and this one has no load_state_dict"),
    ],
)
def test_what_is_no_state_of_this_loader_is_refused_and_nothing_changes(state: Any, message: str) -> None:
    given = a_state(**state) if isinstance(state, dict) and not {"a", "version"} & set(state) else state
    loader = StagedDataLoader(numbers(6))
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(StateError, match=message):
        loader.load_state_dict(given)
    assert [int(x[0]) for x in iterator] == [1, 2, 3, 4, 5]


def test_data_that_ends_before_the_place_is_an_error_at_the_first_batch() -> None:
    def batches(count: int) -> Iterator[torch.Tensor]:
        yield from numbers(count)

    loader = StagedDataLoader(batches(9))
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
    state = loader.state_dict()
    iterator.close()
    other = StagedDataLoader(batches(3))
    other.load_state_dict(state)
    with pytest.raises(
        StateError, match="the loader ended after 3 batches, and the state has 5 behind it: it is of other data"
    ):
        list(other)


# ---------------------------------------------------------------- the parts


def test_states_are_taken_as_often_as_their_cost_allows_and_always_at_the_end() -> None:
    now = [0.0]

    class Slow(Stateful):
        def state_dict(self) -> dict[str, int]:
            now[0] += 1.0
            return super().state_dict()

    keeper = Keeper(Slow(), share=0.1, clock=lambda: now[0])
    positions = []
    for position in range(1, 31):
        now[0] += 1.0
        snapshot = keeper.after(position)
        assert snapshot is not None
        positions.append(snapshot.position)
    assert sorted(set(positions)) == [1, 11, 21]
    assert positions == [1] * 10 + [11] * 10 + [21] * 10
    last = keeper.after(30, must=True)
    assert last is not None
    assert last.position == 30


def test_a_kept_state_does_not_change_with_the_loader() -> None:
    class Live(Stateful):
        def state_dict(self) -> dict[str, int]:
            return self.__dict__

    loader = Live()
    loader.place = 1
    snapshot = Keeper(loader).after(1)
    loader.place = 2
    assert snapshot is not None
    assert snapshot.state["place"] == 1


def test_a_state_some_batches_old_and_the_reads_since_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Keeper.__init__, "__defaults__", (1e-9, lambda: 0.0))

    def late(self: Keeper, position: int, must: bool = False) -> Any:
        return after(self, position, must=position % 4 == 1)

    after = Keeper.after
    monkeypatch.setattr(Keeper, "after", late)
    loader = StagedDataLoader(Stateful(), capacity=3)
    iterator = iter(loader)
    taken = [float(next(iterator)[0]) for _ in range(4)]
    state = loader.state_dict()
    iterator.close()
    resumed = StagedDataLoader(Stateful())
    resumed.load_state_dict(state)
    assert taken + [float(x[0]) for x in resumed] == [101, 102, 103, 104, 105, 106]


def test_an_error_on_the_way_from_an_older_state_does_not_lose_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader has read some of the way then: it must be put back before the next try."""

    class Flaky(Stateful):
        def __iter__(self) -> Iterator[torch.Tensor]:
            for x in super().__iter__():
                if x[0] == 103 and flaws:
                    raise flaws.pop()
                yield x

        def load_state_dict(self, state: dict[str, int]) -> None:
            super().load_state_dict(state)
            state.clear()  # its own business

    # A second between any two looks at the clock: one state, after the first batch, is all that the share allows.
    monkeypatch.setattr(Keeper.__init__, "__defaults__", (1e-9, itertools.count().__next__))
    flaws: list[OSError] = []
    with StagedDataLoader(Flaky()) as loader:
        iterator = iter(loader)
        taken = [float(next(iterator)[0]) for _ in range(4)]
        state = loader.state_dict()
    assert (state["snapshot"]["position"], state["position"]) == (1, 4)
    flaws.append(OSError("once"))
    resumed = StagedDataLoader(Flaky())
    resumed.load_state_dict(state)
    with pytest.raises(OSError, match="once"):
        next(iter(resumed))
    assert taken + [float(x[0]) for x in resumed] == [101, 102, 103, 104, 105, 106]


@pytest.mark.parametrize("at", [1, 3, BATCHES + 1])
def test_an_error_of_the_loaders_state_dict_arrives_in_the_loop(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Keeper.__init__, "__defaults__", (1e9, lambda: 0.0))  # a state after each read

    class Broken(Stateful):
        calls = 0

        def state_dict(self) -> dict[str, int]:
            self.calls += 1
            if self.calls == at:
                raise OSError("no state")
            return super().state_dict()

    taken = []
    with pytest.raises(OSError, match="no state"):
        for x in StagedDataLoader(Broken(), capacity=3):
            taken.append(x)
    assert len(taken) <= at - 1


def test_persistent_workers_are_not_read_by_two_passes_at_once() -> None:
    def order(loader: Any) -> list[float]:
        torch.manual_seed(0)
        first = iter(loader)
        found = [float(next(first)[0])]
        for _ in range(2):
            found += [float(x[0]) for x in loader]  # resets the iterator that ``first`` is, or was read from
        return found

    def make() -> Any:
        return DataLoader(Numbers(), batch_size=BATCH, shuffle=True, num_workers=1, persistent_workers=True)

    assert order(make()) == order(StagedDataLoader(make(), capacity=3, num_threads=2))


def test_the_data_of_the_tests_is_shuffled() -> None:
    assert click_data() is not None
    assert not torch.equal(plain_run(LOADERS["shuffled"])[0], plain_run(LOADERS["DataLoader"])[0])
