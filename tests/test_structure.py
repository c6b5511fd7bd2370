"""What a batch is made of: containers and leaves, new objects of old content, and noticing writes."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from torchstage._structure import (
    Snapshot,
    describe,
    flatten,
    hand_out,
    is_constant,
    is_text,
    is_tracked,
    map_leaves,
    unflatten,
)


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass
class Row:
    number: Any
    word: Any


torch.utils._pytree.register_pytree_node(
    Row, lambda row: ([row.number, row.word], None), lambda leaves, _: Row(*leaves)
)


class Word(str):
    __slots__ = ()


# --- text columns ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [[], ["a"], [b"a", "b"], ("a",), ("a", b"")])
def test_a_list_or_tuple_of_str_and_bytes_is_a_text_column(value: object) -> None:
    assert is_text(value)


@pytest.mark.parametrize(
    "value",
    ["a", b"a", (), [1], ["a", None], ["a", 1], [["a"]], Pair("a", "b"), {"a"}, {"a": "b"}, None, [Word("a")]],
)
def test_anything_else_is_no_text_column(value: object) -> None:
    assert not is_text(value)


# --- flatten and unflatten ------------------------------------------------------------------------------------------


def test_leaves_come_in_order_and_text_columns_are_single_leaves() -> None:
    tensor = torch.zeros(2)
    tree = {"b": (tensor, ["x", "y"]), "a": Pair(1, [("p", "q"), None]), "c": Row(2.5, "w")}
    leaves, _ = flatten(tree)
    assert leaves[0] is tensor
    assert leaves[1:] == [["x", "y"], 1, ("p", "q"), None, 2.5, "w"]


@pytest.mark.parametrize(
    "tree",
    [
        (),
        [],
        {},
        "text",
        3,
        None,
        (1,),
        [1, 2],
        ["x", "y"],
        [["x"], ["y"]],
        {"b": 1, "a": 2},
        collections.OrderedDict(z=1, y=[2, 3]),
        Pair({"k": (1, 2)}, ["t"]),
        Row(Pair(1, 2), [[], ()]),
        ((("a", "b"), {"c": [1.5, Pair([], None)]}), True),
    ],
)
def test_unflatten_undoes_flatten(tree: Any) -> None:
    leaves, spec = flatten(tree)
    again = unflatten(leaves, spec)
    assert again == tree
    assert type(again) is type(tree)
    assert spec.num_leaves == len(leaves)
    if isinstance(tree, dict):
        assert list(again) == list(tree)


def test_equal_structures_have_equal_specs_whatever_the_number_of_text_rows() -> None:
    assert flatten((1, ["x"]))[1] == flatten((2, ["y", "z", "w"]))[1]
    assert flatten((1, ["x"]))[1] != flatten([1, ["x"]])[1]
    assert flatten({"a": 1})[1] != flatten({"b": 1})[1]
    assert flatten((1, [2]))[1] != flatten((1, [2, 3]))[1]


def test_mapping_the_leaves_keeps_the_containers() -> None:
    assert map_leaves(lambda leaf: (leaf, "seen"), {"a": [1, ["t"]], "b": Pair(2, 3)}) == {
        "a": [(1, "seen"), (["t"], "seen")],
        "b": Pair((2, "seen"), (3, "seen")),
    }


# --- kinds of leaves ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", [None, True, "word", b"bytes", torch.float32, torch.device("cpu")])
def test_what_steers_a_forward_is_constant(leaf: object) -> None:
    assert is_constant(leaf)


@pytest.mark.parametrize("leaf", [0, 1.5, torch.zeros(1), np.zeros(1), ["t"], object()])
def test_what_feeds_a_forward_is_not_constant(leaf: object) -> None:
    assert not is_constant(leaf)


def test_changes_can_be_noticed_of_tensors_arrays_numbers_and_text() -> None:
    with torch.inference_mode():
        inference = torch.zeros(1)
    assert all(is_tracked(leaf) for leaf in (torch.zeros(1), np.zeros(1), 1, 1.5, ["t"], ("t",), []))
    assert not any(is_tracked(leaf) for leaf in (inference, object(), None, "word", {1}))


# --- hand_out -------------------------------------------------------------------------------------------------------

LEAVES: dict[str, Callable[[], Any]] = {
    "float tensor": lambda: torch.arange(6.0).reshape(2, 3),
    "integer tensor": lambda: torch.arange(6),
    "scalar tensor": lambda: torch.tensor(3.5),
    "empty tensor": lambda: torch.zeros(0, 3),
    "transposed tensor": lambda: torch.arange(6.0).reshape(2, 3).T,
    "every second column": lambda: torch.arange(12.0).reshape(2, 6)[:, ::2],
    "expanded tensor": lambda: torch.arange(2.0).reshape(2, 1).expand(2, 3),
    "sparse tensor": lambda: torch.eye(3).to_sparse(),
    "array": lambda: np.arange(6.0).reshape(2, 3),
    "column-major array": lambda: np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "every second element": lambda: np.arange(6)[::2],
    "object array": lambda: np.array(["a", None], dtype=object),
    "text array": lambda: np.array(["a", "bc"]),
    "record array": lambda: np.array([(1, 2.0)], dtype=[("x", "i4"), ("y", "f8")]),
    "list column": lambda: ["a", "b"],
    "tuple column": lambda: ("a", b"b"),
    "empty column": list,
}


def same_content(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return bool(a.dtype == b.dtype and torch.equal(a.to_dense(), b.to_dense()))
    if isinstance(a, np.ndarray):
        return bool(a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b))
    return bool(a == b)


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("kind", list(LEAVES))
def test_what_is_handed_out_is_a_new_object_of_the_same_type_and_content(kind: str, copy: bool) -> None:
    leaf = LEAVES[kind]()
    first, second = hand_out(leaf, copy), hand_out(leaf, copy)
    assert first is not leaf
    assert second is not leaf
    assert first is not second
    assert type(first) is type(leaf)
    assert same_content(first, leaf)


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("kind", [k for k in LEAVES if "tensor" in k or "array" in k or "every" in k])
def test_the_layout_in_memory_stays_as_it_is(kind: str, copy: bool) -> None:
    """Operations sum in another order over another layout, so the numbers would change in the last place."""
    leaf = LEAVES[kind]()
    if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
        assert hand_out(leaf, copy).stride() == leaf.stride()
    elif isinstance(leaf, np.ndarray):
        assert hand_out(leaf, copy).strides == leaf.strides


@pytest.mark.parametrize("strided", [lambda x: x[:, ::2], lambda x: x[:, :1].expand(64, 1000), lambda x: x[:, 500:700]])
def test_a_copy_gives_the_same_sums(strided: Callable[[torch.Tensor], torch.Tensor]) -> None:
    leaf = strided(torch.randn(64, 2000, generator=torch.Generator().manual_seed(0)))
    copied = hand_out(leaf, copy=True)
    assert torch.equal(copied.sum(1), leaf.sum(1))
    assert torch.equal(copied.mean(), leaf.mean())


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("step", [1, 2])
def test_a_masked_array_keeps_its_mask(step: int, copy: bool) -> None:
    masked = np.ma.MaskedArray(np.arange(6.0), mask=[False, False, True, False, True, False])[::step]
    handed_out = hand_out(masked, copy)
    assert type(handed_out) is np.ma.MaskedArray
    assert handed_out.tolist() == masked.tolist()
    assert None in handed_out.tolist()


def test_a_view_shares_memory_and_a_copy_does_not() -> None:
    tensor, array = torch.zeros(2), np.zeros(2)
    tensor_view, tensor_copy = hand_out(tensor, copy=False), hand_out(tensor, copy=True)
    array_view, array_copy = hand_out(array, copy=False), hand_out(array, copy=True)
    tensor.fill_(1)
    array.fill(1)
    assert tensor_view.tolist() == array_view.tolist() == [1, 1]
    assert tensor_copy.tolist() == array_copy.tolist() == [0, 0]


def test_a_write_to_the_original_shows_in_the_version_of_a_view() -> None:
    tensor = torch.zeros(2)
    view = hand_out(tensor, copy=False)
    before = view._version
    tensor.add_(1)
    assert view._version != before


@pytest.mark.parametrize("copy", [False, True])
def test_a_text_column_is_always_new_memory(copy: bool) -> None:
    column = ["a", "b"]
    handed_out = hand_out(column, copy)
    column[0] = "changed"
    assert handed_out == ["a", "b"]


@pytest.mark.parametrize("copy", [False, True])
def test_a_tensor_that_requires_grad_and_an_unknown_object_are_handed_out_as_they_are(copy: bool) -> None:
    for leaf in (torch.zeros(1, requires_grad=True), object(), "word", 3, None):
        assert hand_out(leaf, copy) is leaf


# --- snapshots ------------------------------------------------------------------------------------------------------


def nan_array() -> Any:
    return np.array([1.0, float("nan"), -0.0])


def nan_object_array() -> Any:
    return np.array(["a", float("nan"), None], dtype=object)


def string_array() -> Any:
    """NumPy 2's text of any length with a missing row; before NumPy 2 a plain one."""
    if np.lib.NumpyVersion(np.__version__) < "2.0.0":
        return np.array(["some", "", "words"])
    array = np.array(["some", "more", "words"], dtype=np.dtypes.StringDType(na_object=float("nan")))
    array[1] = float("nan")
    return array


