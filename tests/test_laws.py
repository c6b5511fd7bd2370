"""The laws of the design: one group of tests for each."""

import copy
import gc
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import torchstage
from tests.support import (
    Clicks,
    Scale,
    Words,
    as_array,
    assert_same,
    assert_same_training,
    click_data,
    click_loader,
    numbers,
    train,
    word_batches,
)
from torchstage.errors import EmptyStageWarning, FallbackWarning
from torchstage.loaders._staged import StagedIterator
from torchstage.loaders._tickets import Ticket

# ---------------------------------------------------------------- law 1: same numbers


@pytest.mark.parametrize("num_threads", [1, 2, 4])
@pytest.mark.parametrize("capacity", [1, 4, 16])
def test_law1_training_is_bit_equal_for_any_number_of_threads(num_threads: int, capacity: int) -> None:
    loader = assert_same_training(Clicks(), click_loader, num_threads=num_threads, capacity=capacity)
    assert loader.stats.staged_steps == loader.stats.batches == 14  # two epochs of seven batches, the last one short
    assert not loader.stats.fallbacks


def test_law1_text_columns_are_bit_equal() -> None:
    loader = assert_same_training(Words(), word_batches, num_threads=2, capacity=2)
    assert loader.stats.staged_steps == loader.stats.batches


def test_law1_text_arrays_are_bit_equal() -> None:
    batches = [(as_array(words), label) for words, label in word_batches()]
    loader = assert_same_training(Words(), lambda: batches)
    assert loader.stats.staged_steps == loader.stats.batches


def test_law1_eval_mode_gets_its_own_capture_and_is_equal() -> None:
    model = Clicks()
    twin = copy.deepcopy(model)
    data = click_data()
    staged, loader = torchstage.smart_stage(twin, DataLoader(data, 32), capacity=3)
    for training in (True, False, True):
        torch.manual_seed(5)
        model.train(training)
        plain = [model(dense, ids).detach() for dense, ids, _ in DataLoader(data, 32)]
        torch.manual_seed(5)
        staged.train(training)
        assert_same(plain, [staged(dense, ids).detach() for dense, ids, _ in loader])
        assert loader.plan is not None
        assert loader.plan.training is training
    assert_same(list(model.state_dict().values()), list(twin.state_dict().values()))
    assert not loader.stats.fallbacks


