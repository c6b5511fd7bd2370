"""Random streams: the numbers of the plain loop, whoever draws, and a loader that draws for each batch is not read ahead."""

import random
import re
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

import torchstage
from tests.support import assert_same, click_data
from torchstage import StagedDataLoader
from torchstage.errors import RandomStreamWarning
from torchstage.loaders._streams import Generators, ReadOrder, Streams

DRAWS: dict[str, Callable[[], float]] = {
    "torch": lambda: float(torch.rand(())),
    "numpy": lambda: float(np.random.random()),
    "random": random.random,
}


class Noisy(Dataset[torch.Tensor]):
    """Rows with noise from a global stream, as an augmentation draws it."""

    def __init__(self, stream: str) -> None:
        self.stream = stream

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((3,), float(index)) + DRAWS[self.stream]()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.lin((x * 2).sin()))


def seed() -> None:
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)


def run(model: Any, loader: Any, epochs: int = 2) -> list[torch.Tensor]:
    """Train with dropout; return the losses, the parameters, and what each stream gives next."""
    seed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for _ in range(epochs):
        for x in loader:
            loss = model(x).square().sum() + np.random.random() + random.random()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
    found += [parameter.detach().clone() for parameter in model.parameters()]
    return found + [torch.tensor(draw()) for draw in DRAWS.values()]


def both(make: Callable[[], Any], **options: Any) -> tuple[list[torch.Tensor], list[torch.Tensor], StagedDataLoader]:
    torch.manual_seed(0)
    plain = Net()
    staged, loader = torchstage.smart_stage(Net(), make(), capacity=2, num_threads=2, **options)
    staged.load_state_dict(plain.state_dict())
    return run(plain, make()), run(staged, loader), loader


@pytest.mark.parametrize("stream", list(DRAWS))
def test_a_data_set_that_draws_from_a_global_stream_gives_the_plain_numbers_and_a_warning(stream: str) -> None:
    names = {"torch": "torch", "numpy": "NumPy", "random": "Python's random"}
    match = rf"draws from the global random stream of {names[stream]}, as steps may do.*a generator of its own.*num_workers=1"
    with pytest.warns(RandomStreamWarning, match=match):
        plain, staged, loader = both(lambda: DataLoader(Noisy(stream), batch_size=4, shuffle=True))
    assert_same(plain, staged)
    assert loader.stats.batches == loader.stats.staged_steps == 12
    assert re.search(f"not read ahead: .*{match}", str(loader.plan))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.filterwarnings("error::torchstage.errors.TorchstageWarning")
def test_a_shuffling_loader_draws_once_a_pass_and_is_staged_from_the_first_batch_on(num_workers: int) -> None:
    data: Any = torch.arange(72.0).view(24, 3)
    plain, staged, loader = both(lambda: DataLoader(data, batch_size=4, shuffle=True, num_workers=num_workers))
    assert_same(plain, staged)
    assert loader.stats.staged_steps == 12


@pytest.mark.filterwarnings("error::torchstage.errors.TorchstageWarning")
def test_worker_processes_have_streams_of_their_own() -> None:
    plain, staged, loader = both(lambda: DataLoader(Noisy("torch"), batch_size=4, shuffle=True, num_workers=1))
    assert_same(plain, staged)
    assert loader.stats.staged_steps == 12


@pytest.mark.filterwarnings("error::torchstage.errors.TorchstageWarning")
def test_a_generator_of_its_own_is_read_ahead() -> None:
    class Own(Noisy):
        def __init__(self) -> None:
            super().__init__("torch")
            self.generator = torch.Generator().manual_seed(3)

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.rand(3, generator=self.generator)

    plain, staged, loader = both(lambda: DataLoader(Own(), batch_size=4, shuffle=True))
    assert_same(plain, staged)
    assert loader.stats.staged_steps == 12


@pytest.mark.filterwarnings("error::torchstage.errors.TorchstageWarning")
def test_reading_ahead_all_the_same_is_a_choice() -> None:
    _, staged, loader = both(lambda: DataLoader(Noisy("torch"), batch_size=4), keep_random_order=False)
    assert len(staged) == 12 + 2 + 3
    assert loader.stats.staged_steps == 12


def test_a_loader_that_draws_nothing_is_read_ahead_from_its_first_batch() -> None:
    loader = StagedDataLoader(DataLoader(click_data(), batch_size=4), capacity=2)
    iterator = iter(loader)
    next(iterator)
    assert iterator._epoch.pipeline.crew.threads()
    iterator.close()


def test_an_error_while_batches_are_read_in_the_step_arrives_at_its_place() -> None:
    def draws() -> Iterator[torch.Tensor]:
        for _ in range(3):
            yield torch.rand(2)
        raise OSError("broken")

    seed()
    expected = [torch.rand(2) for _ in range(3)]
    seed()
    taken = []
    with pytest.warns(RandomStreamWarning), pytest.raises(OSError, match="broken") as caught:
        for x in StagedDataLoader(draws(), capacity=4, num_threads=3):
            taken.append(x)
    assert_same(expected, taken)
    assert "raised by the loader for batch 3" in "".join(caught.value.__notes__)


