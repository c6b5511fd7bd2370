"""A loader that is tuned: it obeys what is published, loses nothing, and the numbers are those of the plain run."""

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import torchstage
from tests.support import (
    Clicks,
    Scale,
    assert_same,
    assert_same_training,
    click_data,
    click_loader,
    numbers,
    train,
)
from torchstage import AUTOTUNE, StagedDataLoader, smart_stage
from torchstage.autotune import BUFFER_SIZE, PARALLELISM, Model, Node, Parameter
from torchstage.errors import OptionError
from torchstage.loaders._tuner import Tuner

TUNED: dict[str, Any] = {"capacity": AUTOTUNE, "num_threads": AUTOTUNE}


def parameters(loader: StagedDataLoader) -> tuple[Parameter, Parameter]:
    """Return the loader's parallelism and buffer size."""
    nodes = nodes_of(loader)
    return nodes["stage"].parameters[PARALLELISM], nodes["buffer"].parameters[BUFFER_SIZE]


def nodes_of(loader: StagedDataLoader) -> dict[str, Node]:
    assert loader.model is not None
    return {node.name: node for node in loader.model.nodes}


def set_published(loader: StagedDataLoader, num_threads: int, capacity: int) -> None:
    for parameter, value in zip(parameters(loader), (num_threads, capacity), strict=True):
        parameter.value = value
        parameter.publish()


def workers(name: str) -> int:
    return sum(thread.name.startswith(f"torchstage-{name}-") for thread in threading.enumerate())


@pytest.mark.parametrize("options", [TUNED, {"capacity": AUTOTUNE}, {"num_threads": AUTOTUNE, "capacity": 3}])
def test_a_tuned_run_is_bit_equal_to_the_plain_run(options: dict[str, Any]) -> None:
    loader = assert_same_training(Clicks(), lambda: click_loader(1003), **options)
    assert loader.stats.staged_steps == loader.stats.batches


