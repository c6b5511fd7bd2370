"""What it costs to hand a batch from one thread to another when there is nothing to stage.

`python -m benchmarks.bench_handoff` prints the tables of benchmarks/README.md; `--help` lists what can be chosen.
"""

import argparse
import contextlib
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import torchstage
from benchmarks._harness import PrefetchThread, interleave, table
from torchstage._channel import Channel
from torchstage.errors import ChannelCancelled, EmptyStageWarning
from torchstage.loaders._source import Source

CAPACITIES = (1, 4, 16)
US = 1e-6
PAUSE = 1e-3

Pair = tuple[torch.Tensor, torch.Tensor]
Running = tuple[Callable[[], object], Callable[[], object]]
"""What takes one batch, and what ends the variant."""


class NothingToStage(nn.Module):
    """A model without a prefix: its only operation needs a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the weighted features."""
        return features * self.weight


def endless() -> Iterator[Pair]:
    """Yield ready batches that were made before, more than any buffer holds."""
    batches = [(torch.zeros(8), torch.ones(8)) for _ in range(256)]
    return itertools.cycle(batches)


def queue_thread(capacity: int) -> Running:
    """Hand over through a `queue.Queue` and a thread, as one writes it by hand."""
    loader = PrefetchThread(endless(), _as_it_is, capacity)
    return iter(loader).__next__, loader.close


def channel_thread(capacity: int, source: Source | None = None) -> Running:
    """Hand over through the library's channel alone, or behind its source, which makes the objects unique."""
    channel: Channel[Any] = Channel(capacity)
    read = endless().__next__ if source is None else source.next

    def work() -> None:
        with contextlib.suppress(ChannelCancelled):
            for index in itertools.count():
                channel.put(index, read())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def close() -> None:
        channel.cancel()
        thread.join()

    return channel.take, close


def source_and_channel(capacity: int) -> Running:
    """Hand over through the library's source and channel, without the rest of its pipeline."""
    return channel_thread(capacity, Source(endless(), capacity + 2, []))


def prefetch(capacity: int) -> Running:
    """Hand over through a `StagedDataLoader` without a model."""
    loader = torchstage.StagedDataLoader(endless(), capacity=capacity)
    return iter(loader).__next__, loader.close


def staged(capacity: int) -> Running:
    """Hand over through `smart_stage` of a model of which nothing can be staged."""
    _, loader = torchstage.smart_stage(NothingToStage(), endless(), capacity=capacity)
    return iter(loader).__next__, loader.close


VARIANTS: dict[str, Callable[[int], Running]] = {
    "queue.Queue": queue_thread,
    "channel": channel_thread,
    "source + channel": source_and_channel,
    "StagedDataLoader": prefetch,
    "smart_stage": staged,
}


def _as_it_is(batch: Pair) -> Pair:
    return batch


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.filterwarnings("ignore::torchstage.errors.EmptyStageWarning")
def test_handoff(benchmark: Any, capacity: int, variant: str) -> None:
    benchmark.group = f"capacity {capacity}"
    take, close = VARIANTS[variant](capacity)
    try:
        benchmark.pedantic(take, rounds=50, iterations=100, warmup_rounds=2)
    finally:
        close()


def compare(capacity: int, rounds: int, steps: int) -> None:
    """Print the interleaved comparison of all variants at one capacity."""
    running = {name: make(capacity) for name, make in VARIANTS.items()}
    takes = {name: take for name, (take, _) in running.items()}
    try:
        closely = interleave(takes, rounds, steps, warmup=100)
        beside = interleave(takes, rounds, steps // 10, warmup=100, pause=PAUSE)
    finally:
        for _, close in running.values():
            close()
    print(f"\ncapacity {capacity}, back to back: {rounds} rounds of {steps} batches\n")
    print(table(closely, "queue.Queue", US, "us per batch"))
    print(f"\ncapacity {capacity}, each after {PAUSE / US:.0f} us of sleep: {rounds} rounds of {steps // 10} batches\n")
    print(table(beside, "queue.Queue", US, "us per batch"))


def main() -> None:
    """Compare at the chosen capacities."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capacity", type=int, action="append", help=f"batches that may wait; {CAPACITIES} by default")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each variant")
    parser.add_argument("--steps", type=int, default=3000, help="timed batches of a turn")
    options = parser.parse_args()
    warnings.simplefilter("ignore", EmptyStageWarning)
    for capacity in options.capacity or CAPACITIES:
        compare(capacity, options.rounds, options.steps)


if __name__ == "__main__":
    main()
