"""Training on an accelerator: a simulated one where it can be built, a GPU where there is one. The same tests for both."""

import copy
import functools
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import torchstage
from tests import simulated
from tests.support import Clicks, Words, click_loader, word_batches
from torchstage import ops
from torchstage._deferred import Deferred
from torchstage._streams import NULL, StreamLane, lane_of
from torchstage.errors import FallbackWarning, OptionError
from torchstage.loaders._host_stage import _Copy

Batches = Callable[[], Any]


@pytest.fixture(autouse=True)
def _no_races() -> Iterator[None]:
    """Fail a test in which a stream did not wait for another one whose memory it used."""
    there = "torch.sim" in sys.modules
    if there:
        simulated.races()
    yield
    assert "torch.sim" not in sys.modules or not there or simulated.races() == []


@pytest.fixture
def sim(device: torch.device) -> torch.device:
    if device.type != "sim":
        pytest.skip("counts the transfers of the simulated accelerator")
    return device


class Run(NamedTuple):
    """What a training run gave, on the host."""

    outputs: list[torch.Tensor]
    gradients: list[torch.Tensor]
    state: dict[str, torch.Tensor]

    def assert_equal(self, other: "Run") -> None:
        assert len(self.outputs) == len(other.outputs)
        pairs = [*zip(self.outputs, other.outputs, strict=True), *zip(self.gradients, other.gradients, strict=True)]
        assert all(torch.equal(a, b) for a, b in pairs)
        assert all(torch.equal(value, other.state[name]) for name, value in self.state.items())


def train(model: nn.Module, batches: Any, forward: Callable[[nn.Module, Any], torch.Tensor], epochs: int = 2) -> Run:
    """Train; ``forward`` takes the model and a batch, and moves that if the loop is the plain one."""
    torch.manual_seed(11)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    outputs, gradients = [], []
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            output = forward(model, batch)
            output.square().mean().backward()
            optimizer.step()
            outputs.append(output.detach().cpu())
            gradients += [p.grad.cpu().to_dense() for p in model.parameters() if p.grad is not None]
    return Run(outputs, gradients, {name: value.cpu() for name, value in model.state_dict().items()})


def clicks(device: torch.device) -> nn.Module:
    torch.manual_seed(3)
    return Clicks().to(device)


def click(model: nn.Module, batch: Any, device: torch.device) -> torch.Tensor:
    dense, ids, label = (part.to(device) for part in batch)
    return model(dense, ids) - label


def compare(
    device: torch.device,
    make: Callable[[torch.device], nn.Module],
    batches: Batches,
    forward: Callable[..., torch.Tensor],
    /,
    **options: Any,
) -> Any:
    """Train plain and staged from the same start; both must be equal. Returns the staged loader."""
    plain = train(make(device), batches(), functools.partial(forward, device=device))
    model, loader = torchstage.smart_stage(make(device), batches(), bypass=False, **options)
    staged = train(model, loader, functools.partial(forward, device=device))
    staged.assert_equal(plain)
    return loader


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("on_cpu", [None, True, False])
def test_a_staged_run_has_the_numbers_of_the_plain_one(device: torch.device, on_cpu: bool | None, threads: int) -> None:
    if on_cpu and device.type == "cuda":
        pytest.skip("log1p on the host may differ in its last bit, as the option says")
    loader = compare(
        device, clicks, click_loader, click, stage_subgraph_on_cpu=on_cpu, num_threads=threads, capacity=2, verify=2
    )
    assert loader.stats.staged_steps == 14
    assert loader.stats.fallbacks == {}


def placed(loader: Any) -> tuple[set[str], set[str]]:
    """Return the operations of a loader's stage on the host and on the accelerator."""
    ahead = loader._shared.stager._current.parts._ahead

    def names(part: Any) -> set[str]:
        return {node.name for node in part.module.graph.nodes if node.op.startswith("call_")}

    return names(ahead.host.part) if ahead.host is not None else set(), names(ahead.stage)


