"""When a batch's slot in the buffer is free: a test per clause of `torchstage.loaders._slot`, on a clock of the test's own."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import torchstage
from torchstage.loaders._slot import Habit, Slot


class Loop:
    """A training loop that says when its slots were freed."""

    def __init__(self) -> None:
        self.now = 0.0
        self.frees = 0
        self.slot = Slot(self.free, lambda: self.now)
        self.slot.staged(0.004)
        self.weight = nn.Parameter(torch.ones(2))
        self.optimizer = torch.optim.SGD([self.weight], lr=0.1)

    def free(self) -> None:
        self.frees += 1

    def forward(self, wrap: Callable[[torch.Tensor], Any] = lambda output: output) -> torch.Tensor:
        """Ask for a batch and run the forward; return the loss."""
        self.slot.asked()
        self.frees = 0
        done = self.slot.left()
        output = self.weight * 2
        result = wrap(output)
        assert self.frees == 0
        done(result)
        return output.sum()

    def step(self, after: float = 0.001, pause: float = 0.0) -> str:
        """Run a step and say what freed its slot.

        Args:
            after: seconds from its forward to its backward.
            pause: seconds from its optimizer's step to its end.
        """
        loss = self.forward()
        freed = "forward" if self.frees else ""
        self.now += after
        loss.backward()
        freed = freed or ("backward" if self.frees else "")
        self.now += 0.001
        self.optimizer.step()
        freed = freed or ("optimizer" if self.frees else "")
        self.now += pause
        return freed

    def steps(self, count: int, after: float = 0.001, pause: float = 0.0) -> set[str]:
        return {self.step(after, pause) for _ in range(count)}


SEEN = Habit.SEEN


def settled(pause: float = 0.0) -> Loop:
    loop = Loop()
    loop.steps(SEEN, pause=pause)
    return loop


def test_1_a_slot_is_kept_while_the_forward_runs() -> None:
    loop = Loop()
    assert loop.slot.keep
    loop.forward()  # asserts it
    assert loop.frees == 1


def test_2_it_is_free_at_the_forwards_end_until_a_habit_was_seen() -> None:
    assert Loop().steps(SEEN) == {"forward"}


def test_2_what_comes_late_is_no_habit() -> None:
    loop = Loop()
    assert loop.steps(2) | loop.steps(1, after=0.006) | loop.steps(3) == {"forward"}
    assert loop.step() == "backward"


def test_3_then_it_is_free_when_the_backward_begins() -> None:
    assert settled().steps(5) == {"backward"}


@pytest.mark.parametrize(
    "wrap",
    [lambda x: (x, None), lambda x: [3, x], lambda x: {"loss": x}, lambda x: (x.detach(), x), lambda x: (x * 3, x)],
    ids=["tuple", "list", "dict", "second", "one of two"],
)
def test_3_the_tensor_may_be_in_a_container(wrap: Callable[[torch.Tensor], Any]) -> None:
    loop = settled()
    loss = loop.forward(wrap)
    assert loop.frees == 0
    loss.backward()
    assert loop.frees == 1


def test_3_a_second_backward_through_the_graph_frees_nothing() -> None:
    loop = settled()
    loss = loop.forward()
    loss.backward(retain_graph=True)
    loop.slot.asked()
    loop.slot.left()
    loss.backward()
    assert loop.frees == 1


def test_4_where_the_loop_pauses_it_is_free_when_the_optimizer_is_done() -> None:
    assert settled(pause=0.0041).steps(5, pause=0.0041) == {"optimizer"}


def test_4_also_where_backwards_come_late() -> None:
    loop = Loop()
    assert loop.steps(SEEN, after=1.0, pause=1.0) == {"forward"}
    assert loop.step(after=1.0, pause=1.0) == "optimizer"


def test_4_the_pause_has_to_be_longer_than_staging_a_batch() -> None:
    assert settled(pause=0.0039).steps(5, pause=0.0039) == {"backward"}
    loop = settled(pause=0.0041)
    loop.slot.staged(1.0)  # something was in the way
    assert loop.steps(2, pause=0.0041) == {"optimizer"}
    for _ in range(Slot.LATEST):
        loop.slot.staged(0.005)  # batches have become larger
    assert loop.steps(2, pause=0.0041) == {"backward"}


def test_4_nothing_is_known_before_a_batch_was_staged() -> None:
    loop = Loop()
    loop.slot = Slot(loop.free, lambda: loop.now)
    loop.steps(SEEN, pause=1.0)
    assert loop.step(pause=1.0) == "backward"


def test_4_an_optimizer_of_another_thread_does_not_count() -> None:
    loop = settled(pause=1.0)
    loss = loop.forward()
    loss.backward()
    thread = threading.Thread(target=loop.optimizer.step)
    thread.start()
    thread.join()
    assert loop.frees == 0
    loop.optimizer.step()
    assert loop.frees == 1


@pytest.mark.parametrize("late", [True, False], ids=["late", "missing"])
def test_5_a_step_that_does_not_keep_to_it_ends_it_and_more_are_wanted_then(late: bool) -> None:
    loop = settled()
    if late:
        assert loop.step(after=Slot.SOON + 0.001) == "backward"
    else:
        loop.forward()
    assert loop.steps(2 * SEEN) == {"forward"}
    assert loop.step() == "backward"


def test_5_without_the_pause_it_goes_back_to_the_backward() -> None:
    loop = settled(pause=1.0)
    assert [loop.step(), loop.step()] == ["optimizer", "backward"]
    assert loop.steps(2 * SEEN, pause=1.0) == {"backward"}
    assert loop.step() == "optimizer"


def test_5_after_enough_steps_it_begins_anew() -> None:
    habit = Habit()
    for did in [True] * 3 + [False] + [True] * (6 + Habit.ENOUGH) + [False] + [True] * 5:
        habit.note(did)
    assert not habit.holds
    habit.note(True)
    assert habit.holds


def test_5_there_is_a_most() -> None:
    habit = Habit()
    for _ in range(12):
        while not habit.holds:
            habit.note(True)
        habit.note(False)
    steps = 0
    while not habit.holds:
        habit.note(True)
        steps += 1
    assert steps == Habit.MOST


def test_6_a_result_without_a_gradient_frees_it_and_counts_for_nothing() -> None:
    loop = settled()
    results: list[Any] = [torch.ones(2), None, "text", [torch.ones(2)], {}]
    for result in results:
        loop.slot.asked()
        loop.frees = 0
        loop.slot.left()(result)
        assert loop.frees == 1
    assert loop.step() == "backward"


def test_7_a_loop_that_does_not_run_the_model_keeps_no_slot() -> None:
    loop = settled()
    loop.slot.asked()
    loop.slot.left()
    assert loop.slot.keep
    loop.slot.asked()
    assert not loop.slot.keep


def test_8_a_graph_that_is_kept_does_not_keep_the_buffer() -> None:
    loop = settled()
    loss = loop.forward()
    watch = weakref.ref(loop.slot)
    del loop.slot
    gc.collect()
    assert watch() is None
    loss.backward()


class Linear(nn.Module):
    """A prefix and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return one number a row."""
        output: torch.Tensor = self.layer(x.double().sin().float())
        return output


class Reads:
    """Batches, and how many have been read."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.read = 0
        self.changed = threading.Condition()

    def __iter__(self) -> Iterator[torch.Tensor]:
        for index in range(self.count):
            with self.changed:
                self.read += 1
                self.changed.notify_all()
            yield torch.randn(8, 4, generator=torch.Generator().manual_seed(index))

    def reached(self, count: int, timeout: float) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: self.read >= count, timeout)


