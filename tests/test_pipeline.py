"""The pipeline's contract, number by number (1, 5, 7 to 9 and 11 have more tests in test_laws.py)."""

import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support import Scale, numbers
from tests.test_carrier import CPU, Lane
from torchstage import SmartStageOptions, StagedDataLoader, smart_stage
from torchstage.errors import ChannelCancelled, ChannelClosed, DroppedBatchWarning, PutTimeoutError, TorchstageWarning
from torchstage.loaders._carrier import Carrier
from torchstage.loaders._handler import Staged
from torchstage.loaders._pipeline import Pipeline
from torchstage.loaders._reader import Reader
from torchstage.loaders._source import Batch, Source
from torchstage.stats import Recorder


def pipeline_of(batches: Iterator[Any], **options: Any) -> Pipeline:
    chosen = SmartStageOptions(**options)
    return Pipeline(Reader(Source(batches, window=4, pushed_back=[]), chosen), None, chosen, Recorder("test"))


def values(loader: StagedDataLoader) -> list[int]:
    return [int(x[0]) for x in loader]


class Gate:
    """A loader whose ``__next__`` waits for a permit; notes who is inside."""

    def __init__(self, count: int) -> None:
        self.permits = threading.Semaphore(0)
        self.inside = 0
        self.most = 0
        self.left = iter(numbers(count))
        self.calls = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.calls += 1
        try:
            assert self.permits.acquire(timeout=10)
            return next(self.left)
        finally:
            self.inside -= 1


def test_1_order_is_kept_when_later_batches_are_staged_first() -> None:
    """The race is built: batch 0's worker is held in the stage until all others have put theirs."""
    others_done = threading.Event()

    class Slow:
        def stage(self, batch: Batch, number: int) -> Staged:
            if number == 0:
                assert others_done.wait(10)
            elif number == 3:
                others_done.set()
            return Staged(batch)

        def prepare(self, batch: torch.Tensor) -> None:
            pass

        def at_work(self) -> contextlib.nullcontext[None]:
            return contextlib.nullcontext()

    options = SmartStageOptions(num_threads=4, capacity=4)
    reader = Reader(Source(iter(numbers(4)), window=8, pushed_back=[]), options)
    pipeline = Pipeline(reader, Slow(), options, Recorder("test"))  # type: ignore[arg-type]
    pipeline.start()
    assert [pipeline.take().number for _ in range(4)] == [0, 1, 2, 3]
    pipeline.stop()


def test_3_one_thread_at_a_time_calls_the_users_iterator() -> None:
    gate = Gate(30)
    for _ in range(31):
        gate.permits.release()
    assert values(StagedDataLoader(gate, num_threads=8, capacity=4)) == list(range(30))
    assert gate.most == 1


