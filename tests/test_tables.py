"""The journal's contract, number by number, the optimizers that it knows, and random histories against the plain table."""

import gc
import random
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, Optimizer, SparseAdam
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from torchstage.loaders._optimizers import table_of, why_all_rows
from torchstage.loaders._tables import Reading, Table

ROWS, COLUMNS = 20, 2

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")


def weight_of(rows: int = ROWS) -> nn.Parameter:
    return nn.Parameter(torch.arange(rows * COLUMNS, dtype=torch.float32).view(rows, COLUMNS))


def ids(*rows: int) -> torch.Tensor:
    return torch.tensor(rows)


def gradient(weight: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
    """Return the sparse gradient of lookups of ``rows``, in order."""
    indices = torch.cat(rows)
    return torch.sparse_coo_tensor(indices[None], torch.ones(len(indices), COLUMNS), weight.shape)


def step(table: Table, weight: torch.Tensor, *rows: torch.Tensor) -> None:
    """Take a row-local step on ``rows``, as an optimizer's hooks would tell it."""
    grad = gradient(weight, *rows)
    table.before_step()
    with torch.no_grad():
        weight.add_(grad, alpha=-0.1)
    table.after_step(grad, None)


class Lookup:
    """One lookup of a batch: a reading, and the rows that were copied after it."""

    def __init__(self, table: Table, weight: torch.Tensor, keys: torch.Tensor, copied: bool = True) -> None:
        self.table, self.weight, self.keys = table, weight, keys
        self.reading: Reading | None = table.read([keys])
        self.rows: torch.Tensor | None = None
        if copied:
            self.copy()

    def copy(self) -> None:
        self.rows = self.weight.detach()[self.keys]

    def stale(self) -> list[int] | str | None:
        """Return what `Table.stale_rows` says, positions in order and once each."""
        assert self.reading is not None
        stale = self.table.stale_rows(self.weight, self.reading, 0, self.keys)
        if stale is None or isinstance(stale, str):
            return stale
        assert torch.equal(self.keys[stale.at], stale.keys)
        return sorted(set(stale.at.tolist()))

    def use(self) -> "Lookup":
        """Repair the rows, check them against the table, and finish as a forward with gradients does."""
        stale = self.stale()
        assert self.rows is not None
        if isinstance(stale, list):
            self.rows[stale] = self.weight.detach()[self.keys[stale]]
        if not isinstance(stale, str):
            assert torch.equal(self.rows, self.weight.detach()[self.keys])
            assert self.reading is not None
            self.table.used(self.reading, self.keys)
        self.reading = None
        return self


# ---------------------------------------------------------------- 1: readings


def test_1_a_reading_says_none_some_or_all() -> None:
    weight = weight_of()
    table = Table(weight)
    first, second = Lookup(table, weight, ids(1, 2, 3)), Lookup(table, weight, ids(3, 4, 1))
    assert second.stale() is None
    first.use()
    assert second.stale() is None  # nothing was written yet
    step(table, weight, first.keys)
    assert second.stale() == [0, 2]
    with torch.no_grad():
        weight.add_(1)
    assert second.stale() == "table written outside the optimizer's step"


def test_1_each_gather_of_a_reading_has_its_own_positions() -> None:
    weight = weight_of()
    table = Table(weight)
    first = Lookup(table, weight, ids(5, 6))
    several = [ids(0, 5), ids(6, 6, 1), ids(2)]
    reading = table.read(several)
    first.use()
    step(table, weight, first.keys)
    found = [table.stale_rows(weight, reading, number, keys) for number, keys in enumerate(several)]
    assert [part.at.tolist() for part in found if not isinstance(part, str) and part is not None] == [[1], [0, 1], []]


def test_1_staleness_counts_the_writes_since() -> None:
    weight = weight_of()
    table = Table(weight)
    lookup = Lookup(table, weight, ids(1))
    assert lookup.reading is not None
    for count in range(3):
        assert table.staleness(lookup.reading) == count
        step(table, weight, ids(7))
    table.doubt(whole=True)
    assert table.staleness(lookup.reading) == 4
    assert table.clock == 4


def test_1_row_numbers_out_of_range_are_refused_and_leave_no_reading() -> None:
    weight = weight_of()
    table = Table(weight)
    for bad in (ROWS, -1):
        with pytest.raises((IndexError, RuntimeError)):
            table.read([ids(0, 1), ids(bad)])
    gc.collect()
    assert Lookup(table, weight, ids(0, 1)).use().rows is not None
    assert not table._open


def test_1_int32_row_numbers() -> None:
    weight = weight_of()
    table = Table(weight)
    first, second = Lookup(table, weight, ids(1, 2).int()), Lookup(table, weight, ids(2, 3).int())
    first.use()
    step(table, weight, ids(1, 2))
    assert second.stale() == [0]


# ---------------------------------------------------------------- 2: order


def test_2_a_step_that_overlaps_a_gather_is_a_later_write() -> None:
    """The reading and half of the rows are taken between the two halves of a step."""
    weight = weight_of()
    table = Table(weight)
    first = Lookup(table, weight, ids(1, 2)).use()
    grad = gradient(weight, first.keys)
    table.before_step()
    with torch.no_grad():
        weight[1] -= 1
        second = Lookup(table, weight, ids(0, 1, 2, 3))
        weight[2] -= 1
    table.after_step(grad, None)
    assert second.stale() == [1, 2]
    second.use()


def test_2_an_edit_that_overlaps_a_gather_is_a_later_write() -> None:
    """torch moves the version when an operation is done: a thread that reads during it sees the old one."""
    weight = weight_of()
    table = Table(weight)
    lookup = Lookup(table, weight, ids(1), copied=False)
    with torch.no_grad():
        weight[1] = 7
    lookup.copy()
    assert lookup.stale() == "table written outside the optimizer's step"


def test_2_a_write_before_the_reading_is_in_the_rows() -> None:
    weight = weight_of()
    table = Table(weight)
    with torch.no_grad():
        weight.mul_(2)
    unsure = Lookup(table, weight, ids(1, 2))
    assert isinstance(unsure.stale(), str)  # for all that a reader knows the write may still have been going on
    lookup = Lookup(table, weight, ids(1, 2))
    assert lookup.stale() is None
    lookup.use()


def test_2_a_reader_that_searches_does_not_hold_up_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The race is built: the reader stops in its search; a step on known rows and a look go on without it."""
    weight = weight_of()
    table = Table(weight)
    first = Lookup(table, weight, ids(1, 2)).use()
    searching, go = threading.Event(), threading.Event()
    second: list[Lookup] = []

    class Slow:
        """The journal's memory of the rows, with a search that waits."""

        def __init__(self, seen: torch.Tensor) -> None:
            self.seen = seen

        def index_select(self, *args: Any) -> torch.Tensor:
            searching.set()
            assert go.wait(10)
            return self.seen.index_select(*args)

        def index_fill_(self, *args: Any) -> torch.Tensor:
            return self.seen.index_fill_(*args)

    seen = table._seen
    table._seen = Slow(seen)  # type: ignore[assignment]
    reader = threading.Thread(target=lambda: second.append(Lookup(table, weight, ids(2, 3))))
    reader.start()
    assert searching.wait(10)
    table._seen = seen
    step(table, weight, first.keys)
    go.set()
    reader.join(10)
    assert not reader.is_alive()
    assert second[0].stale() == [0]
    second[0].use()


def test_2_rows_that_are_stamped_wait_for_a_reader_that_searches() -> None:
    """Else the reader would overwrite the stamp, and an earlier reading would not find it."""
    weight = weight_of()
    table = Table(weight)
    early = Lookup(table, weight, ids(4, 5))
    with table._order:  # as a reader does
        stepper = threading.Thread(target=lambda: step(table, weight, ids(5, 6)))
        stepper.start()
        stepper.join(0.05)
        assert stepper.is_alive()
        table._seen.index_fill_(0, ids(5), 2)
    stepper.join(10)
    assert not stepper.is_alive()
    assert early.stale() == [1]
    early.use()


# ---------------------------------------------------------------- 3: suspects


def test_3_suspects_are_the_rows_that_unfinished_readings_look_up_too() -> None:
    weight = weight_of()
    table = Table(weight)
    waiting = Lookup(table, weight, ids(1, 2))
    used = Lookup(table, weight, ids(3, 4)).use()
    dropped = Lookup(table, weight, ids(5, 6))
    dropped.reading = None
    late = Lookup(table, weight, ids(1, 3, 5, 7))
    step(table, weight, used.keys)
    # 1 may be written by a step on the batch that waits; 3 was. Row 5 counts too: serials before it are unfinished.
    assert late.stale() == [0, 1, 2]
    waiting.use()
    step(table, weight, waiting.keys)
    late.use()
    alone = Lookup(table, weight, ids(1, 3, 5, 7))
    step(table, weight, late.keys)
    assert alone.stale() == [0, 1, 2, 3]


def test_3_rows_of_finished_readings_are_no_suspects() -> None:
    weight = weight_of()
    table = Table(weight)
    first = Lookup(table, weight, ids(1, 2)).use()
    step(table, weight, first.keys)
    second = Lookup(table, weight, ids(2, 3)).use()
    third = Lookup(table, weight, ids(1, 2, 3, 4))
    step(table, weight, second.keys)
    assert third.stale() == [1, 2]


def test_3_a_reading_is_unfinished_for_as_long_as_somebody_holds_it() -> None:
    weight = weight_of()
    table = Table(weight)
    held = Lookup(table, weight, ids(1))
    assert list(table._open) == [1]
    held.reading = None
    assert list(table._open) == []


# ---------------------------------------------------------------- 4: proof


def test_4_a_gradient_of_several_readings_in_any_order() -> None:
    weight = weight_of()
    table = Table(weight)
    early = Lookup(table, weight, ids(8, 1, 9))
    one, two, three = (Lookup(table, weight, ids(*rows)).use() for rows in ((1, 2), (3, 3, 4), (5,)))
    late = Lookup(table, weight, ids(0, 2, 4, 5))
    step(table, weight, three.keys, one.keys, two.keys)
    assert early.stale() == [1]
    assert late.stale() == [1, 2, 3]
    assert table._searched_at == 0
    late.use()
    early.use()


UNKNOWN: dict[str, torch.Tensor] = {
    "another rank's": ids(1, 2, 11, 12),
    "coalesced": ids(1, 2, 3),
    "another lookup's": ids(13),
    "a part": ids(1),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_4_other_rows_are_stamped_and_found_by_all_readings_before(name: str) -> None:
    weight = weight_of()
    table = Table(weight)
    early = Lookup(table, weight, ids(0, 1, 11, 13))
    Lookup(table, weight, ids(3, 2, 1)).use()
    step(table, weight, UNKNOWN[name])
    written = set(UNKNOWN[name].tolist())
    stale = early.stale()
    assert isinstance(stale, list)
    assert {int(early.keys[at]) for at in stale} >= written & set(early.keys.tolist())
    assert table._searched_at == 1
    early.use()
    late = Lookup(table, weight, ids(0, 1, 11, 13))
    assert late.stale() is None
    late.use()


def test_4_rows_that_nobody_waits_to_know_are_no_write_of_the_whole_table() -> None:
    """Else gathering ahead would stop, and with it the readings that can tell a later write's rows."""
    weight = weight_of()
    table = Table(weight)
    step(table, weight, ids(1, 2))
    assert table.why_whole is None
    assert table.clock == 1
    lookup = Lookup(table, weight, ids(1, 2))
    assert lookup.stale() is None


def test_4_a_gradient_that_is_not_applied_keeps_its_piece() -> None:
    """A scaler skips a step: the next gradient has other rows, and both lookups are on record."""
    weight = weight_of()
    table = Table(weight)
    Lookup(table, weight, ids(1, 2)).use()
    second = Lookup(table, weight, ids(3, 4)).use()
    late = Lookup(table, weight, ids(2, 4))
    step(table, weight, second.keys)
    assert table._searched_at == 0
    assert set(late.stale() or ()) >= {1}
    late.use()


def test_4_row_numbers_that_were_written_since_are_proof_of_nothing() -> None:
    weight = weight_of()
    table = Table(weight)
    Lookup(table, weight, ids(1, 2)).use()
    late = Lookup(table, weight, ids(1, 7))
    step(table, weight, ids(7, 2))  # the row numbers of the batch were written, and so those of its gradient
    assert 1 in (late.stale() or ())
    late.use()


def test_4_a_reading_of_which_one_lookup_was_stepped_on_is_stale_as_a_whole() -> None:
    weight = weight_of()
    table = Table(weight)
    reading = table.read([ids(1, 2), ids(1, 3)])
    table.used(reading, ids(1, 2))
    step(table, weight, ids(1, 2))
    assert (
        table.stale_rows(weight, reading, 1, ids(1, 3)) == "kept for too long, or written by the step of its own batch"
    )


def test_4_an_empty_gradient_writes_nothing() -> None:
    weight = weight_of()
    table = Table(weight)
    lookup = Lookup(table, weight, ids(1))
    table.before_step()
    table.after_step(gradient(weight, ids().long()), None)
    assert lookup.stale() is None


# ---------------------------------------------------------------- 5: doubt


def test_5_a_step_that_is_not_row_local_writes_all() -> None:
    weight = weight_of()
    table = Table(weight)
    lookup = Lookup(table, weight, ids(1))
    table.before_step()
    table.after_step(gradient(weight, ids(2)), "Adam")
    assert lookup.stale() == "Adam"
    assert table.why_whole == "Adam"


def test_5_a_step_without_a_gradient_writes_all_if_it_moved_the_version() -> None:
    weight = weight_of()
    table = Table(weight)
    lookup = Lookup(table, weight, ids(1))
    table.before_step()
    table.after_step(None, None)
    assert lookup.stale() is None
    table.before_step()
    with torch.no_grad():
        weight.mul_(2)
    table.after_step(None, None)
    assert lookup.stale() == "written without a gradient"


@pytest.mark.parametrize("when", ["before a step", "between readings", "in a step that never ends"])
def test_5_an_edit_in_place_writes_all(when: str) -> None:
    weight = weight_of()
    table = Table(weight)
    first = Lookup(table, weight, ids(1)).use()
    lookup = Lookup(table, weight, ids(2))
    if when == "in a step that never ends":  # it raised
        table.before_step()
    with torch.no_grad():
        weight[2] += 1
    if when == "before a step":
        step(table, weight, first.keys)
    if when == "between readings":
        assert isinstance(Lookup(table, weight, ids(2)).stale(), str)
    assert lookup.stale() == "table written outside the optimizer's step"


@pytest.mark.parametrize("new", ["memory", "part of the same memory", "shape", "dtype"])
def test_5_replaced_memory_counts_as_written(new: str) -> None:
    weight = weight_of()
    pool = torch.zeros(2, ROWS, COLUMNS)
    if new == "part of the same memory":
        weight.data = pool[0]
    table = Table(weight)
    lookup = Lookup(table, weight, ids(1))
    replacement: dict[str, torch.Tensor] = {
        "memory": weight.data.clone(),
        "part of the same memory": pool[1],
        "shape": torch.zeros(2 * ROWS, COLUMNS),
        "dtype": weight.data.double(),
    }
    weight.data = replacement[new]
    assert isinstance(lookup.stale(), str)
    again = Lookup(table, weight, ids(1, ROWS - 1))
    assert again.stale() is None or new == "part of the same memory"  # which may be written under another name


def test_5_another_parameter_is_another_table() -> None:
    weight = weight_of()
    table = Table(weight)
    reading = table.read([ids(1)])
    assert table.stale_rows(weight_of(), reading, 0, ids(1)) == "table replaced"
    assert table.owns(weight)
    assert not table.owns(weight_of())


def test_5_a_doubt_is_a_write_of_all() -> None:
    weight = weight_of()
    table = Table(weight)
    lookup = Lookup(table, weight, ids(1))
    why = table.doubt(whole=True)
    assert lookup.stale() == why
    assert Lookup(table, weight, ids(1)).stale() is None
    table.doubt(whole=False)  # single rows: others may be written the next time
    assert Lookup(table, weight, ids(1)).stale() == why
    assert table.why_whole == why


# ---------------------------------------------------------------- 6: bounds


def test_6_one_int32_per_row_and_at_most_64_pieces() -> None:
    weight = weight_of(1000)
    table = Table(weight)
    numbers = [Lookup(table, weight, torch.arange(i, i + 3)).use().keys for i in range(200)]
    assert table._seen.dtype is torch.int32
    assert table._seen.shape == (1000,)
    assert len(table._pieces) == 64
    late = Lookup(table, weight, torch.arange(0, 1000, 5))
    step(table, weight, *numbers)  # more than are remembered: searched for
    late.use()
    assert len(table._pieces) <= 1


def test_6_readings_and_row_numbers_are_not_kept() -> None:
    weight = weight_of()
    table = Table(weight)
    lookup = Lookup(table, weight, ids(1, 2))
    assert lookup.reading is not None
    reading, keys = weakref.ref(lookup.reading), weakref.ref(lookup.keys)
    lookup.use()
    step(table, weight, ids(1, 2))
    del lookup
    gc.collect()
    assert reading() is None
    assert keys() is None


# ---------------------------------------------------------------- random histories


class History:
    """Everything that may happen to a table, in random order. A lookup checks its rows against the table when used."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.weight = weight_of()
        self.table = Table(self.weight)
        self.lookups: list[Lookup] = []
        self.pending: list[torch.Tensor] = []
        self.repaired = 0

    def keys(self) -> torch.Tensor:
        return ids(*(min(self.random.randrange(ROWS), self.random.randrange(ROWS)) for _ in range(4)))

    def begin(self) -> None:
        self.lookups.append(Lookup(self.table, self.weight, self.keys(), copied=False))

    def copy(self) -> None:
        uncopied = [lookup for lookup in self.lookups if lookup.rows is None]
        if uncopied:
            self.random.choice(uncopied).copy()

    def use(self) -> None:
        copied = [lookup for lookup in self.lookups if lookup.rows is not None]
        if copied:
            lookup = self.random.choice(copied)
            self.lookups.remove(lookup)
            self.repaired += isinstance(lookup.stale(), list)
            self.pending.append(lookup.use().keys)

    def drop(self) -> None:
        if self.lookups:
            self.lookups.pop(self.random.randrange(len(self.lookups)))

    def look_up_elsewhere(self) -> None:
        self.pending.append(self.keys())

    def lose(self) -> None:
        if self.pending:
            self.pending.pop(self.random.randrange(len(self.pending)))

    def step(self) -> None:
        """In two halves, between which the stage's threads may read and copy."""
        self.random.shuffle(self.pending)
        rows = self.pending[: self.random.randint(1, 4)]
        if not rows:
            return
        grad = gradient(self.weight, *rows)
        if self.random.random() < 0.2:
            grad = grad.coalesce()
        halves = grad._indices()[0].unique().split(2)
        self.table.before_step()
        with torch.no_grad():
            for half in halves:
                self.weight.index_add_(0, half, torch.rand(len(half), COLUMNS))
                self.random.choice([self.begin, self.copy, lambda: None])()
        self.table.after_step(grad, None)
        if self.random.random() < 0.8:
            self.pending = self.pending[len(rows) :]

    def edit(self) -> None:
        with torch.no_grad():
            self.weight[self.random.randrange(ROWS)] += 1

    def replace(self) -> None:
        if all(lookup.rows is not None for lookup in self.lookups):
            self.weight.data = self.weight.data + 1

    def run(self, count: int) -> None:
        often = [self.begin, self.copy, self.copy, self.use, self.step]
        seldom = [self.drop, self.look_up_elsewhere, self.lose, self.edit, self.replace]
        for _ in range(count):
            self.random.choice(often if self.random.random() < 0.93 else seldom)()


def test_random_histories_never_leave_a_row_that_differs_from_the_table() -> None:
    repaired = 0
    for seed in range(150):
        history = History(seed)
        history.run(120)
        repaired += history.repaired
    assert repaired > 1000  # most lookups were repaired, not read again as a whole


# ---------------------------------------------------------------- which optimizers are row-local


def test_hooks_on_all_optimizers_are_set_once_and_tables_are_not_kept() -> None:
    post, pre = torch_optimizer._global_optimizer_post_hooks, torch_optimizer._global_optimizer_pre_hooks
    weight, other = weight_of(), weight_of()
    first = table_of(weight)
    second = table_of(other)
    assert table_of(weight) is first
    assert (len(post), len(pre)) == (1, 1)
    gone = [weakref.ref(first), weakref.ref(second)]
    del first, second
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    assert (len(post), len(pre)) == (1, 1)  # removing them might be while torch runs them


def test_a_new_parameter_at_the_address_of_one_that_is_gone_has_a_new_table() -> None:
    weight = weight_of()
    table = table_of(weight)
    known = table_of(weight)
    assert known is table
    del weight, known
    gc.collect()
    others = [weight_of() for _ in range(100)]  # one of them may have the address
    assert all(table_of(other).owns(other) for other in others)


def step_of(optimizer: Optimizer, table: Table) -> str | None:
    """Take a step; return what the journal says of a reading before."""
    weight = optimizer.param_groups[0]["params"][0]
    lookup = Lookup(table, weight, ids(1, 2))
    before = table.clock
    optimizer.step()
    assert table.clock == before + 1
    stale = lookup.stale()
    return stale if isinstance(stale, str) else None


class Derived(SGD):
    pass


KNOWN: dict[str, tuple[Any, bool, str | None]] = {
    "SGD": (lambda p: SGD(p, lr=0.1), True, None),
    "SGD, maximize": (lambda p: SGD(p, lr=0.1, maximize=True), True, None),
    "SGD, a tensor rate": (lambda p: SGD(p, lr=torch.tensor(0.1)), True, None),
    "Adagrad": (lambda p: Adagrad(p, lr_decay=0.1), True, None),
    "SparseAdam": (lambda p: SparseAdam(list(p)), True, None),
    "SGD, dense": (lambda p: SGD(p, lr=0.1), False, "dense gradients under SGD"),
    "Adagrad, dense": (lambda p: Adagrad(p), False, "dense gradients under Adagrad"),
    "Adam": (lambda p: Adam(p), False, "dense gradients under Adam"),
    "SGD, momentum": (lambda p: SGD(p, lr=0.1, momentum=0.5), True, "SGD with momentum"),
    "derived": (lambda p: Derived(p, lr=0.1), True, "Derived"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_which_steps_are_row_local(name: str) -> None:
    make, sparse, why = KNOWN[name]
    weight = weight_of()
    table = table_of(weight)
    weight.grad = gradient(weight, ids(3)) if sparse else torch.ones_like(weight)
    assert step_of(make([weight]), table) == why


def test_weight_decay_is_not_row_local() -> None:
    """torch refuses it for sparse gradients at the step; the group may say so all the same."""
    weight = weight_of()
    weight.grad = gradient(weight, ids(3))
    optimizer = SGD([weight], lr=0.1, weight_decay=0.1)
    assert why_all_rows(optimizer, optimizer.param_groups[0], weight, closure=False) == "SGD with weight_decay"


def test_a_closure_and_step_hooks_may_write_anything() -> None:
    weight = weight_of()
    table = table_of(weight)
    weight.grad = gradient(weight, ids(3))
    optimizer = SGD([weight], lr=0.1)
    assert step_of(optimizer, table) is None
    lookup = Lookup(table, weight, ids(1))
    optimizer.step(lambda: 0.0)
    assert lookup.stale() == "SGD with a closure"
    lookup = Lookup(table, weight, ids(1))
    optimizer.step(closure=lambda: 0.0)
    assert lookup.stale() == "SGD with a closure"
    handles: list[Any] = [optimizer.register_step_post_hook(lambda *_: None)]
    assert step_of(optimizer, table) == "SGD with step hooks"
    handles.pop().remove()
    handles.append(optimizer.register_step_pre_hook(lambda *_: None))
    assert step_of(optimizer, table) == "SGD with step hooks"
    handles.pop().remove()
    handles.append(register_optimizer_step_post_hook(lambda *_: None))
    assert step_of(optimizer, table) == "SGD with step hooks"
    handles.pop().remove()
    assert step_of(optimizer, table) is None


def test_an_optimizer_without_the_table_tells_nothing() -> None:
    weight, other = weight_of(), weight_of()
    table = table_of(weight)
    other.grad = torch.ones_like(other)
    SGD([other], lr=0.1).step()
    assert table.clock == 0
    weight.grad = None
    SGD([weight, other], lr=0.1).step()
    assert table.clock == 0