def test_what_gives_the_same_bits_runs_on_the_host_and_the_rest_there(device: torch.device) -> None:
    default = placed(compare(device, clicks, click_loader, click))
    assert {"sub", "truediv", "abs_1", "hash_bucket"} <= default[0]
    assert default[1] == {"log1p", "sum_1", "gt", "float_1"}  # a sum and a logarithm, and what follows on them
    there = placed(compare(device, clicks, click_loader, click, stage_subgraph_on_cpu=False))
    assert there == (set(), default[0] | default[1])
    model, loader = torchstage.smart_stage(clicks(device), click_loader(), stage_subgraph_on_cpu=True)
    train(model, loader, functools.partial(click, device=device), epochs=1)
    assert placed(loader) == (default[0] | default[1], set())


def test_a_batch_arrives_on_the_device_and_a_loops_own_move_gives_it_back(device: torch.device) -> None:
    _, loader = torchstage.smart_stage(clicks(device), click_loader(64))
    for dense, ids, label in loader:
        assert dense.device == ids.device == label.device == device
        assert dense.to(device) is dense
        assert ids.to(device) is ids
        assert label.to(device, non_blocking=True) is label


def test_what_only_the_stage_reads_does_not_travel_until_somebody_asks(sim: torch.device) -> None:
    model, loader = torchstage.smart_stage(clicks(sim), list(click_loader(64)))
    kept = []
    for batch in loader:
        click(model, batch, sim).mean().backward()
        assert type(batch[1]) is Deferred
        kept.append(batch)
    own = simulated.this_thread()
    carried = [t for t in simulated.transfers() if t.direction == "in" and t.thread != own]
    assert len(carried) == 2  # one for each batch
    values = 32 * (2 * 4 + 3 * 8)  # abs float32 [32, 2] and three columns of row numbers int64 [32]
    label = 32 * 4
    assert all(t.nbytes <= values + label + 6 * 64 for t in carried)  # the raw ids would be 768 bytes more
    assert kept[0][1].sum().item() == kept[0][1].host.sum().item()
    assert [t.nbytes for t in simulated.transfers() if t.direction == "in"] == [32 * 3 * 8]


def test_the_training_thread_moves_nothing_and_waits_for_nothing(sim: torch.device) -> None:
    model, loader = torchstage.smart_stage(clicks(sim), list(click_loader(200)), num_threads=2, capacity=3)
    for number, batch in enumerate(loader):
        output = click(model, batch, sim)
        found = [t for t in simulated.transfers() if t.thread == simulated.this_thread()]
        if number:  # the capture moves its example
            assert found == []
        output.mean().backward()
        simulated.transfers()
    assert number == 6


def test_copies_are_queued_on_the_stream_that_was_asked_for(sim: torch.device) -> None:
    number = torchstage.add_stage_stream(priority=-1)
    seen = {}
    for asked in (None, 0, number):
        model, loader = torchstage.smart_stage(clicks(sim), list(click_loader(64)), stage_subgraph_stream_id=asked)
        simulated.transfers()
        train(model, loader, functools.partial(click, device=sim), epochs=1)
        own = simulated.this_thread()
        seen[asked] = {t.stream for t in simulated.transfers() if t.thread != own and t.direction == "in"}
    assert seen[0] == {0}
    assert 0 not in seen[None] | seen[number]
    assert seen[None] != seen[number]


@pytest.mark.parametrize("which", [0, 1])
def test_a_write_to_a_batch_before_its_forward_is_seen(device: torch.device, which: int) -> None:
    def forward(model: nn.Module, batch: Any, device: torch.device) -> torch.Tensor:
        parts = [part.to(device) for part in batch]
        parts[which][0] += 1
        return model(*parts[:2]) - parts[2]

    plain = train(clicks(device), click_loader(), functools.partial(forward, device=device))
    with pytest.warns(FallbackWarning, match="batch written"):
        model, loader = torchstage.smart_stage(clicks(device), click_loader())
        staged = train(model, loader, functools.partial(forward, device=device))
    staged.assert_equal(plain)
    assert loader.stats.fallbacks["batch written"] == 14


