"""Traps for lookups from trained tables: loops that train, write and replace tables in every way that a script might.

Each job runs plain and staged (`tests.test_lookups.check`), and every step must be bit for bit the same. Where rows that
were gathered ahead can be used, it is asserted that they were.
"""

import functools
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import torchstage
from tests.test_lookups import (
    FORMS,
    ROWS,
    Batch,
    Job,
    Seen,
    assert_equal,
    bag,
    check,
    data,
    embedding,
    kept,
    loss_of,
    model,
    note,
    sgd,
    snapshot,
    trained,
    used,
)
from torchstage.errors import TorchstageWarning
from torchstage.loaders._rows import Rows
from torchstage.loaders._tables import Reading

pytestmark = [  # torch warns of these once in a process, whoever comes first
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]


@pytest.fixture(scope="module", autouse=True)
def _what_the_first_optimizer_imports() -> None:
    """Out of the garbage collector's sight, as in conftest.py: it would look through it after every test."""
    sgd(nn.Linear(1, 1))[0].zero_grad()
    gc.collect()
    gc.freeze()


# ---------------------------------------------------------------- how a loop may train


def accumulating(net: Any, loader: Any) -> Seen:
    (optimizer,) = sgd(net)
    seen: Seen = []
    for step, batch in enumerate(loader):
        output = net(*batch)
        loss_of(output).backward()
        note(seen, net, output)
        if step % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    return seen


def backward_twice(net: Any, loader: Any) -> Seen:
    (optimizer,) = sgd(net)
    seen: Seen = []
    for batch in loader:
        output = net(*batch)
        loss_of(output).backward(retain_graph=True)
        output.sum().backward()
        note(seen, net, output)
        optimizer.step()
        optimizer.zero_grad()
    return seen


def backward_across_a_step(net: Any, loader: Any) -> Seen:
    """The second backward of a lookup comes after a step: its rows are written with no lookup on record."""
    (optimizer,) = sgd(net)
    seen: Seen = []
    for batch in loader:
        looked = net(*batch)
        looked.sum().backward(retain_graph=True, inputs=[net.e.weight])
        optimizer.step()
        optimizer.zero_grad()
        (looked.sum() * 0.5).backward(inputs=[net.e.weight])
        note(seen, net, looked)
        optimizer.step()
        optimizer.zero_grad()
    return seen


def backward_later(net: Any, loader: Any) -> Seen:
    """Forwards run two batches ahead of their backwards and steps."""
    (optimizer,) = sgd(net)
    seen: Seen = []
    waiting: list[torch.Tensor] = []
    for batch in loader:
        waiting.append(net(*batch))
        if len(waiting) == 3:
            optimizer.zero_grad()
            output = waiting.pop(0)
            (grad,) = torch.autograd.grad(output.sum(), [net.e.weight])
            net.e.weight.grad = grad
            note(seen, net, output)
            optimizer.step()
    return seen


def several_optimizers(net: Any, loader: Any) -> Seen:
    first, second = SGD([net.e.weight], lr=0.05), SGD([net.e.weight, *net.out.parameters()], lr=0.02)
    seen: Seen = []
    for step, batch in enumerate(loader):
        output = net(*batch)
        loss_of(output).backward()
        note(seen, net, output)
        first.step()
        if step % 2:
            second.step()
        net.zero_grad()
    return seen


def one_group_with_momentum(net: Any) -> list[Optimizer]:
    groups = [{"params": [net.e.weight], "lr": 0.2}, {"params": net.out.parameters(), "momentum": 0.9}]
    return [SGD(groups, lr=0.05)]


def momentum_of_the_table(net: Any) -> list[Optimizer]:
    groups = [{"params": [net.e.weight], "momentum": 0.9}, {"params": net.out.parameters(), "lr": 0.2}]
    return [SGD(groups, lr=0.05)]


def momentum_that_comes_and_goes(net: Any, loader: Any) -> Seen:
    (optimizer,) = sgd(net)

    def between(step: int, _: Any) -> None:
        optimizer.param_groups[0]["momentum"] = 0.9 if 2 <= step < 5 else 0.0

    return trained(net, loader, lambda _: [optimizer], between)


def group_that_is_added(net: Any, loader: Any) -> Seen:
    optimizer = SGD(net.out.parameters(), lr=0.1)

    def between(step: int, _: Any) -> None:
        if step == 3:
            optimizer.add_param_group({"params": [net.e.weight], "lr": 0.3})

    return trained(net, loader, lambda _: [optimizer], between)