UNWRITTEN: list[Callable[[], Any]] = [
    lambda: torch.tensor([1.0, float("nan")]),
    nan_array,
    nan_object_array,
    lambda: np.array([1.0, float("nan")] * 3)[::2],
    lambda: np.array([np.array([1, 2]), np.array([3])], dtype=object),
    lambda: np.array([(1, float("nan"))], dtype=[("x", "i4"), ("y", "f8")]),
    lambda: np.array([(1, "a"), (2, None)], dtype=[("x", "i4"), ("y", object)]),
    string_array,
    lambda: np.zeros((0, 3)),
    lambda: ["a", "b"],
    lambda: ("a", b"b"),
    list,
    lambda: 3,
    lambda: 3.5,
    lambda: float("nan"),
]


@pytest.mark.parametrize("make", UNWRITTEN)
def test_a_leaf_that_nobody_writes_holds(make: Callable[[], Any]) -> None:
    leaf = make()
    assert is_tracked(leaf)
    assert Snapshot.of(leaf).holds(leaf)


def set_item(key: Any, value: Any) -> Callable[[Any], None]:
    def write(leaf: Any) -> None:
        leaf[key] = value

    return write


@pytest.mark.parametrize(
    ("make", "write"),
    [
        (lambda: torch.zeros(3), lambda leaf: leaf.add_(1)),
        (lambda: torch.zeros(3), set_item(0, 0.0)),
        (lambda: torch.zeros(3), lambda leaf: leaf[1:].zero_()),
        (lambda: torch.zeros(3), lambda leaf: leaf.detach().fill_(2)),
        (lambda: torch.zeros(3), lambda leaf: setattr(leaf, "data", leaf + 1)),
        (lambda: torch.zeros(3), lambda leaf: setattr(leaf, "data", leaf.data[1:])),
        (lambda: torch.eye(3), lambda leaf: setattr(leaf, "data", leaf.data.t())),
        (nan_array, set_item(0, 2.0)),
        (nan_array, set_item(1, 0.0)),
        (nan_array, set_item(0, float("nan"))),
        (nan_array, set_item(2, 0.0)),  # -0.0 divides to another infinity
        (nan_object_array, set_item(0, "b")),
        (nan_object_array, set_item(1, None)),
        (lambda: np.array(["a", "bc"]), set_item(0, "x")),
        (lambda: np.array([(1, "a")], dtype=[("x", "i4"), ("y", object)]), set_item(0, (1, "b"))),
        (string_array, set_item(0, "x")),
        (lambda: ["a", "b"], set_item(0, "x")),
        (lambda: ["a", "b"], lambda leaf: leaf.append("c")),
        (lambda: ["a", "b"], lambda leaf: leaf.reverse()),
        (list, lambda leaf: leaf.append("c")),
    ],
)
def test_a_write_is_noticed(make: Callable[[], Any], write: Callable[[Any], None]) -> None:
    leaf = make()
    snapshot = Snapshot.of(leaf)
    write(leaf)
    assert not snapshot.holds(leaf)