def test_steps_that_run_the_plain_forward_get_the_tensors_themselves(device: torch.device) -> None:
    def forward(model: nn.Module, batch: Any, device: torch.device) -> torch.Tensor:
        steps.append(None)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=len(steps) % 3 == 0):
            return click(model, batch, device)

    steps: list[None] = []
    plain = train(clicks(device), click_loader(), functools.partial(forward, device=device))
    steps.clear()
    with pytest.warns(FallbackWarning, match="autocast"):
        model, loader = torchstage.smart_stage(clicks(device), click_loader())
        staged = train(model, loader, functools.partial(forward, device=device))
    staged.assert_equal(plain)
    assert loader.stats.fallbacks["autocast state"] >= 1


def test_frozen_state_that_changes_on_the_accelerator_reaches_the_hosts_copy(device: torch.device) -> None:
    def forward(model: nn.Module, batch: Any, device: torch.device) -> torch.Tensor:
        steps.append(None)
        if len(steps) == 5:
            model.mean.add_(0.25)
        return click(model, batch, device)

    steps: list[None] = []
    plain = train(clicks(device), click_loader(), functools.partial(forward, device=device))
    steps.clear()
    with pytest.warns(FallbackWarning, match="frozen state changed"):
        model, loader = torchstage.smart_stage(clicks(device), click_loader())
        staged = train(model, loader, functools.partial(forward, device=device))
    staged.assert_equal(plain)
    assert loader.stats.staged_steps > 8


class OwnMoves(nn.Module):
    """Takes its batch from the host and moves what it needs, as models with text in their batches do."""

    def __init__(self) -> None:
        super().__init__()
        self.words = Words()
        self.scale = nn.Linear(2, 1)

    def forward(self, words: list[str], numbers: torch.Tensor) -> torch.Tensor:
        device = self.scale.weight.device
        ids = ops.string_to_hash_bucket(words, 64).to(device)
        rows = self.words.out(self.words.table(ids)).squeeze(1)
        return rows + self.scale((numbers * 2 - 1).to(device)).squeeze(1)


def own_moves(device: torch.device) -> nn.Module:
    torch.manual_seed(4)
    return OwnMoves().to(device)


def text_batches() -> list[Any]:
    return [(words, torch.stack([label, label], 1), label) for words, label in word_batches(6)]


@pytest.mark.parametrize("given", [None, "cpu"])
def test_a_forward_that_moves_its_own_inputs_gets_its_values_carried(device: torch.device, given: str | None) -> None:
    def forward(model: nn.Module, batch: Any, device: torch.device) -> torch.Tensor:
        homes.append(batch[1].device)
        return model(batch[0], batch[1])

    homes: list[torch.device] = []
    loader = compare(device, own_moves, text_batches, forward, device=given)
    assert set(homes[12:]) == {torch.device("cpu") if given else device}
    assert loader.stats.staged_steps == 12
    assert {"string_to_hash_bucket", "mul", "sub"} <= placed(loader)[0]
    assert placed(loader)[1] <= {"getattr_1"}


class HostTable(nn.Module):
    """A table on the host, and the rest on the accelerator."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(40, 4, mode="sum", sparse=True)
        self.out = nn.Linear(4, 1).to(device)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.table(ids % 40)
        return self.out(rows.to(self.out.weight.device)).squeeze(1)


def test_a_table_on_the_host_is_gathered_ahead_of_a_model_on_the_accelerator(device: torch.device) -> None:
    def make(device: torch.device) -> nn.Module:
        torch.manual_seed(5)
        return HostTable(device)

    def batches() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(6)
        return [torch.randint(0, 1000, (8, 3), generator=generator) for _ in range(7)]

    def forward(model: nn.Module, batch: Any, device: torch.device) -> torch.Tensor:
        assert batch.device.type == "cpu"  # parts of the model are here and there, so batches stay
        return model(batch)

    loader = compare(device, make, batches, forward, lookups="exact")
    (table,) = loader.stats.tables.values()
    assert table.used == 14
    assert loader.stats.fallbacks == {}


class Rows(nn.Module):
    """Tables on the host whose rows the rest, on the accelerator, takes one by one."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.home = device
        self.first = nn.Embedding(60, 4, sparse=True)
        self.second = nn.Embedding(60, 4, sparse=True, padding_idx=0)
        self.out = nn.Linear(8, 1).to(device)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        mixed = (ids * 7) % 60
        first = self.first(mixed).to(self.home)
        second = self.second(mixed % 5).to(self.home, non_blocking=True)
        return self.out(torch.cat([first, second], -1)).sum(1).squeeze(1)