def scaled(net: Any, loader: Any) -> Seen:
    (optimizer,) = sgd(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
    seen: Seen = []
    for step, batch in enumerate(loader):
        optimizer.zero_grad()
        output = net(*batch)
        loss = loss_of(output) * (float("inf") if step % 4 == 2 else 1.0)
        scaler.scale(loss).backward()
        note(seen, net, output)
        scaler.step(optimizer)  # not for every fourth batch
        scaler.update()
    note(seen, net)
    return seen


def with_closures(kind: Any, **options: Any) -> Job:
    def job(net: Any, loader: Any) -> Seen:
        optimizer = kind(net.parameters(), **options)
        seen: Seen = []
        for batch in loader:

            def closure(batch: Any = batch) -> torch.Tensor:
                optimizer.zero_grad()
                output = net(*batch)
                loss = loss_of(output)
                loss.backward()
                note(seen, net, output)
                return loss

            optimizer.step(closure)
        note(seen, net)
        return seen

    return job


def closure_that_writes(net: Any, loader: Any) -> Seen:
    """A closure runs inside the step, in which the table's version is not looked at."""
    (optimizer,) = sgd(net)
    seen: Seen = []
    for batch in loader:
        optimizer.zero_grad()
        output = net(*batch)
        loss_of(output).backward()
        note(seen, net, output)

        def closure() -> float:
            with torch.no_grad():
                net.e.weight.mul_(0.9)
            return 0.0

        optimizer.step(closure=closure)
    return seen


def changing_gradients(change: Callable[[Any], object]) -> Job:
    def job(net: Any, loader: Any) -> Seen:
        (optimizer,) = sgd(net)
        seen: Seen = []
        for batch in loader:
            optimizer.zero_grad()
            output = net(*batch)
            loss_of(output).backward()
            change(net)
            note(seen, net, output)
            optimizer.step()
        note(seen, net)
        return seen

    return job


def clip_sparse(net: Any) -> None:
    net.e.weight.grad = net.e.weight.grad.coalesce()
    nn.utils.clip_grad_norm_(net.out.parameters(), 0.1)
    norm = net.e.weight.grad._values().norm()
    net.e.weight.grad._values().mul_((0.01 / norm).clamp_max(1))


def other_rows(net: Any) -> None:
    """As another rank's rows would: the gradient is of rows that no lookup of this process has."""
    grad = net.e.weight.grad
    indices, values = grad._indices().flip(1).add(37).remainder(ROWS), grad._values()
    net.e.weight.grad = torch.sparse_coo_tensor(indices, values, grad.shape)


def set_entries(net: Any) -> None:
    net.e.weight.grad = net.e.weight.grad.to_dense().to_sparse()  # sparse in both dimensions


def never_zeroed(net: Any, loader: Any) -> Seen:
    (optimizer,) = sgd(net)
    seen: Seen = []
    for batch in loader:
        output = net(*batch)
        loss_of(output).backward()
        note(seen, net, output)
        optimizer.step()
    return seen


def zeroed(set_to_none: bool) -> Job:
    def job(net: Any, loader: Any) -> Seen:
        (optimizer,) = sgd(net)
        seen: Seen = []
        for batch in loader:
            output = net(*batch)
            loss_of(output).backward()
            note(seen, net, output)
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
            optimizer.step()  # of gradients that are gone, or zero
        return seen

    return job


def step_in_backward(net: Any, loader: Any) -> Seen:
    optimizers = {p: SGD([p], lr=0.1) for p in net.parameters()}

    def at_once(p: Any) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    handles = [p.register_post_accumulate_grad_hook(at_once) for p in net.parameters()]
    seen: Seen = []
    for batch in loader:
        output = net(*batch)
        loss_of(output).backward()
        note(seen, net, output)
    for handle in handles:
        handle.remove()
    return seen


def gradient_hook(net: Any, loader: Any) -> Seen:
    calls: list[tuple[int, ...]] = []

    def halve(grad: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(grad.shape))
        return grad * 0.5

    handle = net.e.weight.register_hook(halve)
    seen = trained(net, loader)
    handle.remove()
    return [*seen, ("calls", calls)]


def step_that_raises(net: Any, loader: Any) -> Seen:
    """The table is written before the optimizer comes to the group that it cannot update."""
    optimizer = SGD([{"params": [net.e.weight]}, {"params": net.out.parameters()}], lr=0.1)
    seen: Seen = []
    for step, batch in enumerate(loader):
        optimizer.zero_grad()
        output = net(*batch)
        loss_of(output).backward()
        note(seen, net, output)
        if step % 3 == 1:
            optimizer.param_groups[1]["lr"] = None
            with pytest.raises(TypeError):
                optimizer.step()
            optimizer.param_groups[1]["lr"] = 0.1
        else:
            optimizer.step()
    return seen


def ids_written_before_the_step(net: Any, loader: Any) -> Seen:
    """A sparse gradient's row numbers are the batch's own memory: who writes there changes which rows are written."""
    (optimizer,) = sgd(net)
    seen: Seen = []
    for batch in loader:
        optimizer.zero_grad()
        output = net(*batch)
        loss_of(output).backward()
        batch[0].add_(7).remainder_(ROWS)
        note(seen, net, output)
        optimizer.step()
    return seen


def copies() -> Iterator[Any]:
    """Give batches that the loop may write without the next run seeing it."""
    return (tuple(part.clone() for part in batch) for batch in data(16))


LOOPS: dict[str, tuple[Job, bool]] = {  # and whether most lookups can use rows that were gathered ahead
    "gradients accumulated over three batches": (accumulating, True),
    "two backward passes through a batch": (backward_twice, True),
    "backward passes before and after a step": (backward_across_a_step, True),
    "backward passes two batches later": (backward_later, True),
    "two optimizers of one table": (several_optimizers, True),
    "groups, momentum elsewhere": (functools.partial(trained, make=one_group_with_momentum), True),
    "groups, momentum of the table": (functools.partial(trained, make=momentum_of_the_table), False),
    "momentum that comes and goes": (momentum_that_comes_and_goes, False),
    "group that is added": (group_that_is_added, True),
    "GradScaler that skips steps": (scaled, True),
    "SGD with closure": (with_closures(SGD, lr=0.1), False),
    "Adagrad with closure": (with_closures(Adagrad, lr=0.1), False),
    "LBFGS": (with_closures(LBFGS, lr=0.1, max_iter=3), False),
    "closure that writes": (closure_that_writes, False),
    "scaled gradients": (changing_gradients(lambda net: net.e.weight.grad.mul_(0.5)), True),
    "coalesced gradients": (
        changing_gradients(lambda net: setattr(net.e.weight, "grad", net.e.weight.grad.coalesce())),
        True,
    ),
    "clipped gradients": (changing_gradients(clip_sparse), True),
    "gradients of other rows": (changing_gradients(other_rows), True),
    "gradients that are made dense": (
        changing_gradients(lambda net: setattr(net.e.weight, "grad", net.e.weight.grad.to_dense())),
        False,
    ),
    "gradients sparse in both dimensions": (changing_gradients(set_entries), True),
    "gradients that are removed": (changing_gradients(lambda net: setattr(net.e.weight, "grad", None)), True),
    "no zero_grad": (never_zeroed, True),
    "zero_grad to None": (zeroed(True), True),
    "zero_grad to zero": (zeroed(False), True),
    "optimizer in the backward pass": (step_in_backward, True),
    "hook on the table's gradient": (gradient_hook, True),
    "step that raises midway": (step_that_raises, False),
    "row numbers written between backward and step": (ids_written_before_the_step, True),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_way_to_train(name: str) -> None:
    """One thread and three; ``copies``, since a batch of a list that is written stays so for the second of the runs."""
    job, row_local = LOOPS[name]
    for num_threads in (1, 3):
        loader = check(model(), job, make=copies, num_threads=num_threads)
        assert used(loader) >= (8 if row_local else 1)


def test_a_table_of_three_lookups_of_which_two_get_gradients() -> None:
    def look(self: Any, b: Batch) -> Any:
        return self.e(b.ids) * self.e(b.bags).detach().mean() + self.e(b.ids.flip(0)) * 0

    assert used(check(model(look), num_threads=2)) == 3 * 16


def test_dense_gradients_that_are_clipped() -> None:
    def job(net: Any, loader: Any) -> Seen:
        optimizer = Adam(net.parameters(), lr=0.01)
        seen: Seen = []
        for batch in loader:
            optimizer.zero_grad()
            output = net(*batch)
            loss_of(output).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.01)
            nn.utils.clip_grad_value_(net.parameters(), 0.001)
            note(seen, net, output)
            optimizer.step()
        return seen

    check(model(setup=embedding()), job)


# ---------------------------------------------------------------- writes that no step of a gradient makes


class Decays(SGD):
    """Like SGD, but all rows shrink."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(0.99)
        return result


class WritesData(Optimizer):
    """An optimizer in the old style, which leaves no trace in the versions and writes rows that have no gradient."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad.to_dense(), alpha=-0.1)
                    p.data[::2].mul_(0.9)


class Lookahead:
    """A wrapper that is no `Optimizer`: it moves the parameters towards slow ones after every second step."""

    def __init__(self, net: nn.Module) -> None:
        self.inner = SGD(net.parameters(), lr=0.1)
        self.slow = [p.detach().clone() for p in net.parameters()]
        self.steps = 0

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    def step(self) -> None:
        self.inner.step()
        self.steps += 1
        if self.steps % 2:
            return
        with torch.no_grad():
            for slow, p in zip(self.slow, self.inner.param_groups[0]["params"], strict=True):
                slow.lerp_(p, 0.5)
                p.copy_(slow)


def hooked_steps(net: Any, loader: Any) -> Seen:
    (optimizer,) = sgd(net)

    def after(*_: Any) -> None:
        net.e.weight.data.mul_(0.99)  # of all rows, and with no new version

    def before(*_: Any) -> None:
        net.e.weight.data[:4] += 0.01

    handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    seen = trained(net, loader, lambda _: [optimizer])
    for handle in handles:
        handle.remove()
    return seen + trained(net, loader, lambda _: [optimizer])


def hooked_everywhere(net: Any, loader: Any) -> Seen:
    handle = register_optimizer_step_post_hook(lambda *_: net.e.weight.data.mul_(0.99))
    try:
        return trained(net, loader)
    finally:
        handle.remove()


def averaged(net: Any, loader: Any) -> Seen:
    """The live weights are moved towards an average of them, and now and then replaced by it."""
    mean = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def between(step: int, net: Any) -> None:
        mean.update_parameters(net)
        with torch.no_grad():
            for live, other in zip(net.parameters(), mean.parameters(), strict=True):
                if step % 3 == 2:
                    live.lerp_(other, 0.3)
                if step % 5 == 4:
                    live.copy_(other)

    return trained(net, loader, between=between)


def evaluated_on_an_average(net: Any, loader: Any) -> Seen:
    """Exponential averages as many scripts have them: swapped in through ``.data`` for an evaluation, and back."""
    shadow = {name: p.data.clone() for name, p in net.named_parameters()}
    raw = data(1, seed=9)[0]
    seen: Seen = []

    def between(step: int, net: Any) -> None:
        for name, p in net.named_parameters():
            shadow[name] = shadow[name] * 0.9 + p.data * 0.1
        if step % 3 == 2:
            backup = {name: p.data for name, p in net.named_parameters()}
            for name, p in net.named_parameters():
                p.data = shadow[name]
            net.eval()
            with torch.no_grad():
                note(seen, net, net(*raw))
            net.train()
            for name, p in net.named_parameters():
                p.data = backup[name]

    return seen + trained(net, loader, between=between)


def at(*steps: int) -> Callable[[Callable[[Any], object]], Callable[[int, Any], object]]:
    return lambda action: lambda step, net: action(net) if step in steps else None


def no_grad(action: Callable[[Any], object]) -> Callable[[Any], object]:
    @torch.no_grad()
    def run(net: Any) -> None:
        action(net)

    return run


def load(net: Any, **options: Any) -> None:
    net.load_state_dict({name: value * 0.5 for name, value in net.state_dict().items()}, **options)


def freeze(step: int, net: Any) -> None:
    net.e.weight.requires_grad_(step % 4 < 2)


def frozen_grad_kept(step: int, net: Any) -> None:
    net.e.weight.requires_grad_(step % 4 < 2)
    net.e.weight.grad = None


def written(between: Callable[[int, Any], object]) -> Job:
    return functools.partial(trained, between=between)


POOL = torch.randn(3, ROWS, 8, generator=torch.Generator().manual_seed(2))


def in_a_pool(net: Any, loader: Any) -> Seen:
    """The table's memory becomes one part of a pool, then another: the storage is the same."""
    pool = POOL.clone()

    def between(step: int, net: Any) -> None:
        if step >= 2:
            net.e.weight.data = pool[step % 3]

    return trained(net, loader, between=between)


def flattened(net: Any, loader: Any) -> Seen:
    """The table's memory becomes a part of a flat tensor, through which single rows are written from then on."""
    flat = POOL.clone()

    def between(step: int, net: Any) -> None:
        if step == 2:
            net.e.weight.data = flat[1]
        if step > 2:
            flat[1, :6] += 0.1

    return trained(net, loader, between=between)


WRITES: dict[str, Job] = {
    "optimizer derived from SGD that decays": functools.partial(
        trained, make=lambda net: [Decays(net.parameters(), 0.1)]
    ),
    "optimizer that writes .data": functools.partial(trained, make=lambda net: [WritesData(net.parameters())]),
    "wrapper that is no optimizer": functools.partial(trained, make=lambda net: [Lookahead(net)]),
    "step hooks that write .data": hooked_steps,
    "hook on all optimizers that writes .data": hooked_everywhere,
    "load_state_dict": written(at(3, 8, 9)(load)),
    "load_state_dict that assigns": written(at(3, 8, 9)(functools.partial(load, assign=True))),
    "one row before every step": written(lambda step, net: no_grad(lambda n: n.e.weight[0].mul_(0.5))(net)),
    "one row in place": written(at(2, 3, 7)(no_grad(lambda net: net.e.weight[0].mul_(0.5)))),
    "rows through a view": written(at(2, 3, 7)(no_grad(lambda net: net.e.weight.detach()[:5].zero_()))),
    "rows by index": written(at(2, 3, 7)(no_grad(lambda net: net.e.weight.__setitem__(slice(0, 3), 1.0)))),
    "fresh initialisation": written(at(2, 7)(lambda net: nn.init.constant_(net.e.weight, 0.25))),
    "whole table through .data": written(at(2, 3, 7)(lambda net: net.e.weight.data.mul_(0.5))),
    "table by NumPy": written(at(2, 3, 7)(lambda net: net.e.weight.detach().numpy().__imul__(0.5))),
    "not a number": written(at(2)(no_grad(lambda net: net.e.weight[:3].fill_(float("nan"))))),
    "averages": averaged,
    "averages swapped in for an evaluation": evaluated_on_an_average,
    "frozen and unfrozen": written(freeze),
    "frozen and unfrozen, without its gradient": written(frozen_grad_kept),
    "unfrozen later": written(lambda step, net: net.e.weight.requires_grad_(step >= 4)),
    "data of the same size": written(at(3, 7)(lambda net: setattr(net.e.weight, "data", net.e.weight.data * 2))),
    "larger data": written(at(3)(lambda net: setattr(net.e.weight, "data", torch.cat([net.e.weight.data] * 2)))),
    "data in another order in memory": written(
        at(3, 7)(lambda net: setattr(net.e.weight, "data", net.e.weight.data.t().contiguous().t()))
    ),
    "data with gaps in memory": written(
        at(3, 7)(lambda net: setattr(net.e.weight, "data", torch.cat([net.e.weight.data] * 2, 1)[:, ::2]))
    ),
    "data in a pool": in_a_pool,
    "data in a flat tensor": flattened,
    "memory that is shared from now on": written(at(3)(lambda net: net.e.weight.share_memory_())),
    "there and back to double": written(at(3, 7)(lambda net: (net.double(), net.float()))),
}


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("name", WRITES)
def test_a_write_of_the_table(name: str, num_threads: int) -> None:
    loader = check(model(), WRITES[name], quiet=True, num_threads=num_threads)
    assert used(loader) > 0 or name == "one row before every step"


@pytest.mark.parametrize("layer", ["EmbeddingBag", "F.embedding"])
@pytest.mark.parametrize("name", ["one row in place", "whole table through .data", "data of the same size", "averages"])
def test_a_write_of_the_table_of_other_lookups(name: str, layer: str) -> None:
    looks: dict[str, tuple[Any, Any]] = {
        "EmbeddingBag": (lambda self, b: self.e(b.bags), bag(sparse=True)),
        "F.embedding": (lambda self, b: F.embedding(b.ids, self.e.weight, sparse=True), None),
    }
    assert used(check(model(*looks[layer]), WRITES[name], quiet=True)) > 0


def new_table(net: Any) -> None:
    torch.manual_seed(5)
    net.e = nn.Embedding(2 * ROWS, 8, sparse=True)


def new_weight(net: Any) -> None:
    torch.manual_seed(5)
    net.e.weight = nn.Parameter(torch.randn(ROWS, 8))


@pytest.mark.parametrize("change", [new_table, new_weight])
def test_a_table_that_is_replaced(change: Callable[[Any], object]) -> None:
    """The optimizer is a new one each time, so that it has the table of the moment."""

    def job(net: Any, loader: Any) -> Seen:
        seen: Seen = []
        for epoch in range(3):
            seen += trained(net, loader, between=at(3)(change) if epoch == 1 else lambda step, net: None, epochs=1)
        return seen

    loader = check(model(), job, quiet=True, num_threads=2)
    before = used(loader)
    assert before > 8


def test_a_table_that_was_replaced_is_gathered_ahead_again() -> None:
    net = model()
    staged, loader = torchstage.smart_stage(net, data(), lookups="exact")
    trained(staged, loader)
    new_weight(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TorchstageWarning)
        trained(staged, loader)
    before = used(loader)
    trained(staged, loader, epochs=1)
    assert used(loader) == before + 8


WHOLE: dict[str, Callable[[Any], object]] = {
    "in place": no_grad(lambda net: net.e.weight.clamp_(-1, 1)),
    "through .data": lambda net: net.e.weight.data.mul_(0.5),
    "load_state_dict": load,
    "new data": lambda net: setattr(net.e.weight, "data", net.e.weight.data * 2),
}


@pytest.mark.parametrize("name", WHOLE)
def test_rows_are_gathered_ahead_again_after_a_write_of_the_whole_table(name: str) -> None:
    """Also if the write comes before the last step of an epoch, which leaves no gathered rows to learn from."""
    staged, loader = torchstage.smart_stage(model(), data(), lookups="exact", capacity=1)
    trained(staged, loader, between=at(7)(WHOLE[name]), epochs=1)
    before = used(loader)
    trained(staged, loader, epochs=1)
    assert used(loader) >= before + 4, kept(loader)


def test_rows_are_gathered_ahead_again_when_momentum_is_gone() -> None:
    staged, loader = torchstage.smart_stage(model(), data(), lookups="exact")
    trained(staged, loader, lambda net: [SGD(net.parameters(), lr=0.1, momentum=0.9)])
    before = used(loader)
    trained(staged, loader)
    assert used(loader) >= before + 8, kept(loader)


def test_a_dtype_that_changes_for_good() -> None:
    def job(net: Any, loader: Any) -> Seen:
        change = at(3)(lambda net: net.double())
        return trained(net, loader, between=change, epochs=1) + trained(net, loader, epochs=1)

    loader = check(model(), job, quiet=True)
    assert used(loader) > 8


def layer_hooks(kind: str) -> Callable[[int, Any], object]:
    handles: list[Any] = []

    def between(step: int, net: Any) -> None:
        if step == 2:
            register = getattr(net.e, kind)
            if kind == "register_forward_hook":
                handles.append(register(lambda module, args, output: output * 2))
            elif kind == "register_forward_pre_hook":
                handles.append(register(lambda module, args: (args[0].flip(0),)))
            else:
                handles.append(register(lambda *_: None))
        if step == 6:
            handles.pop().remove()

    return between


# torch warns in the plain run too: no input of the layer requires grad
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_a_hook_on_the_layer_that_comes_and_goes(kind: str) -> None:
    def job(net: Any, loader: Any) -> Seen:
        return trained(net, loader, between=layer_hooks(kind))

    loader = check(model(), job, quiet=True)
    assert used(loader) > (4 if "forward" in kind else 0)  # the other one leaves an attribute: the layer is another one


def test_a_forward_or_a_parametrization_that_is_set_on_the_layer() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    def between(step: int, net: Any) -> None:
        if step == 2:
            net.e.forward = lambda ids: F.embedding(ids, net.e.weight) * 3
        elif step == 4:
            del net.e.forward
        elif step == 6:
            nn.utils.parametrize.register_parametrization(net.e, "weight", Twice())

    check(model(), written(between), quiet=True)


def test_an_option_of_the_layer_that_changes() -> None:
    def between(step: int, net: Any) -> None:
        net.e.padding_idx = 0 if step >= 5 else None
        net.e.sparse = step < 9

    check(model(), written(between), quiet=True)


# ---------------------------------------------------------------- how batches are used


def held(order: Callable[[list[Any]], list[Any]], size: int = 4) -> Job:
    """Take ``size`` batches, then train on what ``order`` makes of them."""

    def job(net: Any, loader: Any) -> Seen:
        (optimizer,) = sgd(net)
        seen: Seen = []
        group: list[Any] = []
        for batch in loader:
            group.append(batch)
            if len(group) == size:
                for one in order(group):
                    optimizer.zero_grad()
                    output = net(*one)
                    loss_of(output).backward()
                    note(seen, net, output)
                    optimizer.step()
                group = []
        return seen

    return job


ORDERS: dict[str, Callable[[list[Any]], list[Any]]] = {
    "later": lambda group: group,
    "in reverse": lambda group: group[::-1],
    "twice in a row": lambda group: [batch for batch in group for _ in range(2)],
    "twice, later": lambda group: [*group, *group],
    "some never": lambda group: [group[2], group[0]],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_batches_that_are_used(order: str, num_threads: int) -> None:
    loader = check(model(), held(ORDERS[order]), functools.partial(data, 16), num_threads=num_threads)
    assert used(loader) == (8 if order == "some never" else 16)
    assert not loader.stats.fallbacks
    again = kept(loader).get("rows used by an earlier call", 0)
    assert again == (16 if order.startswith("twice") else 0)


def test_a_batch_kept_from_the_first_step_to_the_last() -> None:
    def job(net: Any, loader: Any) -> Seen:
        iterator = iter(loader)
        first = next(iterator)
        seen = trained(net, iterator, epochs=1)
        return seen + trained(net, [first], epochs=1)

    assert used(check(model(), job, functools.partial(data, 70))) == 70  # more steps than pieces are remembered


def test_a_batch_whose_row_numbers_are_written_before_its_forward() -> None:
    def job(net: Any, loader: Any) -> Seen:
        def flipped() -> Iterator[Any]:
            for i, batch in enumerate(loader):
                if i % 3 == 1:
                    batch[0].copy_(batch[0].flip(0))
                yield batch

        return trained(net, flipped(), epochs=1)

    loader = check(model(), job, copies, quiet=True)
    assert loader.stats.fallbacks == {"batch written": 5}


def test_results_that_the_caller_keeps_and_writes() -> None:
    """The model gives the looked-up rows away, and the loop writes into them."""

    def forward(self: Any, ids: torch.Tensor) -> Any:
        rows = self.e(ids)
        return self.out(rows.tanh()), rows

    def job(net: Any, loader: Any) -> Seen:
        (optimizer,) = sgd(net)
        seen: Seen = []
        for (ids,) in loader:
            with torch.no_grad():
                net(ids)[1].zero_()
            optimizer.zero_grad()
            output, rows = net(ids)
            (loss_of(output) + rows.mul_(2).relu_().sum()).backward()
            note(seen, net, output, rows)
            optimizer.step()
        return seen

    loader = check(model(forward=forward), job, lambda: [batch[:1] for batch in data()], quiet=True)
    assert used(loader) > 0


def test_two_staged_models_share_a_table() -> None:
    def towers() -> tuple[nn.Module, nn.Module]:
        first, second = model(), model(lambda self, b: self.e(b.bags).mean(1))
        second.e.weight = first.e.weight
        return first, second

    def job(first: Any, second: Any, one: Any, other: Any) -> Seen:
        optimizer = SGD([*first.parameters(), *second.out.parameters()], lr=0.1)
        seen: Seen = []
        for a, b in zip(one, other, strict=True):
            for net, batch in ((first, a), (second, b)):
                optimizer.zero_grad()
                output = net(*batch)
                loss_of(output).backward()
                note(seen, net, output)
                optimizer.step()
        return seen

    plain = job(*towers(), data(20), data(20, seed=3))
    first, second = towers()
    staged, loader = torchstage.smart_stage(first, data(20), lookups="exact", capacity=3)
    other_staged, other = torchstage.smart_stage(second, data(20, seed=3), lookups="exact", num_threads=2)
    assert_equal(plain, job(staged, other_staged, loader, other))
    assert used(loader) == used(other) == 20


def test_one_model_is_staged_by_two_loaders() -> None:
    def job(net: Any, one: Any, other: Any) -> Seen:
        mixed = (batch for pair in zip(one, other, strict=True) for batch in pair)
        return trained(net, mixed, epochs=1)

    plain = job(model(), data(20), data(20, seed=3))
    staged, loader = torchstage.smart_stage(model(), data(20), lookups="exact", capacity=3)
    same, other = torchstage.smart_stage(staged, data(20, seed=3), lookups="exact", num_threads=2)
    assert_equal(plain, job(same, loader, other))
    assert used(loader) == used(other) == 20


def test_evaluation_between_steps_on_raw_and_on_staged_batches() -> None:
    def job(net: Any, loader: Any, evaluation: Any) -> Seen:
        seen: Seen = []

        def between(step: int, net: Any) -> None:
            if step % 3 == 2:
                net.eval()
                for guard in (torch.no_grad(), torch.inference_mode()):
                    with guard:
                        for batch in evaluation:
                            note(seen, net, net(*batch).clone())
                net.train()

        return seen + trained(net, loader, between=between)

    raw = data(3, seed=8)
    plain = job(model(), data(), raw)
    for staged_too in (False, True):
        staged, loader = torchstage.smart_stage(model(), data(), lookups="exact", capacity=3)
        evaluation: Any = raw
        if staged_too:
            _, evaluation = torchstage.smart_stage(staged, raw, lookups="exact")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TorchstageWarning)
            assert_equal(plain, job(staged, loader, evaluation))
        assert used(loader) == 16
        if staged_too:
            assert used(evaluation) > 0


EVALUATED = ["Embedding", "EmbeddingBag, mean, offsets", "EmbeddingBag, max, padding", "weight[ids]"]


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", EVALUATED)
def test_a_staged_evaluation(guard: Any, name: str) -> None:
    net = model(*FORMS[name]).eval()
    with guard(), warnings.catch_warnings():
        warnings.simplefilter("ignore", TorchstageWarning)  # tensors of inference mode cannot be watched
        plain = [net(*batch) for batch in data()]
        staged, loader = torchstage.smart_stage(net, data(), lookups="exact", num_threads=2)
        outputs = [staged(*batch) for batch in loader]
    assert [snapshot(a) for a in plain] == [snapshot(b) for b in outputs]
    assert [a.is_inference() for a in plain] == [b.is_inference() for b in outputs]
    assert used(loader) == (8 if guard is torch.no_grad else 0)


def test_a_model_that_was_made_in_inference_mode() -> None:
    """Its tensors have no versions."""
    with torch.inference_mode():
        net = model().eval()
        plain = [net(*batch) for batch in data()]
        staged, loader = torchstage.smart_stage(net, data(), lookups="exact")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TorchstageWarning)
            outputs = [staged(*batch) for batch in loader]
    assert [snapshot(a) for a in plain] == [snapshot(b) for b in outputs]


