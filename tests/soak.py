"""A soak: loaders with random faults, delays, resizes, breaks and resumes, each step checked against a model of the contract.

    python -m tests.soak --minutes 60
    python -m tests.soak --batches 100000 --seed 7

An episode is one loader and one schedule, both drawn from ``seed`` and the episode's number, which a failure prints. The
model is one thread and a few lines: what the user's loader would give, with the positions that are ignored left out.
"""

import argparse
import dataclasses
import random
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from torchstage import StagedDataLoader, smart_stage

PASSES = 6


class Ignored(Exception):
    """Skips its batch."""


class Fatal(Exception):
    """Ends its pass."""


@dataclasses.dataclass(frozen=True)
class Script:
    """What one loader does: how many batches a pass has, and which of them raise."""

    count: int
    ignored: frozenset[int]
    fatal: frozenset[int]
    one_shot: bool
    stateful: bool
    delay: float
    most: int | None

    def outcome(self, position: int) -> float | BaseException:
        """Return the batch at ``position``, or what it raises."""
        if position in self.fatal:
            return Fatal(position)
        return Ignored(position) if position in self.ignored else float(position)


class Source:
    """A loader that follows a script."""

    def __init__(self, script: Script, seed: str) -> None:
        self.script, self.random = script, random.Random(seed)
        self.position, self.resumed, self.inside = 0, False, 0
        if not script.stateful:
            self.state_dict = self.load_state_dict = None  # type: ignore[method-assign,assignment]

    def __iter__(self) -> Iterator[torch.Tensor]:
        if self.script.one_shot:
            return self
        if not self.resumed:
            self.position = 0
        self.resumed = False
        return _Pass(self)

    def __next__(self) -> torch.Tensor:
        return self.read(self)

    def read(self, holder: Any) -> torch.Tensor:
        """Make the next read of ``holder``, which has the position."""
        self.inside += 1
        try:
            assert self.inside == 1, "two threads are in the user's loader"
            if self.random.random() < self.script.delay:
                time.sleep(self.random.random() * 3e-4)
            position, holder.position = holder.position, holder.position + 1
            if position >= self.script.count:
                raise StopIteration
            outcome = self.script.outcome(position)
            if isinstance(outcome, BaseException):
                raise outcome
            return torch.full((2,), outcome)
        finally:
            self.inside -= 1

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "over": self.position > self.script.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position, self.resumed = state["position"], not state["over"]


class _Pass:
    """A pass of its own; the position of a loader with a state is the loader's."""

    def __init__(self, source: Source) -> None:
        self.source, self.position = source, source.position

    def __iter__(self) -> "_Pass":
        return self

    def __next__(self) -> torch.Tensor:
        return self.source.read(self.source if self.source.script.stateful else self)