def test_a_run_whose_numbers_change_all_the_time_is_bit_equal_to_the_plain_run() -> None:
    """What a tuner would do on a very restless machine, and more."""
    model, twin = Clicks(), Clicks()
    twin.load_state_dict(model.state_dict())
    torch.manual_seed(3)
    plain = train(model, click_loader(1003))
    torch.manual_seed(3)
    staged, loader = smart_stage(twin, click_loader(1003), **TUNED)
    generator = random.Random(5)

    def call(net: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        set_published(loader, generator.randint(1, 8), generator.randint(1, 16))
        return net(*batch[:-1]), batch[-1]

    assert_same(plain, train(staged, loader, call=call))
    assert loader.stats.staged_steps == loader.stats.batches


def test_what_is_published_is_obeyed_and_no_batch_is_lost_or_out_of_order() -> None:
    loader = StagedDataLoader(numbers(3000), name="obeys", **TUNED)
    generator = random.Random(1)
    seen = []
    for batch in loader:
        seen.append(int(batch[0]))
        if len(seen) % 20 == 0:
            set_published(loader, generator.randint(1, 8), generator.randint(1, 16))
    assert seen == list(range(3000))


def test_memory_is_bounded_by_the_bounds_whatever_is_published() -> None:
    """Law 7: what was read and not taken waits, is in a worker's hand, or is being read."""
    taken, most = 0, 0

    def batches() -> Iterator[torch.Tensor]:
        nonlocal most
        for read, batch in enumerate(numbers(2000)):
            most = max(most, read + 1 - taken)
            yield batch

    loader = StagedDataLoader(batches(), max_capacity=5, max_num_threads=3, **TUNED)
    generator = random.Random(2)
    for batch in loader:
        taken += 1
        assert int(batch[0]) == taken - 1
        set_published(loader, generator.randint(1, 3), generator.randint(1, 5))
    assert 5 < most <= loader.options.most_batches + 1  # the one that the loop has just got is not counted as taken yet


def test_threads_start_and_stop_and_the_buffer_grows_and_shrinks() -> None:
    loader = StagedDataLoader(numbers(100_000), name="sizes", **TUNED)
    iterator = iter(loader)
    pipeline = iterator._epoch.pipeline
    next(iterator)
    for num_threads, capacity in [(5, 9), (1, 2), (3, 16), (2, 3)]:
        deadline = time.monotonic() + 10
        while (workers("sizes"), pipeline.channel.capacity) != (num_threads, capacity):
            set_published(loader, num_threads, capacity)  # again and again: the tuner has a word in it too
            next(iterator)
            assert time.monotonic() < deadline
    iterator.close()
    assert workers("sizes") == 0


def test_a_fixed_number_stays_fixed_and_is_in_the_model_with_a_fixed_state() -> None:
    loader = StagedDataLoader(numbers(200), capacity=AUTOTUNE, num_threads=2)
    assert len(list(loader)) == 200
    threads, room = parameters(loader)
    assert (threads.min, threads.max, threads.tunable) == (2, 2, False)
    assert threads.published == 2
    assert room.tunable
    assert room.max == 16


def test_the_tree_stands_for_the_pipeline() -> None:
    loader = StagedDataLoader(
        DataLoader(click_data(), batch_size=16, num_workers=2, prefetch_factor=3), Clicks(), **TUNED
    )
    buffer, stage, source = loader.model.nodes
    assert [node.name for node in (buffer, stage, source)] == ["buffer", "stage", "loader"]
    assert list(stage.inputs) == [source]
    assert source.parameters[PARALLELISM].published == 1  # one reader at a time, whatever the number of threads
    assert source.parameters[BUFFER_SIZE].published == 6  # what the loader's own processes read ahead
    assert not source.has_tunable_parameters()


def test_what_happens_is_recorded() -> None:
    loader = StagedDataLoader(numbers(50, rows=1000), **TUNED)
    assert len(list(loader)) == 50
    nodes = nodes_of(loader)
    assert [nodes[name].num_elements for name in ("loader", "stage", "buffer")] == [50, 50, 50]
    assert nodes["loader"].bytes_produced == nodes["stage"].bytes_consumed == 50 * 4000
    assert nodes["stage"].processing_time >= nodes["loader"].processing_time > 0
    assert loader.model is not None
    assert loader.model.compute_target_time_nsec() > 0


def test_staged_values_count_as_memory_too() -> None:
    """``x * 2 + 1`` is as large as ``x``."""
    model, loader = smart_stage(Scale(), numbers(20, rows=1000), **TUNED)
    for x in loader:
        model(x)
    assert nodes_of(loader)["stage"].bytes_produced == 20 * 8000


def test_what_was_chosen_lasts_over_epochs() -> None:
    loader = StagedDataLoader(numbers(5), name="epochs", **TUNED)
    list(loader)
    set_published(loader, 3, 5)
    iterator = iter(loader)
    next(iterator)
    assert iterator._epoch.pipeline.channel.capacity == 5
    assert len(iterator._epoch.pipeline.crew.threads()) == 3
    iterator.close()


def test_several_clients_are_tuned_together() -> None:
    loader = StagedDataLoader(numbers(300), num_clients=3, **TUNED)
    seen: list[list[int]] = [[], [], []]
    threads = [threading.Thread(target=lambda i=i: seen[i].extend(int(x[0]) for x in loader)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(sum(seen, [])) == list(range(300))
    assert loader.stats.batches == 300


def test_a_saved_model_begins_the_next_run_within_its_bounds(tmp_path: Path) -> None:
    first = StagedDataLoader(numbers(50), **TUNED)
    list(first)
    set_published(first, 6, 12)
    assert first.model is not None
    first.model.save(tmp_path / "model.json")
    warm = StagedDataLoader(numbers(50), warm_start=tmp_path / "model.json", max_num_threads=4, **TUNED)
    assert warm.stats.tuning is not None
    assert (warm.stats.tuning.num_threads, warm.stats.tuning.capacity) == (4, 12)
    fixed = StagedDataLoader(numbers(50), warm_start=tmp_path / "model.json", capacity=3, num_threads=AUTOTUNE)
    assert fixed.stats.tuning is not None
    assert (fixed.stats.tuning.num_threads, fixed.stats.tuning.capacity) == (6, 3)
    assert len(list(warm)) == len(list(fixed)) == 50


@pytest.mark.parametrize("content", [None, "{", "[]", '{"schema_version": 1, "nodes": {}}'])
def test_a_warm_start_from_no_saved_model_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "model.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(
        OptionError, match=r"^warm_start must be a file that loader\.model\.save\(path\) wrote\. Found: '.*model.json'"
    ):
        StagedDataLoader(numbers(5), warm_start=path, **TUNED)


@pytest.mark.parametrize("value", ["Infinity", '"x"', "[1]", "null"])
def test_a_warm_start_with_odd_values_is_refused(tmp_path: Path, value: str) -> None:
    loader = StagedDataLoader(numbers(5), **TUNED)
    assert loader.model is not None
    loader.model.save(tmp_path / "model.json")
    text = (tmp_path / "model.json").read_text()
    (tmp_path / "model.json").write_text(text.replace('"value": 2', f'"value": {value}'))
    with pytest.raises(OptionError, match="wrote"):
        StagedDataLoader(numbers(5), warm_start=tmp_path / "model.json", **TUNED)


def test_a_warm_start_from_the_model_of_another_pipeline_is_refused(tmp_path: Path) -> None:
    model = Model()
    model.add_node(torchstage.autotune.make_source_node, "files", None)
    model.save(tmp_path / "model.json")
    with pytest.raises(OptionError, match="wrote"):
        StagedDataLoader(numbers(5), warm_start=tmp_path / "model.json", **TUNED)


def test_the_statistics_say_what_was_tuned_when_and_why() -> None:
    loader = StagedDataLoader(Slow(60), **TUNED)
    list(loader)
    tuning = loader.stats.tuning
    assert tuning is not None
    assert tuning.changes[0].why.startswith("num_threads 1 -> 2: the step waits ")
    assert tuning.changes[0].num_threads == 2
    assert 8 <= tuning.changes[0].batch <= 40
    text = str(loader.stats)
    assert (
        f"tuned:             {tuning.num_threads} threads, capacity {tuning.capacity}; asked {tuning.asked} times"
        in text
    )
    assert f"batch {tuning.changes[0].batch}, " in text


class Slow:
    """A loader that the loop must wait for."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Any:
        for batch in numbers(self.count):
            time.sleep(0.002)
            yield batch


def test_without_anything_to_tune_there_is_no_model() -> None:
    loader = StagedDataLoader(numbers(5))
    assert loader.model is None
    assert len(list(loader)) == 5
    assert loader.stats.tuning is None
    assert "tuned" not in str(loader.stats)


@pytest.mark.parametrize("when", ["in the epoch", "before it"])
def test_a_thread_that_cannot_be_started_is_done_without(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """The system has no more: the batches come all the same, and nothing hangs."""
    loader = StagedDataLoader(numbers(300), name="few", **TUNED)
    iterator = iter(loader)
    if when == "in the epoch":
        next(iterator)
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("torchstage-few-") and thread.name != "torchstage-few-0":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    set_published(loader, 4, 4)
    with pytest.warns(torchstage.errors.TorchstageWarning, match="no more threads"):
        assert len(list(iterator)) == 300 - (when == "in the epoch")


@pytest.mark.parametrize("where", ["tick", "staged", "took", "begin"])
def test_a_flaw_in_the_tuner_does_not_cost_the_run(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def flawed(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Tuner, where, flawed)
    loader = StagedDataLoader(numbers(50), capacity=AUTOTUNE, num_threads=2)
    with pytest.warns(
        torchstage.errors.TorchstageWarning, match="tuning failed and is off until the next epoch: ZeroDivision"
    ):
        assert [int(x[0]) for x in loader] == list(range(50))


def test_batches_that_do_not_say_how_large_they_are_are_handed_on() -> None:
    sparse, nested = (
        torch.eye(3).to_sparse(),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    )
    loader = StagedDataLoader([sparse, nested, "text", None, {}] * 4, **TUNED)
    assert len(list(loader)) == 20
    assert nodes_of(loader)["stage"].bytes_produced == 0