def test_3_in_a_loop_the_next_batch_is_read_when_the_backward_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slot, "SOON", 60.0)
    reads = Reads(20)
    staged, loader = torchstage.smart_stage(Linear(), reads, capacity=1, bypass=False)
    iterator = iter(loader)
    for _ in range(SEEN):
        staged(next(iterator)).sum().backward()
    loss = staged(next(iterator)).sum()
    taken = SEEN + 1
    assert reads.reached(taken + 1, 10)  # one waits for the slot in its worker's hand
    assert not reads.reached(taken + 2, 0.05)
    loss.backward()
    assert reads.reached(taken + 2, 10)
    iterator.close()


def test_4_in_a_loop_the_next_batch_is_read_when_the_optimizer_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slot, "staged", lambda slot, seconds: slot._staging.append(0.0))
    reads = Reads(20)
    staged, loader = torchstage.smart_stage(Linear(), reads, capacity=1, bypass=False)
    optimizer = torch.optim.SGD(staged.parameters(), lr=0.1)
    iterator = iter(loader)
    for _ in range(SEEN):
        staged(next(iterator)).sum().backward()
        optimizer.step()
    staged(next(iterator)).sum().backward()
    taken = SEEN + 1
    assert reads.reached(taken + 1, 10)
    assert not reads.reached(taken + 2, 0.05)
    optimizer.step()
    assert reads.reached(taken + 2, 10)
    iterator.close()


def train(model: nn.Module, batches: Any) -> list[torch.Tensor]:
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    seen = []
    for x in batches:
        output = model(x)
        optimizer.zero_grad()
        output.square().mean().backward()
        optimizer.step()
        seen += [output.detach(), *[parameter.grad.clone() for parameter in parameters if parameter.grad is not None]]
    return seen + [parameter.detach().clone() for parameter in parameters]


def test_training_that_holds_workers_back_is_the_plain_one() -> None:
    torch.manual_seed(0)
    plain = Linear()
    torch.manual_seed(0)
    staged, loader = torchstage.smart_stage(Linear(), Reads(20), bypass=False)
    expected, found = train(plain, Reads(20)), train(staged, loader)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert loader.stats.staged_steps == 20