def test_4_the_end_reaches_every_client_after_the_batches_before() -> None:
    loader = StagedDataLoader(numbers(50), num_clients=3, num_threads=2, capacity=2)
    seen: list[list[int]] = [[], [], []]
    threads = [threading.Thread(target=lambda i=i: seen[i].extend(values(loader))) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert sorted(sum(seen, [])) == list(range(50))
    assert all(part == sorted(part) for part in seen)


class Stops(Exception):
    pass


def raising(error: Exception, at: int, count: int = 6) -> Iterator[torch.Tensor]:
    for i, batch in enumerate(numbers(count)):
        if i == at:
            raise error
        yield batch


@pytest.mark.parametrize("at", [0, 2, 5])
def test_4_a_closed_exception_type_ends_the_epoch_normally(at: int) -> None:
    loader = StagedDataLoader(raising(Stops(), at), closed_exception_types=(Stops,), num_threads=2)
    assert values(loader) == list(range(at))


def test_5_nothing_is_read_after_an_error() -> None:
    class Counts:
        calls = 0

        def __iter__(self) -> Iterator[torch.Tensor]:
            return self

        def __next__(self) -> torch.Tensor:
            self.calls += 1
            if self.calls == 3:
                raise OSError("broken")
            return torch.zeros(3)

    counts = Counts()
    loader = StagedDataLoader(counts, num_threads=4, capacity=8)
    with pytest.raises(OSError, match="broken"):
        list(loader)
    assert counts.calls == 3


def test_5_what_nobody_expected_of_a_worker_is_raised_at_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flaw of the pipeline's own: the client must not wait for that batch for ever."""
    pipeline = pipeline_of(iter(numbers(6)), num_threads=2, capacity=2)
    put = pipeline._put

    def flawed(item: Any) -> None:
        if item.number == 2:
            raise KeyError("flaw")
        put(item)

    monkeypatch.setattr(pipeline, "_put", flawed)
    pipeline.start()
    assert [pipeline.take().number for _ in range(2)] == [0, 1]
    with pytest.raises(KeyError, match="flaw") as caught:
        pipeline.take()
    assert "raised while handing on batch 2" in "".join(caught.value.__notes__)
    pipeline.stop()


class Skips:
    """Raises for some batches and can go on."""

    def __init__(self, bad: set[int], count: int = 8) -> None:
        self.bad, self.count = bad, count

    def __iter__(self) -> Iterator[torch.Tensor]:
        return SkipsIterator(self)


class SkipsIterator:
    def __init__(self, loader: Skips) -> None:
        self.loader, self.at = loader, -1

    def __iter__(self) -> "SkipsIterator":
        return self

    def __next__(self) -> torch.Tensor:
        self.at += 1
        if self.at in self.loader.bad:
            raise ValueError(f"row {self.at}")
        if self.at == self.loader.count:
            raise StopIteration
        return torch.full((3,), float(self.at))


@pytest.mark.parametrize("bad", [{0}, {0, 1}, {3}, {7}, {0, 3, 4, 7}])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_5_an_ignored_exception_type_skips_its_batch_and_is_counted(bad: set[int], num_threads: int) -> None:
    loader = StagedDataLoader(Skips(bad), ignored_exception_types=(ValueError,), num_threads=num_threads)
    with pytest.warns(DroppedBatchWarning, match=r"a batch was dropped: the loader raised ValueError\('row \d'\)"):
        assert values(loader) == [i for i in range(8) if i not in bad]
    assert loader.stats.drops == {"ValueError": len(bad)}
    assert values(loader) == [i for i in range(8) if i not in bad]  # warned about once


def held_back(**options: Any) -> tuple[Pipeline, list[int]]:
    """Take one of four batches after the others have timed out."""
    pipeline = pipeline_of(iter(numbers(4)), capacity=1, timeout_millis=1, **options)
    pipeline.start()
    for thread in pipeline.crew.threads():
        thread.join(10)
    seen = []
    try:
        while True:
            seen.append(int(pipeline.take().outcome.value[0]))
    except ChannelClosed:
        return pipeline, seen
    finally:
        pipeline.stop()


def test_6_a_timeout_drops_the_batch_and_counts_it() -> None:
    pipeline, seen = held_back()
    assert seen == [0]
    assert pipeline.recorder.snapshot({}).drops == {"timeout": 3}
    with pytest.warns(
        DroppedBatchWarning, match='batch 1 found no room in the buffer within 1 ms; on_timeout="wait" keeps'
    ):
        pipeline.recorder.emit(stacklevel=1)


def test_6_a_timeout_raises_at_the_batchs_position() -> None:
    with pytest.raises(
        PutTimeoutError, match=r"batch 1 found no room in the buffer within 1 ms: .* Raise timeout_millis"
    ):
        held_back(on_timeout="raise")


def test_6_a_timeout_waits_and_says_so() -> None:
    loader = StagedDataLoader(numbers(20), timeout_millis=1, on_timeout="wait", num_threads=2)
    iterator = iter(loader)
    with pytest.warns(DroppedBatchWarning, match="waits on"):  # at the first batch already, if this thread is slow
        seen = [int(next(iterator)[0])]
        recorder = loader._shared.recorder
        while "waits" not in recorder._warned:
            time.sleep(0.001)
        seen += [int(x[0]) for x in iterator]
    assert seen == list(range(20))
    assert not loader.stats.drops


def test_7_stop_may_be_called_twice_and_by_any_thread() -> None:
    pipeline = pipeline_of(iter(numbers(50)), num_threads=3)
    pipeline.start()
    pipeline.take()
    thread = threading.Thread(target=pipeline.stop)
    thread.start()
    pipeline.stop()
    thread.join(10)
    pipeline.stop()
    with pytest.raises(ChannelCancelled):
        pipeline.take()


def test_7_stop_wakes_a_client_that_waits() -> None:
    gate = Gate(5)
    gate.permits.release()
    pipeline = pipeline_of(gate)
    pipeline.start()
    pipeline.take()
    raised: list[BaseException] = []

    def client() -> None:
        try:
            pipeline.take()
        except ChannelCancelled as error:
            raised.append(error)

    thread = threading.Thread(target=client)
    thread.start()
    with pytest.warns(
        TorchstageWarning, match="'torchstage-test-0' did not stop within 0.05 s; it hangs at .*threading"
    ):
        pipeline.stop(timeout=0.05)
    thread.join(10)
    assert len(raised) == 1
    gate.permits.release()  # let the reader go


def test_8_what_was_read_and_not_taken_is_left_over_in_order() -> None:
    reached = threading.Event()

    def batches() -> Iterator[torch.Tensor]:
        for i, batch in enumerate(numbers(30)):
            if i == 7:
                reached.set()
            yield batch

    pipeline = pipeline_of(batches(), num_threads=3, capacity=4)
    pipeline.start()
    assert int(pipeline.take().outcome.value[0]) == 0
    assert reached.wait(10)
    pipeline.stop()
    assert [int(batch.value[0]) for batch in pipeline.leftovers()] == list(range(1, 8))


def test_8_an_error_that_nobody_has_seen_is_left_over_too() -> None:
    loader = StagedDataLoader(raising(OSError("late"), 2), capacity=8)
    for x in loader:
        assert int(x[0]) == 0
        break
    seen = []
    with pytest.raises(OSError, match="late"):
        for x in loader:
            seen.append(int(x[0]))
    assert seen == [1]


class Reads:
    """A loader that says how many batches have been read."""

    def __init__(self, count: int) -> None:
        self.batches = iter(numbers(count))
        self.read = 0
        self.changed = threading.Condition()

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        with self.changed:
            self.read += 1
            self.changed.notify_all()
        return next(self.batches)

    def reached(self, count: int, timeout: float) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: self.read >= count, timeout)