def id_batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    return [torch.randint(0, 1000, (64 + number, 3), generator=generator) for number in range(9)]


def rows_of(device: torch.device) -> nn.Module:
    torch.manual_seed(5)
    return Rows(device)


@pytest.mark.parametrize("lookups", ["exact", "auto", "main"])
def test_rows_of_a_table_on_the_host_have_the_numbers_of_the_plain_run(device: torch.device, lookups: str) -> None:
    def forward(model: nn.Module, batch: Any, device: torch.device) -> torch.Tensor:
        return model(batch)

    loader = compare(device, rows_of, id_batches, forward, lookups=lookups, num_threads=2, capacity=2)
    assert loader.stats.fallbacks == {}
    if lookups == "exact":
        assert [table.used for table in loader.stats.tables.values()] == [18, 18]


def test_each_row_of_a_table_on_the_host_travels_once_and_ahead(sim: torch.device) -> None:
    model, loader = torchstage.smart_stage(rows_of(sim), id_batches(), lookups="exact", bypass=False, capacity=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    simulated.transfers()
    for number, batch in enumerate(loader):
        seen = simulated.transfers()
        output = model(batch)
        mine = [t for t in simulated.transfers() if t.thread == simulated.this_thread()]
        ahead = [t for t in seen if t.thread != simulated.this_thread() and t.direction == "in"]
        if number > 4:
            assert all(t.nbytes <= 60 * 4 * 4 for t in mine)  # rows that were written since, not [67, 3, 4] floats
            assert all(t.nbytes < 2 * (60 + 5) * 4 * 4 + 2 * 3 * len(batch) * 8 + 10 * 64 for t in ahead)
        optimizer.zero_grad()
        output.mean().backward()
        optimizer.step()
    assert sum(table.repaired for table in loader.stats.tables.values()) > 0


def test_without_a_model_batches_are_moved(device: torch.device) -> None:
    loader = torchstage.StagedDataLoader(click_loader(64), device=device)
    for staged, plain in zip(loader, click_loader(64), strict=True):
        assert all(part.device == device for part in staged)
        assert [part.shape for part in staged] == [part.shape for part in plain]


def odd_batches() -> Iterator[Any]:
    generator = torch.Generator().manual_seed(1)
    for rows in (3, 1, 5):
        base = torch.randn(rows, 4, generator=generator)
        yield {
            "column": base[:, 1],
            "turned": base.t(),
            "spread": base[:, :1].expand(rows, 6),
            "empty": torch.empty(0, 3),
            "scalar": torch.tensor(rows),
            "flags": base > 0,
            "small": torch.arange(rows, dtype=torch.int8),
            "wide": torch.arange(rows, dtype=torch.float64),
            "conjugate": torch.complex(base, base).conj(),
            "text": ["a"] * rows,
            "grown": torch.ones(rows, requires_grad=True),
            "nothing": None,
        }


def test_batches_of_all_kinds_arrive_as_they_would_by_themselves(device: torch.device) -> None:
    for staged, plain in zip(torchstage.StagedDataLoader(odd_batches(), device=device), odd_batches(), strict=True):
        assert list(staged) == list(plain)
        for name, value in plain.items():
            if not isinstance(value, torch.Tensor) or value.requires_grad:
                assert type(staged[name]) is type(value)
                assert isinstance(value, torch.Tensor) or staged[name] == value
                continue
            moved = value.to(device)
            assert staged[name].device == device
            assert staged[name].dtype == moved.dtype
            assert staged[name].stride() == moved.stride()
            assert torch.equal(staged[name].cpu(), value)


def test_a_batch_that_the_loader_moves_itself_is_staged_there(device: torch.device) -> None:
    def batches() -> list[Any]:
        torch.manual_seed(0)
        return [tuple(part.to(device) for part in batch) for batch in click_loader()]

    loader = compare(device, clicks, batches, click)
    assert loader.stats.staged_steps == 14
    assert placed(loader)[0] == set()


def test_inputs_that_are_made_by_the_binding_are_made_of_the_moved_batch(device: torch.device) -> None:
    def forward(model: nn.Module, batch: Any, device: torch.device) -> torch.Tensor:
        return model(batch["dense"].to(device), batch["ids"].to(device))

    def batches() -> list[Any]:
        torch.manual_seed(0)
        return [{"dense": dense, "ids": ids} for dense, ids, _ in click_loader()]

    plain = train(clicks(device), batches(), functools.partial(forward, device=device))
    model, loader = torchstage.smart_stage(
        clicks(device), batches(), inputs=lambda batch: ((batch["dense"], batch["ids"].flip(0).flip(0)), {})
    )
    with pytest.warns(FallbackWarning):  # the forward is called with others than the binding makes
        staged = train(model, loader, functools.partial(forward, device=device))
    staged.assert_equal(plain)


def test_an_error_on_the_host_arrives_at_its_batch_with_the_operation(device: torch.device) -> None:
    batches = [*text_batches()[:2], (["\ud800"], torch.zeros(1, 2), torch.zeros(1)), *text_batches()[2:]]
    model, loader = torchstage.smart_stage(own_moves(device), batches)
    seen = 0
    with pytest.raises(ValueError, match="no UTF-8 form") as caught:
        for words, numbers, _ in loader:
            model(words, numbers)
            seen += 1
    assert seen == 2
    assert any("string_to_hash_bucket" in note for note in caught.value.__notes__)


def test_what_was_read_ahead_of_a_break_is_not_lost(device: torch.device) -> None:
    batches = iter([torch.full((2,), float(i)) for i in range(8)])
    loader = torchstage.StagedDataLoader(batches, device=device, capacity=3)
    first = [float(next(iter(loader))[0])]
    rest = [float(batch[0]) for batch in loader]
    assert first + rest == [float(i) for i in range(8)]


def test_memory_that_the_loader_writes_again_is_sent_as_it_was_read(device: torch.device) -> None:
    def reused() -> Iterator[torch.Tensor]:
        memory = torch.empty(1000)
        for number in range(30):
            yield memory.fill_(number)

    for number, batch in enumerate(torchstage.StagedDataLoader(reused(), device=device, capacity=4, num_threads=2)):
        assert torch.equal(batch.cpu(), torch.full((1000,), float(number)))


def test_many_small_batches_keep_their_numbers_while_memory_is_given_out_again(device: torch.device) -> None:
    """What a tensor that is freed early, or sent from memory that is written too soon, would change."""
    count = 3000 if device.type == "cuda" else 60

    def batches() -> Iterator[Any]:
        generator = torch.Generator().manual_seed(2)
        for number in range(count):
            rows = 1 + number * 7 % 50
            yield torch.randn(rows, 2, generator=generator), torch.randint(0, 9999, (rows, 3), generator=generator)

    def forward(model: nn.Module, batch: Any, device: torch.device) -> torch.Tensor:
        dense, ids = (part.to(device) for part in batch)
        churn = [torch.empty(size, device=device).fill_(7) for size in (len(dense), 64, 512)]
        return model.eval()(dense, ids) + 0 * churn[0]

    make = lambda device: clicks(device).eval()  # noqa: E731 - batch norm refuses a single row in train mode
    plain = train(make(device), batches(), functools.partial(forward, device=device), epochs=1)
    model, loader = torchstage.smart_stage(make(device), batches(), bypass=False, num_threads=3, capacity=4)
    staged = train(model, loader, functools.partial(forward, device=device), epochs=1)
    staged.assert_equal(plain)
    assert loader.stats.staged_steps == count


# --- streams ---------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Takes a logarithm, which runs there, of what a buffer scales."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([2.0, 3.0]))
        self.out = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.log1p((x * self.scale).abs())).squeeze(1)