# ---------------------------------------------------------------- what autograd can do to a lookup


DIFFERENTIABLE = ["Embedding", "Embedding, padding", "weight[ids]", "index_select", "F.embedding"]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_penalty_on_gradients(name: str) -> None:
    """Gradients are differentiated again."""

    def job(net: Any, loader: Any) -> Seen:
        (optimizer,) = sgd(net)
        seen: Seen = []
        for batch in loader:
            optimizer.zero_grad()
            output = net(*batch).tanh()
            grads = torch.autograd.grad(loss_of(output), list(net.parameters()), create_graph=True)
            (loss_of(output) + sum(grad.square().sum() for grad in grads)).backward()
            note(seen, net, output, *grads)
            optimizer.step()
        return seen

    assert used(check(model(*FORMS[name]), job)) > 0


def test_a_second_derivative_that_torch_does_not_have() -> None:
    def attempt(net: Any, loader: Any) -> Seen:
        seen: Seen = []
        for batch in loader:
            output = net(*batch).tanh()
            (grad,) = torch.autograd.grad(loss_of(output), [net.e.weight], create_graph=True)
            with pytest.raises((RuntimeError, NotImplementedError)) as caught:
                grad.square().sum().backward()
            seen.append(("error", type(caught.value)))
        return seen

    check(model(*FORMS["EmbeddingBag, sum, offsets"]), attempt)