def test_9_the_next_batch_is_begun_when_the_forward_is_done() -> None:
    reads = Reads(20)
    staged, loader = smart_stage(Scale(), reads, capacity=1)
    iterator = iter(loader)
    x = next(iterator)
    assert reads.reached(2, 10)  # batch 1 waits for the slot in its worker's hand
    assert not reads.reached(3, 0.05)
    staged(x)
    assert reads.reached(3, 10)
    iterator.close()


def test_9_a_loop_that_does_not_run_the_model_is_not_held_back() -> None:
    reads = Reads(20)
    _, loader = smart_stage(Scale(), reads, capacity=1)
    iterator = iter(loader)
    next(iterator)
    next(iterator)
    assert reads.reached(4, 10)
    iterator.close()


def test_9_a_loader_without_a_model_is_not_held_back() -> None:
    reads = Reads(20)
    iterator = iter(StagedDataLoader(reads, capacity=1))
    next(iterator)
    assert reads.reached(3, 10)
    iterator.close()


def workers_of(pipeline: Pipeline) -> list[str]:
    name = f"torchstage-{pipeline.recorder.name}-"
    return sorted(thread.name.removeprefix(name) for thread in threading.enumerate() if thread.name.startswith(name))


def settles(pipeline: Pipeline, workers: list[str]) -> bool:
    """Wait, for a bounded time, until exactly these workers are there."""
    deadline = time.monotonic() + 10
    while workers_of(pipeline) != workers and time.monotonic() < deadline:
        time.sleep(0.001)
    return workers_of(pipeline) == workers


