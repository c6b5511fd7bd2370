"""Packing: what comes out of a copy of the packed memory is what went in, bit for bit and stride for stride."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchstage.loaders._packing import ALIGNMENT, pack

DTYPES = [torch.float32, torch.int64, torch.int8, torch.float64, torch.bool, torch.bfloat16, torch.complex64]


def carried(tensors: list[torch.Tensor], apart: int = 0) -> list[torch.Tensor]:
    packing = pack(tensors, apart)
    memory = torch.full((max(packing.nbytes, 1) + 100,), 0xCD, dtype=torch.uint8)
    packing.write(memory)
    return packing.read(memory[: packing.nbytes].clone())


def assert_same(found: list[torch.Tensor], tensors: list[torch.Tensor]) -> None:
    assert len(found) == len(tensors)
    for a, b in zip(found, tensors, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert torch.equal(a, b)


def test_tensors_of_all_forms() -> None:
    base = torch.randn(6, 4)
    tensors = [
        base,
        base[:, 1],
        base.t(),
        base[2:, 1:3],
        torch.tensor(3),
        torch.empty(0, 4),
        torch.empty(3, 0),
        torch.ones(1).expand(100),
        torch.randn(3, 1).expand(3, 50),
        torch.randn(100, 100)[:, 3],
        torch.randn(9)[3:],
        torch.arange(5, dtype=torch.int8),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ]
    assert_same(carried(tensors), tensors)
    assert_same(carried(tensors, apart=len(tensors)), tensors)
    assert carried([]) == []


@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 9), st.integers(1, 5), st.integers(0, 3)), max_size=6)
)
def test_any_list_of_slices_of_any_dtypes(shapes: list[tuple[torch.dtype, int, int, int]]) -> None:
    tensors = []
    for dtype, rows, step, start in shapes:
        base = torch.randint(0, 2 if dtype is torch.bool else 100, (rows + 4, 3)).to(dtype)
        tensors += [base[start::step], base[:, start % 3]]
    assert_same(carried(tensors), tensors)
    assert_same(carried(tensors, apart=1), tensors)


def test_every_part_begins_where_wide_vectors_may() -> None:
    tensors = [torch.arange(n, dtype=torch.int8) for n in (1, 3, 65, 64)]
    packing = pack(tensors)
    assert [part.offset % ALIGNMENT for part in packing.parts] == [0, 0, 0, 0]
    assert packing.nbytes == ALIGNMENT * 5
    column = pack([torch.zeros(100)[17:]])  # 68 bytes into its storage: 4 beyond a boundary there, and here too
    assert [piece.start for piece in column.slices] == [4]
    apart = pack(
        [torch.zeros(100)[17:], torch.zeros(8, 8)[1:, :3]], apart=2
    )  # moved by itself it begins where memory does
    assert [piece.start % ALIGNMENT for piece in apart.slices] == [0, 0]


def test_on_the_host_a_tensor_that_is_alone_is_made_without_an_operation_of_torch() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = [torch.arange(5), base.clone(), base.t(), torch.tensor(2.0), torch.ones(3, dtype=torch.bool)]
    half = torch.ones(3, dtype=torch.bfloat16)  # NumPy has none
    found = carried([*tensors, half, half.view(-1)])
    assert_same(found, [*tensors, half, half])
    memory = {tensor.untyped_storage().data_ptr() for tensor in found[len(tensors) :]}
    assert len(memory) == 1
    found[0].add_(1)
    assert [tensor._version for tensor in found[:2]] == [1, 0]


def test_values_that_share_memory_share_it_again_and_are_sent_once() -> None:
    base = torch.arange(20.0).reshape(4, 5)
    packing = pack([base, base[:, 1], base.view(-1)])
    assert len(packing.parts) == 1
    found = carried([base, base[:, 1], base.view(-1)])
    found[1].fill_(-1)
    assert found[0][:, 1].tolist() == [-1.0] * 4
    assert found[2][1] == -1


def test_what_is_to_be_apart_shares_nothing() -> None:
    base = torch.arange(20.0).reshape(4, 5)
    first, second = carried([base, base], apart=2)
    first.fill_(-1)
    assert torch.equal(second, base)


def test_a_column_of_a_wide_matrix_does_not_take_the_matrix_along() -> None:
    wide = torch.randn(64, 1000)
    packing = pack([wide[:, 7]])
    assert packing.nbytes == 64 * 4
    own: list[torch.Tensor] = []
    memory = torch.empty(packing.nbytes, dtype=torch.uint8)
    packing.write(memory)
    (found,) = packing.read(memory, own.append)
    assert found.stride() == (1000,)
    assert [tensor is found for tensor in own] == [True]
    assert torch.equal(found, wide[:, 7])


@pytest.mark.parametrize("rows", [1, 2])
def test_an_expanded_value_takes_its_elements_once(rows: int) -> None:
    packing = pack([torch.randn(rows, 1).expand(rows, 10_000)])
    assert packing.nbytes == ALIGNMENT