def scaled(device: torch.device) -> Any:
    torch.manual_seed(7)
    return Scaled().to(device)


def rows(count: int = 8) -> list[torch.Tensor]:
    return [torch.randn(4, 2, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def run_scaled(model: Any, plain: Any, loader: Any, taken_on: Any, run_on: Any, module: Any) -> list[torch.Tensor]:
    """Run three epochs, with a write to state after each where the forward runs, and no wait of the host in between."""
    outputs = []
    for epoch in range(3):
        with module.stream(taken_on(epoch)):
            for x in loader:
                with module.stream(run_on(epoch)):
                    outputs.append(model(x.to(plain.scale.device)).detach())
            with module.stream(run_on(epoch)):
                plain.scale.mul_(0.5)
        if epoch < 2 and run_on(epoch + 1) != run_on(epoch):
            run_on(epoch + 1).wait_stream(run_on(epoch))  # as every loop that changes over has to
    module.synchronize()
    return [output.cpu() for output in outputs]


def test_the_simulated_device_notes_races(sim: torch.device) -> None:
    module: Any = torch.get_device_module(sim.type)
    side, x = module.Stream(sim), torch.ones(4, device=sim)
    side.wait_stream(module.current_stream(sim))
    with module.stream(side):
        made = x * 2
        x.add_(1)
    assert simulated.races() == []
    made.sum()
    (raced,) = simulated.races()
    assert "does not wait for what stream" in raced
    module.current_stream(sim).wait_stream(side)
    made.sum()
    assert simulated.races() == []
    del made
    assert ["is given back while stream 0 uses it" in race for race in simulated.races()] == [True]
    x.sum().item()
    assert simulated.races() == []


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("where", ["default", "other", "forward", "by turns"])
def test_no_stream_runs_ahead_of_another(device: torch.device, where: str, on_cpu: bool) -> None:
    """The simulated device notes it if one does; see `_no_races`."""
    module: Any = torch.get_device_module(device.type)
    default, other = module.current_stream(device), module.Stream(device)
    taken_on = {"other": lambda _: other, "by turns": lambda epoch: (default, other)[epoch % 2]}.get(
        where, lambda _: default
    )
    run_on = {"forward": lambda _: other}.get(where, taken_on)
    plain, own = scaled(device), scaled(device)
    module.synchronize()
    expected = run_scaled(plain, plain, rows(), lambda _: default, lambda _: default, module)
    if device.type == "sim":
        simulated.races()
    model, loader = torchstage.smart_stage(own, rows(), capacity=2, bypass=False, stage_subgraph_on_cpu=on_cpu)
    with loader:
        found = run_scaled(model, own, loader, taken_on, run_on, module)
    assert all(map(torch.equal, found, expected))
    assert loader.stats.staged_steps == 24


def test_the_hosts_copy_of_state_waits_for_a_write_that_came_late(device: torch.device) -> None:
    """After the stage's stream has waited for the one before: its version is noted, and it is not copied again."""
    module: Any = torch.get_device_module(device.type)
    training, lane = module.Stream(device), lane_of(device, None)
    tensor, copied = torch.ones(1000, device=device), torch.empty(1000)
    copy_of = _Copy(tensor, copied)
    module.synchronize()
    with module.stream(training):
        lane.meet()
        tensor.add_(1)
    with lane.entered():
        copy_of.renew()
    assert copied.tolist() == [2] * 1000


def test_batches_that_were_made_there_are_freed_with_their_tickets(device: torch.device) -> None:
    def batches() -> Iterator[torch.Tensor]:
        for x in rows():
            yield x.to(device)

    model, loader = torchstage.smart_stage(scaled(device), batches(), capacity=2, bypass=False)
    seen = []
    with loader:
        for x in loader:
            model(x)
            seen.append(weakref.ref(x))
    del x
    gc.collect()
    assert loader.stats.staged_steps == len(seen) == 8
    assert all(reference() is None for reference in seen)


def test_a_forward_that_is_recorded_for_a_graph_waits_for_nothing_outside(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = torch.get_device_module(device.type)
    recorded, other = [False], module.Stream(device)
    monkeypatch.setattr(module, "is_current_stream_capturing", lambda: recorded[0], raising=False)
    lent: list[Any] = []
    model, loader = torchstage.smart_stage(scaled(device), rows(), bypass=False)
    with loader:
        for x in loader:
            module.synchronize()  # as recording begins
            monkeypatch.setattr(StreamLane, "lend", lambda _, tensor: lent.append(tensor))
            with module.stream(other):
                recorded[0] = True
                model(x)
                recorded[0] = False
            monkeypatch.undo()
            module.synchronize()
            break
    assert lent == []


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(OptionError, match=r"^device must be one that torch can use here\. Found: 'xla:5'"):
        torchstage.StagedDataLoader([], device="xla:5")


def test_streams_have_numbers_and_a_wrong_one_is_refused() -> None:
    first = torchstage.add_stage_stream()
    assert torchstage.add_stage_stream(priority=-2) == first + 1
    assert torchstage.SmartStageOptions(stage_subgraph_stream_id=first + 1).stage_subgraph_stream_id == first + 1
    with pytest.raises(OptionError, match=rf"add_stage_stream\(\) returned\. There are: 0, .*Found: {first + 2}\."):
        torchstage.SmartStageOptions(stage_subgraph_stream_id=first + 2)
    with pytest.raises(OptionError, match=r"^priority must be a whole number, lower is sooner\. Found: 'high'\.$"):
        torchstage.add_stage_stream(priority="high")  # type: ignore[arg-type]


def test_a_device_without_streams_has_the_null_lane() -> None:
    assert lane_of(torch.device("cpu"), None) is NULL
    assert lane_of(torch.device("mps"), 0) is NULL  # torch.mps has events, and no streams


def test_a_model_on_the_cpu_needs_no_stream() -> None:
    model, loader = torchstage.smart_stage(
        Clicks(), click_loader(64), stage_subgraph_stream_id=torchstage.add_stage_stream(), device="cpu"
    )
    assert loader._shared._carriers.now() is None
    for dense, ids, _ in loader:
        model(dense, ids)
    assert threading.current_thread() is threading.main_thread()


@pytest.mark.parametrize("first", [0, 1])
def test_a_model_that_is_moved_after_its_loader_was_made_is_followed(device: torch.device, first: int) -> None:
    """As trainers do it: before the first pass, or between two."""

    def run(model: nn.Module, batches: Any) -> list[torch.Tensor]:
        torch.manual_seed(11)
        outputs = []
        for number in range(3):
            home = device if number >= first else torch.device("cpu")
            model.to(home)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            for batch in batches:
                homes.append(batch[0].device)
                output = click(model, batch, home)
                optimizer.zero_grad()
                output.square().mean().backward()
                optimizer.step()
                outputs.append(output.detach().cpu())
        return outputs

    homes: list[torch.device] = []
    batches = list(click_loader())
    plain = run(clicks(torch.device("cpu")), batches)
    homes.clear()
    model, loader = torchstage.smart_stage(clicks(torch.device("cpu")), batches, bypass=False)
    staged = run(model, loader)
    assert all(torch.equal(a, b) for a, b in zip(staged, plain, strict=True))
    assert homes == [torch.device("cpu")] * 7 * first + [device] * 7 * (3 - first)
    assert loader.stats.staged_steps == 21


def test_a_copied_model_and_a_loader_of_workers_go_together(device: torch.device) -> None:
    plain = clicks(device)
    model, loader = torchstage.smart_stage(
        copy.deepcopy(plain), DataLoader(click_loader().dataset, batch_size=50, num_workers=1)
    )
    for dense, ids, _ in loader:
        assert model(dense, ids).device == device