@pytest.mark.parametrize("name", ["Embedding, sparse", "EmbeddingBag, mean, offsets", "weight[ids]", "index_select"])
def test_a_write_into_the_looked_up_rows(name: str) -> None:
    look, setup = FORMS[name]
    check(model(lambda self, b: look(self, b).mul_(2).relu_() + torch.log1p(b.weights).mean(), setup), num_threads=2)


def test_a_lookup_without_gradients_in_a_forward_with_them() -> None:
    def look(self: Any, b: Batch) -> Any:
        with torch.no_grad():
            constant = self.e(b.bags).mean(1)
        return self.e(b.ids[:6]) * constant

    assert used(check(model(look), num_threads=2)) == 2 * 16


@pytest.mark.parametrize("name", ["Embedding, sparse", "EmbeddingBag, sum, offsets, sparse", "weight[ids]"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_forward_that_is_run_again_in_the_backward(name: str, use_reentrant: bool) -> None:
    """Checkpointing runs the whole forward twice, the second time on rows that are used up."""

    def job(net: Any, loader: Any) -> Seen:
        (optimizer,) = sgd(net)
        seen: Seen = []
        for batch in loader:
            optimizer.zero_grad()
            start = torch.zeros((), requires_grad=True)  # the re-entrant form needs an input that requires grad
            output = checkpoint(lambda s, b=batch: net(*b) + s, start, use_reentrant=use_reentrant)
            loss_of(output).backward()
            note(seen, net, output)
            optimizer.step()
        return seen

    check(model(*FORMS[name]), job, quiet=True)


def test_a_checkpoint_inside_the_forward() -> None:
    def look(self: Any, b: Batch) -> Any:
        return checkpoint(lambda ids: self.e(ids).tanh(), b.ids, use_reentrant=False)

    check(model(look), quiet=True)


AUTOCAST = [
    "Embedding, sparse",
    "EmbeddingBag, sum, offsets, sparse",
    "EmbeddingBag, sample weights, sparse, by keyword",
]


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast(name: str) -> None:
    def job(net: Any, loader: Any) -> Seen:
        (optimizer,) = sgd(net)
        seen: Seen = []
        for batch in loader:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = net(*batch)
            loss_of(output.float()).backward()
            note(seen, net, output)
            optimizer.step()
        return seen

    assert used(check(model(*FORMS[name]), job, quiet=True)) > 0


def test_a_transform_of_torch_func_around_the_model() -> None:
    """Autograd functions without ``setup_context`` cannot run under one."""

    def job(net: Any, loader: Any) -> Seen:
        seen: Seen = []
        (optimizer,) = sgd(net)
        for batch in loader:
            slope = torch.func.grad(lambda s, batch=batch: (net(*batch).detach() * s).sum())(torch.tensor(2.0))
            optimizer.zero_grad()
            output = net(*batch) * slope
            loss_of(output).backward()
            note(seen, net, output, slope)
            optimizer.step()
        return seen

    check(model(), job, quiet=True)


def test_a_functional_call_with_other_parameters() -> None:
    def job(net: Any, loader: Any) -> Seen:
        seen: Seen = []
        for batch in loader:
            other = {name: p.detach() * 2 for name, p in net.named_parameters()}
            note(seen, net, torch.func.functional_call(net, other, batch), net(*batch))
        return seen

    check(model(), job, quiet=True)


def test_hooks_on_saved_tensors() -> None:
    def job(net: Any, loader: Any) -> Seen:
        with torch.autograd.graph.save_on_cpu():
            return trained(net, loader)

    for name in ("Embedding, sparse", "EmbeddingBag, trained sample weights, padding"):
        check(model(*FORMS[name]), job)


def test_gradients_of_the_table_alone_and_of_the_sample_weights_alone() -> None:
    look, setup = FORMS["EmbeddingBag, trained sample weights"]

    def between(step: int, net: Any) -> None:
        net.e.weight.requires_grad_(step % 3 != 1)
        net.gate.requires_grad_(step % 3 != 2)

    assert used(check(model(look, setup), written(between), quiet=True)) > 0


# ---------------------------------------------------------------- races with the stage's thread


class Gate:
    """Stops the gather of batch 1 just before or just after its rows are copied, until it is let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
        self.inside, self.go, self.copied, self.leave = (threading.Event() for _ in range(4))
        fill = Rows.fill

        def held(rows: Rows, reading: Reading, *args: Any) -> None:
            if reading.serial != 2:
                fill(rows, reading, *args)
                return
            if where == "after":
                fill(rows, reading, *args)
            self.inside.set()
            assert self.go.wait(10)
            if where == "before":
                fill(rows, reading, *args)
            self.copied.set()
            assert self.leave.wait(10)

        monkeypatch.setattr(Rows, "fill", held)


def step_and_edit(net: Any, optimizer: Optimizer, gate: Gate | None) -> None:
    optimizer.step()
    with torch.no_grad():
        net.e.weight[:3] += 1


def swap_and_back(net: Any, optimizer: Optimizer, gate: Gate | None) -> None:
    """Another table is in place for as long as rows are copied, as averages are for an evaluation.

    The rows that no batch has looked up yet are the same in both, so that comparing a row may not find it.
    """
    own = net.e.weight.data
    net.e.weight.data = torch.cat([own[:50] + 1, own[50:]])
    if gate is not None:
        gate.go.set()
        assert gate.copied.wait(10)
    net.e.weight.data = own


WHILE_GATHERING: dict[str, Callable[[Any, Optimizer, Gate | None], object]] = {
    "step": lambda net, optimizer, gate: optimizer.step(),
    "step and edit": step_and_edit,
    "swap and back": swap_and_back,
}


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("what", WHILE_GATHERING)
def test_a_write_while_rows_are_gathered(monkeypatch: pytest.MonkeyPatch, where: str, what: str) -> None:
    """Batch 1 is gathered around the write: its reading is from before, its rows are from before or from after."""

    def job(net: Any, loader: Any, gate: Gate | None) -> Seen:
        (optimizer,) = sgd(net)
        seen: Seen = []
        for step, batch in enumerate(loader):
            optimizer.zero_grad()
            output = net(*batch)
            loss_of(output).backward()
            note(seen, net, output)
            if step > 0:
                optimizer.step()
                continue
            if gate is not None:
                assert gate.inside.wait(10)
            WHILE_GATHERING[what](net, optimizer, gate)
            if gate is not None:
                gate.go.set()
                gate.leave.set()
        return seen

    plain = job(model(), data(), None)
    gate = Gate(monkeypatch, where)
    if what == "swap and back":  # the comparison of one row finds it or not, as chance will have it
        monkeypatch.setattr(Rows, "_probe", lambda *_: None)
    net, loader = torchstage.smart_stage(model(), data(), lookups="exact")
    assert_equal(plain, job(net, loader, gate))
    assert used(loader) > 0


def test_single_rows_that_are_written_through_data_at_every_step() -> None:
    """As a loop does that keeps a row of padding at zero, or scales the rows that it has just seen."""

    def between(step: int, net: Any) -> None:
        net.e.weight.data[(7 * step) % ROWS].mul_(0.5)
        net.e.weight.data[:: 2 + step % 3].mul_(0.9)

    loader = check(model(), written(between), quiet=True)
    assert any("leaves no trace" in why for why in kept(loader))


def test_no_gradient_of_a_lookup_stays_none() -> None:
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return None

    def job(net: Any, loader: Any) -> Seen:
        seen: Seen = []
        for batch in loader:
            output = net(*batch)
            (Nothing.apply(output).sum() + net.out.bias.sum()).backward()
            seen.append(("table", net.e.weight.grad is None))
        return seen

    loader = check(model(lambda self, b: self.e(b.ids)), job)
    assert used(loader) > 0


def test_an_optimizer_whose_step_was_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_step = SGD.step

    def step(self: Any, closure: Any = None) -> Any:
        result = plain_step(self, closure)
        with torch.no_grad():
            self.param_groups[0]["params"][0].mul_(0.99)
        return result

    step.hooked = True
    monkeypatch.setattr(SGD, "step", step)
    check(model(), quiet=True)


def test_bags_of_a_column_of_a_matrix() -> None:
    """Torch makes such row numbers contiguous before it sums, and its backward asks for that."""

    def look(self: Any, b: Batch) -> Any:
        return F.embedding_bag(b.bags[:, 1], self.e.weight, torch.arange(0, b.bags.shape[0], 2), sparse=True)

    loader = check(model(look))
    assert used(loader) > 0


def test_a_padding_row_that_counts_from_the_end_is_none_to_torch_embedding() -> None:
    loader = check(model(lambda self, b: torch.embedding(self.e.weight, b.ids, -2, False, True)))
    assert used(loader) > 0