def test_a_write_through_another_view_is_noticed() -> None:
    array, tensor = np.zeros(4), torch.zeros(4)
    array_half, tensor_half = array[:2], tensor[:2]
    snapshots = [Snapshot.of(array_half), Snapshot.of(tensor_half)]
    array[0] = 1
    tensor[0] = 1
    assert not snapshots[0].holds(array_half)
    assert not snapshots[1].holds(tensor_half)


def test_text_of_another_type_is_another_text() -> None:
    leaf: list[Any] = ["a"]
    snapshot = Snapshot.of(leaf)
    leaf[0] = b"a"
    assert not snapshot.holds(leaf)


# --- describe -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        (torch.zeros(32, 4), "Tensor[32, 4] float32"),
        (torch.tensor(True), "Tensor[] bool"),
        (np.zeros((2, 3), "i2"), "ndarray[2, 3] int16"),
        (["a"] * 32, "list of 32 text rows"),
        (("a", b"b"), "tuple of 2 text rows"),
        ([], "list of 0 text rows"),
        ((), "()"),
        ((1,), "(int,)"),
        ([1, 2.5], "[int, float]"),
        ({"x": torch.zeros(1), 2: None}, "{'x': Tensor[1] float32, 2: None}"),
        (Pair(True, "word"), "(True, 'word')"),
        (Row(1, 2), "Row"),
        (torch.float16, "torch.float16"),
        ((torch.zeros(2, 1), ["t"]), "(Tensor[2, 1] float32, list of 1 text rows)"),
    ],
)
def test_a_structure_is_described_in_one_line(tree: object, text: str) -> None:
    assert describe(tree) == text