class Expected:
    """The model of the contract: what a client must see, step by step."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.position = self.consumed_to = self.ignored = self.ignored_to = 0

    def begin(self) -> None:
        """Begin a pass."""
        self.ignored = self.ignored_to = 0
        self.position = self.consumed_to if self.script.one_shot else 0

    def resume(self) -> None:
        """Begin a pass where the last batch was handed out."""
        self.position, self.ignored = self.consumed_to, self.ignored_to

    def next(self) -> float | BaseException | None:
        """Return the next batch, or what is raised in its place, or None at the end."""
        while self.position < self.script.count:
            outcome = self.script.outcome(self.position)
            self.position += 1
            if isinstance(outcome, Ignored) and (self.script.most is None or self.ignored < self.script.most):
                self.ignored += 1
                continue
            if isinstance(outcome, BaseException) and self.script.one_shot:
                self.consumed_to = self.position
            elif not isinstance(outcome, BaseException):
                self.consumed_to, self.ignored_to = self.position, self.ignored
            return outcome
        return None


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 3).abs() * self.weight


class Episode:
    """One loader and its schedule.

    Args:
        seed: of everything random in it.
    """

    def __init__(self, seed: str) -> None:
        self.random = chance = random.Random(seed)
        self.seed = seed
        count = chance.choice([1, 2, 7, 30, 100])
        bad = {i for i in range(count) if chance.random() < chance.choice([0, 0, 0.1, 0.3])}
        fatal = {i for i in bad if chance.random() < 0.15}
        self.script = Script(
            count,
            frozenset(bad - fatal),
            frozenset(fatal),
            one_shot=chance.random() < 0.3,
            stateful=False,
            delay=chance.choice([0.0, 0.05, 0.5]),
            most=chance.choice([None, None, 2]),
        )
        if not self.script.one_shot and chance.random() < 0.4:
            self.script = dataclasses.replace(self.script, stateful=True, fatal=frozenset())
        self.options: dict[str, Any] = {
            "num_threads": chance.randint(1, 8),
            "capacity": chance.randint(1, 8),
            "ignored_exception_types": (Ignored,),
            "max_ignored": self.script.most,
        }
        self.breaks, self.resizes, self.resumes = (chance.choice([0.0, 0.02, 0.1]) for _ in range(3))
        if self.script.one_shot and self.script.fatal:
            self.resumes = 0.0  # reading again would raise again what the loop has seen
        self.model = Net() if chance.random() < 0.5 else None
        self.batches = 0

    def run(self) -> int:
        """Return how many batches went by.

        Raises:
            AssertionError: a client saw something else than the model says.
        """
        expected, staged, loader = Expected(self.script), *self._make()
        resumed = False
        for _ in range(PASSES):
            expected.resume() if resumed else expected.begin()
            resumed = False
            iterator = iter(loader)
            while True:
                must = expected.next()
                self._check(self._next(iterator), must, staged)
                if not isinstance(must, float):
                    break
                if self.random.random() < self.resizes:
                    iterator._epoch.pipeline.resize(self.random.randint(1, 8), self.random.randint(1, 8))
                if self.random.random() < self.breaks:
                    break
                if self.random.random() < self.resumes:
                    state = loader.state_dict()
                    assert state["position"] == expected.consumed_to, (state, expected.consumed_to)
                    loader.close()
                    staged, loader = self._make()
                    loader.load_state_dict(state)
                    resumed = True
                    break
            del iterator
        loader.close()
        return self.batches

    def _make(self) -> tuple[Any, StagedDataLoader]:
        source = Source(self.script, self.seed)
        if self.model is None:
            return None, StagedDataLoader(source, **self.options)
        return smart_stage(self.model, source, **self.options)

    def _next(self, iterator: Iterator[Any]) -> Any:
        try:
            return next(iterator)
        except StopIteration:
            return None
        except (Ignored, Fatal) as error:
            return error

    def _check(self, found: Any, must: float | BaseException | None, staged: Any) -> None:
        if isinstance(must, BaseException):
            assert type(found) is type(must), (found, must)
            assert found.args == must.args, (found, must)
        elif must is None:
            assert found is None, found
        else:
            self.batches += 1
            assert isinstance(found, torch.Tensor), (found, must)
            assert torch.equal(found, torch.full((2,), must)), (found, must)
            if staged is not None:
                assert torch.equal(staged(found), torch.full((2,), 3 * must))


def soak(seed: int, batches: int, seconds: float = float("inf"), tell: Any = None) -> int:
    """Run episodes until so many batches or seconds have gone by; return the number of batches.

    Raises:
        AssertionError: naming the seed of the episode.
    """
    done, number, began = 0, 0, time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while done < batches and time.monotonic() - began < seconds:
            name = f"{seed}.{number}"
            try:
                done += Episode(name).run()
            except BaseException as error:
                raise AssertionError(
                    f"episode {name!r} failed; run it again with tests.soak.Episode({name!r}).run()"
                ) from error
            number += 1
            if tell is not None and number % 50 == 0:
                tell(f"{number:,} episodes, {done:,} batches, {time.monotonic() - began:.0f} s")
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("torchstage-")]
    assert not left, f"threads are left: {left}"
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=sys.maxsize, help="how many batches at most")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"seed {arguments.seed}")
    done = soak(arguments.seed, arguments.batches, arguments.minutes * 60, print)
    print(f"{done:,} batches: none lost, none doubled, none out of order")


if __name__ == "__main__":
    main()