def test_an_ignored_error_while_batches_are_read_in_the_step_is_counted() -> None:
    class Draws:
        def __init__(self) -> None:
            self.count = 0

        def __iter__(self) -> "Draws":
            return self

        def __next__(self) -> torch.Tensor:
            self.count += 1
            if self.count > 8:
                raise StopIteration
            x = torch.rand(2)
            if self.count in (1, 4):
                raise ValueError("bad row")
            return x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = StagedDataLoader(Draws(), ignored_exception_types=(ValueError,))
        assert len(list(loader)) == 6
    assert loader.stats.drops == {"ValueError": 2}


# ---------------------------------------------------------------- the parts


def test_the_streams_are_told_apart_and_put_back() -> None:
    before = Streams.now()
    assert before.moved(Streams.now()) == ()
    for name, draw in DRAWS.items():
        value = draw()
        assert before.moved(Streams.now()) == (name,)
        before.restore()
        assert draw() == value
        before.restore()


def test_draws_on_a_gpu_count_once_cuda_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [torch.zeros(16, dtype=torch.uint8), torch.ones(16, dtype=torch.uint8)]  # stand for those of two GPUs
    before = Streams.now()
    assert before.cuda == ()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [state.clone() for state in states])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda new: states.__setitem__(slice(None), list(new)))
    begun = Streams.now()
    assert before.moved(begun) == ()  # it came into use between the two
    states[1] += 1
    assert begun.moved(Streams.now()) == ("cuda",)
    begun.restore()
    assert begun.moved(Streams.now()) == ()


def test_states_of_streams_survive_a_file_without_pickled_code(tmp_path: Any) -> None:
    random.gauss(0, 1)  # leaves a second number behind
    np.random.standard_normal()
    before = Streams.now()
    torch.save(before.to_state(), tmp_path / "streams.pt")
    expected = [draw() for draw in DRAWS.values()] + [random.gauss(0, 1), np.random.standard_normal()]
    Streams.from_state(torch.load(tmp_path / "streams.pt", weights_only=True)).restore()
    assert [draw() for draw in DRAWS.values()] + [random.gauss(0, 1), np.random.standard_normal()] == expected


def test_the_order_is_known_after_the_first_read_that_draws_nothing_or_after_the_second() -> None:
    draw, rest = DRAWS["torch"], lambda: 0.0
    for reads, ahead in (([rest], True), ([draw], None), ([draw, rest], True), ([draw, draw], False)):
        order = ReadOrder(object(), keep=True)
        order.begin()
        for read in reads:
            order.see(read)
        assert order.ahead is ahead
    assert ReadOrder([], keep=True).ahead
    assert ReadOrder(object(), keep=False).ahead


def test_a_pass_of_one_batch_says_nothing_of_the_next() -> None:
    order = ReadOrder(object(), keep=True)
    for _ in range(3):
        order.begin()
        order.see(DRAWS["torch"])
        assert order.ahead is None


def test_the_generators_of_a_loader_are_found_once() -> None:
    generator = torch.Generator()
    data = TensorDataset(torch.arange(4))
    assert Generators(DataLoader(data, shuffle=True, generator=generator)).found == [generator]
    assert Generators(DataLoader(data)).found == []
    assert Generators([1, 2]).found == []


@pytest.mark.parametrize("capacity", [1, 3, 8])
@pytest.mark.parametrize("stop_at", [0, 1, 2, 4])
def test_breaking_off_leaves_the_samplers_generator_as_the_plain_loop_does(stop_at: int, capacity: int) -> None:
    """A sampler draws once more when it is exhausted, which reading ahead does and a loop that breaks off does not."""

    def order(stage: bool) -> list[int]:
        rows: Any = torch.arange(20)
        sampler = RandomSampler(rows, generator=torch.Generator().manual_seed(0))
        loader: Any = DataLoader(rows, 4, sampler=sampler)
        if stage:
            loader = StagedDataLoader(loader, capacity=capacity, num_threads=2)
        found = []
        for _ in range(3):
            iterator = iter(loader)
            for i, x in enumerate(iterator):
                while stage and capacity == 8 and not iterator._epoch.pipeline.reader._ended:
                    time.sleep(0.001)  # until all is read
                found.append(int(x[0]))
                if i == stop_at:
                    break
            del iterator
        return found

    assert order(stage=True) == order(stage=False)


@pytest.mark.parametrize("reads_after", [0, 1])
def test_what_the_loop_draws_from_the_loaders_generator_stays_drawn(reads_after: int) -> None:
    """Between two reads, or behind the last: this sampler draws for every 32 rows, so reads go on drawing."""
    generator = torch.Generator().manual_seed(0)
    sampler = RandomSampler(click_data(), replacement=True, generator=generator)
    reader = StagedDataLoader(DataLoader(click_data(), 32, sampler=sampler), capacity=2)
    iterator = iter(reader)
    next(iterator)
    reads = iterator._epoch.pipeline.reader
    while reads._next < 2:
        time.sleep(0.001)
    with reads._lock:
        torch.rand(1, generator=generator)
        state, number = generator.get_state(), reads._next
    if reads_after:
        next(iterator)
        while reads._next == number:
            time.sleep(0.001)
    with reads._lock:
        assert torch.equal(generator.get_state(), state) != bool(reads_after)
        state = generator.get_state()
        reads.end()
    iterator.close()
    assert torch.equal(generator.get_state(), state)
