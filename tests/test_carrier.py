"""The carrier's contract, a test per number, with a lane on the CPU that notes what it is told."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from torchstage._deferred import Deferred
from torchstage._structure import flatten
from torchstage.errors import BatchOverwrittenError
from torchstage.loaders._carrier import Carrier
from torchstage.loaders._pinned import MOST_PIECES
from torchstage.loaders._source import Batch

CPU = torch.device("cpu")


class Lane:
    """Notes what it is told. Copies on the CPU are done at once, so it is the marks that tell when they may count as done."""

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.done = True
        self.inside = 0
        self.stream = "default"

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        self.inside += 1
        yield
        self.inside -= 1

    def mark(self) -> "Mark":
        return Mark(self)

    def settle(self) -> None:
        self.said.append("settle")

    def meet(self) -> str:
        return self.stream

    def follow(self, training: bool = False) -> None:
        self.said.append("follow the training stream" if training else "follow")

    def lend(self, tensor: torch.Tensor) -> None:
        self.said.append(("lend", tensor.untyped_storage().data_ptr()))


class Mark:
    def __init__(self, lane: Lane) -> None:
        self.lane = lane

    def wait(self) -> None:
        self.lane.said.append("wait")

    def query(self) -> bool:
        return self.lane.done

    def synchronize(self) -> None:
        self.lane.said.append("synchronize")
        self.lane.done = True


def batch_of(value: Any) -> Batch:
    leaves = flatten(value)[0]
    texts = frozenset(id(leaf) for leaf in leaves if isinstance(leaf, list))
    return Batch(value, leaves, texts, [(leaf, leaf._version) for leaf in leaves if isinstance(leaf, torch.Tensor)])


@pytest.fixture
def lane() -> Lane:
    return Lane()


@pytest.fixture
def carrier(lane: Lane) -> Carrier:
    return Carrier(CPU, lane, moves_batch=True)


def test_1_a_batch_and_its_staged_values_travel_in_one_piece(carrier: Carrier) -> None:
    batch = batch_of({"x": torch.randn(3, 4), "y": [torch.arange(5), torch.tensor(2.0)]})
    values: list[Any] = [torch.arange(7), (torch.ones(2), 3), "text"]
    carried, found, arrival = carrier.carry(batch, 0, values=values, moved=[True, True, True])
    assert len(arrival.memories) == 1
    memory = arrival.memories[0]
    tensors = [carried.value["x"], *carried.value["y"], found[0], found[1][0]]
    inside = range(memory.data_ptr(), memory.data_ptr() + memory.nbytes)
    assert all(tensor.data_ptr() in inside for tensor in tensors)
    assert torch.equal(carried.value["x"], batch.value["x"])
    assert torch.equal(found[0], values[0])
    assert found[1][1:] == (3,)
    assert found[2] == "text"


def test_2_the_training_thread_waits_for_the_mark_and_for_nothing_else(carrier: Carrier, lane: Lane) -> None:
    _, _, arrival = carrier.carry(batch_of(torch.randn(3)), 0)
    lane.said.clear()
    arrival.wait()
    told = ["wait", ("lend", arrival.memories[0].untyped_storage().data_ptr())]
    assert lane.said == told
    arrival.wait()
    assert lane.said == told
    lane.stream = "another"  # the forward runs on another stream than the loader
    arrival.wait()
    assert lane.said == told + told


def test_3_pinned_memory_is_written_again_only_once_its_copy_is_done(carrier: Carrier, lane: Lane) -> None:
    for _ in range(5):
        carrier.carry(batch_of(torch.randn(3)), 0)
    assert carrier._pinned.pieces == 1  # each copy was done when the next batch came
    lane.done = False
    for _ in range(MOST_PIECES - 1):
        carrier.carry(batch_of(torch.randn(3)), 0)
    assert carrier._pinned.pieces == MOST_PIECES
    assert "synchronize" not in lane.said
    carrier.carry(batch_of(torch.randn(3)), 0)
    assert carrier._pinned.pieces == MOST_PIECES
    assert lane.said.count("synchronize") == 1


def test_3_a_larger_batch_gets_a_larger_piece(carrier: Carrier) -> None:
    for size in (3, 100_000, 50):
        batch = batch_of(torch.randn(size))
        assert torch.equal(carrier.carry(batch, 0)[0].value, batch.value)
    assert carrier._pinned.pieces == 1


def test_4_memory_of_its_own_is_lent_too(carrier: Carrier, lane: Lane) -> None:
    column = torch.randn(64, 1000)[:, 7]
    _, (found,), arrival = carrier.carry(batch_of(torch.randn(3)), 0, values=[column], moved=[True])
    arrival.wait()
    assert ("lend", found.untyped_storage().data_ptr()) in lane.said


def test_4_a_piece_of_memory_is_lent_once(carrier: Carrier, lane: Lane) -> None:
    x = torch.randn(8)
    _, found, arrival = carrier.carry(batch_of(torch.randn(3)), 0, values=[x, x[2:]], moved=[True, True])
    arrival.keep([torch.zeros(1), found[0], found[1], found[1]])
    made = torch.zeros(2)
    arrival.keep([made, made[1:]])
    lane.said.clear()
    arrival.wait()
    lent = [said for said in lane.said if said != "wait"]
    assert len(lent) == len(set(lent)) == len(arrival.memories)


def test_7_what_the_loader_made_on_the_accelerator_is_waited_for_and_lent(lane: Lane) -> None:
    carrier = Carrier(torch.device("meta"), lane, moves_batch=True)
    batch = batch_of([torch.empty(3, device="meta"), 5])
    carried, _, arrival = carrier.carry(batch, 0)
    assert carried.value[0] is batch.value[0]
    assert lane.said == ["follow"]
    assert len(arrival.memories) == 1


def test_5_a_leaf_has_the_strides_that_moving_gives_and_a_value_those_it_had(carrier: Carrier) -> None:
    column = torch.randn(4, 3)[:, 1]
    carried, (value,), _ = carrier.carry(batch_of([column, column.expand(2, 4)]), 0, values=[column], moved=[True])
    assert [leaf.stride() for leaf in carried.value] == [(1,), (4, 1)]
    assert value.stride() == (3,)


def test_5_leaves_share_no_memory_and_values_do(carrier: Carrier) -> None:
    x = torch.zeros(4)
    carried, found, _ = carrier.carry(batch_of([x, x[:2]]), 0, values=[x, x[:2], x], moved=[True] * 3)
    carried.value[0].fill_(1)
    assert carried.value[1].tolist() == [0, 0]
    found[0].fill_(2)
    assert found[1].tolist() == [2, 2]
    assert found[2] is found[0]
    assert x.tolist() == [0, 0, 0, 0]


def test_6_what_does_not_travel_is_handed_on_as_it_is(carrier: Carrier) -> None:
    trained, elsewhere, text = torch.ones(2, requires_grad=True), torch.empty(2, device="meta"), ["a", "b"]
    batch = batch_of({"trained": trained, "elsewhere": elsewhere, "text": text, "number": 3, "none": None})
    carried, _, arrival = carrier.carry(batch, 0)
    assert all(a is b for a, b in zip(carried.leaves, batch.leaves, strict=True))
    assert arrival.memories == []
    values = [torch.ones(2)]
    assert carrier.carry(batch, 0, values=values, moved=[False])[1][0] is values[0]


def test_6_a_deferred_tensor_stands_for_what_stays(carrier: Carrier) -> None:
    batch = batch_of([torch.arange(3), torch.arange(4)])
    carried, _, arrival = carrier.carry(batch, 0, staying={id(batch.leaves[0])})
    assert [type(leaf) for leaf in carried.value] == [Deferred, torch.Tensor]
    assert torch.equal(carried.value[0], batch.value[0])
    assert arrival.memories[0].numel() < 100


def test_sparse_and_nested_tensors_travel_by_themselves(carrier: Carrier) -> None:
    sparse = torch.eye(3).to_sparse()
    carried, (value,), _ = carrier.carry(batch_of([sparse, torch.ones(2)]), 0, values=[sparse], moved=[True])
    assert torch.equal(carried.value[0].to_dense(), torch.eye(3))
    assert torch.equal(value.to_dense(), torch.eye(3))


def test_a_batch_that_was_overwritten_before_it_was_packed_is_an_error_and_later_is_not(carrier: Carrier) -> None:
    batch = batch_of([torch.ones(3), torch.ones(2)])
    carried, _, _ = carrier.carry(batch, 0, staying={id(batch.leaves[1])})
    batch.value[0].fill_(9)
    carried.check_not_overwritten(0)
    assert carried.value[0].tolist() == [1, 1, 1]
    batch.value[1].fill_(9)  # this one stays, and may be moved later
    with pytest.raises(BatchOverwrittenError, match="wrote into batch 5"):
        carried.check_not_overwritten(5)
    with pytest.raises(BatchOverwrittenError, match="wrote into batch 6"):
        carrier.carry(batch, 6)


def test_a_carrier_of_staged_values_alone_leaves_batches_where_they_are(lane: Lane) -> None:
    carrier, batch = Carrier(CPU, lane, moves_batch=False), batch_of([torch.ones(3)])
    carried, (value,), arrival = carrier.carry(batch, 0, values=[batch.leaves[0]], moved=[True])
    assert carried is batch
    assert value is not batch.leaves[0]
    assert len(arrival.memories) == 1