def test_law1_shuffling_draws_the_same_seed_as_the_plain_loader() -> None:
    """The sampler's seed comes from the global stream at the first batch, between the model's own draws."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return (dense.sum(1) + ids.sum(1).float() + torch.rand(dense.shape[0])) * self.weight

    loader = assert_same_training(Noisy(), click_loader, epochs=3, num_threads=2, capacity=4)
    assert loader.plan is not None
    assert loader.plan.lifted


def test_law1_workers_processes_of_the_users_loader_are_fine() -> None:
    def make() -> DataLoader[Any]:
        return DataLoader(click_data(), batch_size=32, shuffle=True, num_workers=1)

    assert_same_training(Clicks(), make, epochs=1, capacity=2)


def test_law1_frozen_state_is_read_ahead_and_stays_equal_when_the_user_changes_it() -> None:
    class Normed(Scale):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.exp() - self.mean).relu() * self.weight

    def steps(model: Any, loader: Any) -> list[torch.Tensor]:
        outputs, batches = [], iter(loader)
        for step, x in enumerate(batches):
            outputs.append(model(x).detach())
            if step % 4 == 3:
                while isinstance(batches, StagedIterator) and step < 36 and not batches._epoch.pipeline.channel.ready:
                    time.sleep(0.001)  # until a batch was staged with the old value
                with torch.no_grad():
                    model.mean.add_(0.25)
        return outputs

    model = Normed()
    plain = steps(copy.deepcopy(model), numbers(40))
    staged, loader = torchstage.smart_stage(model, numbers(40), capacity=4)
    with pytest.warns(FallbackWarning, match=r"frozen state changed \(mean\)"):
        assert_same(plain, steps(staged, loader))
    assert loader.stats.fallbacks["frozen state changed"] >= 2
    assert loader.plan is not None
    learnt = next(node for node in loader.plan.nodes if node.name == "sub")
    assert learnt.why() == "reads state that changes while batches wait: `mean`"


# ---------------------------------------------------------------- law 2: never wrong, at worst not faster


def test_law2_evaluation_on_raw_batches_between_staged_steps_is_simply_right() -> None:
    model = Clicks()
    twin = copy.deepcopy(model)
    data = click_data()
    dense, ids, _ = data[:10]

    def steps(model: nn.Module, loader: Any) -> list[torch.Tensor]:
        outputs = []
        for d, i, _ in loader:
            outputs.append(model(d, i).detach())
            model.eval()
            with torch.no_grad():
                outputs.append(model(dense, ids))
            model.train()
        return outputs

    torch.manual_seed(1)
    plain = steps(model, DataLoader(data, 32))
    torch.manual_seed(1)
    staged, loader = torchstage.smart_stage(twin, DataLoader(data, 32), capacity=4, num_threads=2)
    assert_same(plain, steps(staged, loader))
    assert loader.stats.staged_steps == 7
    assert dict(loader.stats.fallbacks) == {"raw batch": 7}


# ---------------------------------------------------------------- law 3: the user's objects stay the user's


def test_law3_the_model_is_shared_and_not_patched() -> None:
    model = Clicks()
    before, kind = dict(vars(model)), type(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    staged, loader = torchstage.smart_stage(model, click_loader())
    assert isinstance(staged, Clicks)
    assert list(staged.state_dict()) == list(Clicks().state_dict())
    assert [id(p) for p in staged.parameters()] == [id(p) for p in model.parameters()]
    for dense, ids, label in loader:
        nn.functional.mse_loss(staged(dense, ids), label).backward()
        optimizer.step()
        break
    assert type(model) is kind
    assert vars(model) == before
    assert "forward" not in vars(model)
    assert torchstage.unwrap(staged) is model


def test_law3_the_staged_model_has_the_models_attributes_methods_and_flags() -> None:
    model = Clicks()
    staged, _ = torchstage.smart_stage(model, click_loader())
    staged.eval()
    assert not model.training
    staged.scale = 3.0  # type: ignore[assignment]
    assert model.scale == 3.0
    staged.load_state_dict(Clicks().state_dict())
    assert repr(staged) == repr(model)
    clone = copy.deepcopy(staged)
    assert type(clone) is Clicks
    assert clone.tables[0].weight is not model.tables[0].weight


def test_law3_hooks_on_the_model_run_once() -> None:
    model = Scale()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    staged, loader = torchstage.smart_stage(model, numbers(5))
    for x in loader:
        staged(x)
    assert len(calls) == 5
    assert loader.stats.staged_steps == 5


# ---------------------------------------------------------------- law 4: nothing lost, nothing doubled, in order


@pytest.mark.parametrize("num_threads", [1, 3, 8])
def test_law4_batches_arrive_in_order_each_once(num_threads: int) -> None:
    _, loader = torchstage.smart_stage(Scale(), numbers(100), num_threads=num_threads, capacity=3)
    for _ in range(2):
        assert [int(x[0]) for x in loader] == list(range(100))


def test_law4_a_generator_goes_on_after_a_break_without_losing_a_batch() -> None:
    generator = iter(numbers(30))
    loader = torchstage.StagedDataLoader(generator, num_threads=3, capacity=4)
    seen: list[int] = []
    while len(seen) < 30:
        for x in loader:
            seen.append(int(x[0]))
            if len(seen) % 7 == 0:
                break
    assert seen == list(range(30))


# ---------------------------------------------------------------- law 5: errors arrive


class Failing(IterableDataset[torch.Tensor]):
    def __init__(self, at: int, error: BaseException, count: int = 6) -> None:
        self.at, self.error, self.count = at, error, count

    def __iter__(self) -> Iterator[torch.Tensor]:
        for i in range(self.count):
            if i == self.at:
                raise self.error
            yield torch.full((3,), float(i))


@pytest.mark.parametrize("at", [0, 3, 5])
@pytest.mark.parametrize("error", [OSError("disk"), KeyError("x"), MemoryError(), SystemExit(3)])
def test_law5_an_error_of_the_loader_arrives_at_its_batch(at: int, error: BaseException) -> None:
    if at == 0 and isinstance(error, SystemExit):
        pytest.skip("the first batch is read on the training thread, where SystemExit needs no carrying")
    _, loader = torchstage.smart_stage(Scale(), Failing(at, error), num_threads=2, capacity=2)
    seen = []
    with pytest.raises(type(error)) as caught:
        for x in loader:
            seen.append(int(x[0]))
    assert seen == list(range(at))
    assert caught.value is error
    assert any("Failing" in str(f.path) or f.name == "__iter__" for f in caught.traceback)
    if at != 0:
        assert f"for batch {at}" in "".join(caught.value.__notes__)


def test_law5_an_error_in_the_stage_names_batch_and_node() -> None:
    class Strict(Scale):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(3, 1).sum(1) * self.weight + x.log()[2]

    batches = [*numbers(4), torch.zeros(5), *numbers(2)]
    staged, loader = torchstage.smart_stage(Strict(), batches, num_threads=2, capacity=2)
    seen = 0
    with pytest.raises(RuntimeError, match="shape") as caught:
        for x in loader:
            staged(x)
            seen += 1
    assert seen == 4
    notes = "\n".join(caught.value.__notes__)
    assert "batch 4" in notes
    assert "node `view` from test_laws.py" in notes
    assert [int(x[0]) for x in torchstage.StagedDataLoader(numbers(3))] == [0, 1, 2]


def test_law5_the_loader_can_be_iterated_again_after_an_error() -> None:
    class Flaky:
        def __init__(self) -> None:
            self.fail = True

        def __iter__(self) -> Iterator[torch.Tensor]:
            yield from numbers(2)
            if self.fail:
                self.fail = False
                raise OSError("once")
            yield torch.full((3,), 2.0)

    loader = torchstage.StagedDataLoader(Flaky(), capacity=2)
    with pytest.raises(OSError, match="once"):
        list(loader)
    assert [int(x[0]) for x in loader] == [0, 1, 2]


# ---------------------------------------------------------------- law 6: everything stops


def staged_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("torchstage-")]


@pytest.mark.parametrize("way", ["exhaustion", "break", "exception", "close", "del", "collection"])
def test_law6_threads_end_however_the_loop_ends(way: str) -> None:
    _, loader = torchstage.smart_stage(Scale(), numbers(50), num_threads=4, capacity=2)
    iterator = iter(loader)
    next(iterator)
    if way == "exhaustion":
        list(iterator)
    elif way == "break":
        for _ in loader:
            assert staged_threads()
            break
        iterator.close()
    elif way == "exception":
        with pytest.raises(ZeroDivisionError):
            for _ in iterator:
                raise ZeroDivisionError
        iterator.close()
    elif way == "close":
        loader.close()
        with pytest.raises(torchstage.errors.TorchstageError, match="this iteration was closed"):
            next(iterator)
    elif way == "del":
        del iterator
    else:
        cycle: list[Any] = [iterator, loader]
        cycle.append(cycle)
        reference = weakref.ref(loader)
        del iterator, loader, cycle
        gc.collect()
        assert reference() is None
    assert not staged_threads()


def run_script(script: str) -> subprocess.CompletedProcess[str]:
    code = textwrap.dedent(script)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_law6_the_process_exits_with_work_in_flight() -> None:
    done = run_script("""
        import torch, torchstage
        loader = torchstage.StagedDataLoader((torch.zeros(3) for _ in range(10**9)), num_threads=3, capacity=2)
        iterator = iter(loader)
        next(iterator)
        print("leaving")
    """)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "leaving", "")


def test_law6_a_loader_that_hangs_is_named_and_cannot_keep_the_process() -> None:
    done = run_script("""
        import threading, torch, torchstage

        def hangs():
            yield torch.zeros(3)
            threading.Event().wait()

        loader = torchstage.StagedDataLoader(hangs(), name="slow")
        iterator = iter(loader)
        next(iterator)
        loader._shared._epochs[0].pipeline.stop(timeout=0.2)
        print("leaving")
    """)
    assert (done.returncode, done.stdout.strip()) == (0, "leaving")
    assert "'torchstage-slow-0' did not stop within 0.2 s; it hangs at" in done.stderr


def test_law6_ctrl_c_while_waiting_is_raised_in_the_loop() -> None:
    done = run_script("""
        import os, signal, threading, torch, torchstage

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
        waiting = threading.Event()
        def slow():
            yield torch.zeros(3)
            waiting.set()
            threading.Event().wait(1)

        loader = torchstage.StagedDataLoader(slow())
        def interrupt():
            waiting.wait()
            os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=interrupt, daemon=True).start()
        try:
            for x in loader:
                pass
        except KeyboardInterrupt:
            print("interrupted")
    """)
    assert done.stdout.strip() == "interrupted"
    assert done.returncode == 0


# ---------------------------------------------------------------- law 7: memory is bounded


@pytest.mark.parametrize(("capacity", "num_threads"), [(1, 1), (3, 1), (2, 4)])
def test_law7_no_more_than_capacity_plus_threads_batches_are_read_ahead(capacity: int, num_threads: int) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    read = 0
    reached = threading.Event()
    bound = capacity + num_threads

    def batches() -> Iterator[torch.Tensor]:
        nonlocal read
        for i in range(40):
            batch = torch.full((4,), float(i))
            read += 1
            if read == 1 + bound:
                reached.set()
            yield batch

    staged, loader = torchstage.smart_stage(Scale(), batches(), capacity=capacity, num_threads=num_threads)
    taken = 0
    for x in loader:
        taken += 1
        alive.add(x)
        staged(x).sum().backward()
        if taken == 1:
            assert reached.wait(10)  # the first batch is taken, and as many more as may be in flight are read
        assert read <= taken + bound
        del x
        assert len(alive) == 0  # neither the ticket nor the registry keeps a batch that was dropped


class Hashed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(10))

    def forward(self, names: list[str], weights: torch.Tensor) -> torch.Tensor:
        return self.table[torchstage.ops.string_to_hash_bucket(names, 10)] * weights


def test_law7_text_that_was_dropped_is_freed_by_the_stage_and_at_the_end_of_the_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tickets: weakref.WeakSet[Ticket] = weakref.WeakSet()
    fill = Ticket.fill

    def watched(self: Ticket, *args: Any) -> None:
        tickets.add(self)
        fill(self, *args)

    monkeypatch.setattr(Ticket, "fill", watched)
    staged, loader = torchstage.smart_stage(Hashed(), [(["a", "b"], torch.ones(2)) for _ in range(30)])
    seen = 0
    for names, weights in loader:
        staged(names, weights).sum().backward()
        del names, weights
        seen = max(seen, len(tickets))
    loader.close()
    assert seen <= 4  # taken, waiting, in the worker's hands, and the one that it frees next
    gc.collect()
    assert len(tickets) == 0


# ---------------------------------------------------------------- law 8: it can say why


def test_law8_the_plan_names_reason_cause_and_line_of_every_operation() -> None:
    staged, loader = torchstage.smart_stage(Clicks(), click_loader())
    assert loader.plan is None
    for dense, ids, _ in loader:
        staged(dense, ids)
        break
    plan = loader.plan
    assert plan is not None
    why = {node.name: node for node in plan.nodes}
    assert why["hash_bucket"].lifted
    assert why["add_"].why() == "writes in place"
    assert why["norm"].why() == "updates the model's own state: its running statistics"
    ahead = "gathers rows of a trained table, which are gathered ahead and repaired in the step"
    assert why["tables_0"].why() == f"{ahead}: `tables.0.weight`"
    assert not why["tables_0"].lifted
    assert (plan.tables[0].name, plan.tables[0].ahead) == ("tables.0.weight", ("tables_0",))
    assert why["cat"].why() == "depends on work of the step (because of `tables_0`)"
    assert why["drop"].why() == "draws random numbers, whose order must be kept"
    assert all(node.source.startswith("support.py:") for node in plan.nodes)
    assert "values that cross to the step: " in str(plan)


def test_law8_an_empty_prefix_says_why_and_still_prefetches() -> None:
    model = nn.Sequential(nn.Linear(3, 1))
    staged, loader = torchstage.smart_stage(model, numbers(4))
    with pytest.warns(EmptyStageWarning, match=r"`_0` at .* reads a trained parameter: `0.weight`.*still prefetched"):
        outputs = [staged(x).detach() for x in loader]
    assert_same([model(x).detach() for x in numbers(4)], outputs)
    assert loader.stats.batches == 4


def test_law8_stats_say_how_to_read_them() -> None:
    staged, loader = torchstage.smart_stage(Scale(), numbers(6), name="scale")
    train(staged, loader, epochs=1, call=lambda model, x: (model(x), x))
    text = str(loader.stats)
    assert text.startswith("stage scale: 6 batches, 6 staged steps")
    assert "near zero: staging keeps ahead" in text