def test_10_workers_come_and_go_and_no_batch_is_lost() -> None:
    pipeline = pipeline_of(iter(numbers(5000)), num_threads=1, capacity=1)
    pipeline.start()
    taken = []
    for num_threads, capacity in [(4, 2), (2, 8), (7, 1), (1, 1), (3, 5), (1, 2)] * 4:
        pipeline.resize(num_threads, capacity)
        wanted = [str(n) for n in range(num_threads)]
        taken += [pipeline.take().number for _ in range(10)]
        while workers_of(pipeline) != wanted:  # one that is too many may wait for room for the batch that it holds
            taken.append(pipeline.take().number)
    with contextlib.suppress(ChannelClosed):
        while True:
            taken.append(pipeline.take().number)
    assert taken == list(range(5000))
    pipeline.stop()


def test_10_a_worker_that_is_too_many_puts_the_batch_that_it_holds() -> None:
    """The race is built: batches 0 and 1 are being read and held while the size shrinks to one worker."""
    gate, held = Gate(3), threading.Event()
    pipeline = pipeline_of(gate, num_threads=2, capacity=1)
    put = pipeline._put

    def hold(item: Any) -> None:
        if item.number == 1:
            assert held.wait(10)
        put(item)

    pipeline._put = hold  # type: ignore[method-assign]
    for _ in range(4):
        gate.permits.release()
    pipeline.start()
    assert pipeline.take().number == 0
    pipeline.resize(1, 1)
    held.set()
    assert [pipeline.take().number for _ in range(2)] == [1, 2]
    pipeline.stop()
    assert workers_of(pipeline) == []


def test_10_no_worker_starts_after_the_stop() -> None:
    pipeline = pipeline_of(iter(numbers(10)), num_threads=1, capacity=1)
    pipeline.start()
    pipeline.stop()
    pipeline.resize(4, 4)
    assert workers_of(pipeline) == []


def test_10_a_worker_that_was_told_to_go_and_then_to_stay_is_not_missed() -> None:
    """It leaves, or goes on: at the end of both resizes there are as many workers as asked for."""
    pipeline = pipeline_of(iter(numbers(100_000)), num_threads=4, capacity=4)
    pipeline.start()
    for _ in range(300):
        pipeline.resize(1, 4)
        pipeline.take()
        pipeline.resize(4, 4)
    assert settles(pipeline, ["0", "1", "2", "3"])
    pipeline.stop()


def test_11_threads_hold_neither_the_loader_nor_the_iterator() -> None:
    loader = StagedDataLoader(numbers(50), num_threads=2)
    iterator = iter(loader)
    next(iterator)
    references = [weakref.ref(loader), weakref.ref(iterator)]
    del loader, iterator
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_15_the_streams_that_train_are_known_before_anything_is_staged_and_workers_are_on_the_device() -> None:
    class Noted(Lane):
        def meet(self) -> str:
            self.said.append(("meet", threading.current_thread()))
            return "default"

        def settle(self) -> None:
            self.said.append(("settle", threading.current_thread()))

        def mark(self) -> Any:
            self.said.append("staged")
            return super().mark()

    options, lane = SmartStageOptions(num_threads=1, capacity=1), Noted()
    reader = Reader(Source(iter(numbers(2)), window=4, pushed_back=[]), options)
    pipeline = Pipeline(reader, None, options, Recorder("test"), carrier=Carrier(CPU, lane, moves_batch=True))
    here = threading.current_thread()
    pipeline.start()
    assert [pipeline.take().number for _ in range(2)] == [0, 1]
    pipeline.stop()
    assert lane.said[0] == ("meet", here)
    assert [said for said in lane.said if said == ("meet", here)] == [("meet", here)] * 3
    settled = [said[1] for said in lane.said if said[0] == "settle"]
    assert len(settled) == 1
    assert here not in settled
    assert lane.said.index(("settle", settled[0])) < lane.said.index("staged")
