"""Soak: thousands of batches with random delays at every hand-over; the sequence must be the plain one."""

import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import torchstage
from tests.soak import soak
from tests.support import Scale
from torchstage import ops
from torchstage._channel import Channel

BATCHES = 1000


class Delays:
    """Sleeps now and then, from a seed of its own for each thread; counts the places where it did."""

    def __init__(self, seed: int) -> None:
        self.local = threading.local()
        self.seed = seed
        self.places: set[str] = set()

    def __call__(self, place: str) -> None:
        if not hasattr(self.local, "random"):
            self.local.random = random.Random(f"{self.seed} {threading.current_thread().name}")
        if self.local.random.random() < 0.2:
            self.places.add(place)
            time.sleep(self.local.random.random() * 5e-4)


@pytest.fixture
def delays(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Delays:
    delay = Delays(request.node.callspec.params["num_threads"])
    for name in ("put", "take", "skip"):
        original = getattr(Channel, name)

        def delayed(*args: Any, original: Any = original, name: str = name, **kwargs: Any) -> Any:
            delay(f"before {name}")
            result = original(*args, **kwargs)
            delay(f"after {name}")
            return result

        monkeypatch.setattr(Channel, name, delayed)
    return delay


@pytest.mark.parametrize("num_threads", range(1, 9))
def test_the_sequence_is_the_plain_one_whatever_the_delays(num_threads: int, delays: Delays) -> None:
    def batches() -> Iterator[torch.Tensor]:
        for i in range(BATCHES):
            delays("read")
            yield torch.tensor([float(i)])

    @ops.pure_op
    def slow(x: torch.Tensor) -> torch.Tensor:
        delays("stage")
        return x * 3

    class Slow(Scale):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return slow(x) * self.weight

    capacity = 1 + num_threads % 3
    staged, loader = torchstage.smart_stage(Slow(), batches(), num_threads=num_threads, capacity=capacity)
    seen = []
    with torch.no_grad():
        for x in loader:
            seen.append((int(x), int(staged(x))))
            delays("step")
    assert seen == [(i, 3 * i) for i in range(BATCHES)]
    assert loader.stats.staged_steps + sum(loader.stats.fallbacks.values()) == BATCHES
    assert delays.places >= {"before put", "after put", "before take", "after take", "read", "stage", "step"}


@pytest.mark.parametrize("num_threads", [1, 4])
def test_breaks_at_random_places_lose_and_double_nothing(num_threads: int, delays: Delays) -> None:
    generator = (torch.tensor([float(i)]) for i in range(BATCHES))
    loader = torchstage.StagedDataLoader(generator, num_threads=num_threads, capacity=3)
    chance = random.Random(0)
    seen: list[int] = []
    while len(seen) < BATCHES:
        for x in loader:
            seen.append(int(x))
            if chance.random() < 0.05:
                break
    assert seen == list(range(BATCHES))
    assert delays.places


@pytest.mark.parametrize("seed", [0, 1])
def test_random_schedules_are_what_the_model_of_the_contract_says(seed: int) -> None:
    """A part of ``python -m tests.soak``: faults, delays, resizes, breaks and resumes."""
    assert soak(seed, batches=4000) >= 4000


def test_the_soak_finds_a_batch_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    take, taken = Channel.take, []

    def loses(channel: Any, keep_slot: bool = False) -> Any:
        taken.append(0)
        if len(taken) == 100:
            take(channel, keep_slot)
        return take(channel, keep_slot)

    monkeypatch.setattr(Channel, "take", loses)
    with pytest.raises(AssertionError, match=r"episode '0\.\d+' failed; run it again with tests.soak.Episode"):
        soak(0, batches=4000)
