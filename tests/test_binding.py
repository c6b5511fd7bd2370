"""Binding a batch to forward's arguments: the rules, the canonical form, and errors that show the way out."""

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from torchstage.errors import BindingError
from torchstage.transforms import Binder


class Pair(NamedTuple):
    left: Any
    right: Any


def binder(forward: Callable[..., Any], inputs: Any = None) -> Binder:
    return Binder(model_of(forward), inputs)


def model_of(forward: Callable[..., Any]) -> torch.nn.Module:
    return type("Net", (torch.nn.Module,), {"forward": forward})()


def one(self: Any, x: Any) -> None: ...
def two(self: Any, x: Any, y: Any) -> None: ...
def three(self: Any, x: Any, y: Any, z: Any) -> None: ...
def optional(self: Any, x: Any, y: Any = 1, z: Any = 2) -> None: ...
def all_optional(self: Any, x: Any = 0, y: Any = 1) -> None: ...
def spread(self: Any, *xs: Any) -> None: ...
def one_and_spread(self: Any, x: Any, *rest: Any) -> None: ...
def named(self: Any, x: Any, **rest: Any) -> None: ...
def only_named(self: Any, **rest: Any) -> None: ...
def keyword(self: Any, x: Any, *, mask: Any) -> None: ...
def only_keyword(self: Any, *, mask: Any) -> None: ...
def keyword_optional(self: Any, x: Any, *, mask: Any = None) -> None: ...
def positional(self: Any, x: Any, y: Any, /) -> None: ...
def nothing(self: Any) -> None: ...


def one_and_args(self: Any, x: Any, *args: Any) -> None: ...


Call = tuple[tuple[Any, ...], dict[str, Any]]


# --- the rules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forward", "batch", "call"),
    [
        # a mapping by the names of the parameters
        (two, {"y": 2, "x": 1}, ((1, 2), {})),
        (two, {"label": 3, "x": 1, "y": 2}, ((1, 2), {})),
        (two, collections.OrderedDict(y=2, x=1), ((1, 2), {})),
        (two, collections.UserDict({"y": 2, "x": 1}), ((1, 2), {})),
        (optional, {"x": 1, "z": 3}, ((1,), {"z": 3})),
        (optional, {"x": 1, "y": 2, "z": 3}, ((1, 2, 3), {})),
        (keyword, {"mask": 2, "x": 1, "label": 3}, ((1,), {"mask": 2})),
        (named, {"b": 2, "x": 1}, ((1,), {"b": 2})),
        (only_named, {"b": 2, "a": 1}, ((), {"b": 2, "a": 1})),
        (positional, {"y": 2, "x": 1}, ((1, 2), {})),
        (one_and_args, {"x": 1, "args": 2}, ((1,), {})),
        (named, {"x": 1, "rest": 2}, ((1,), {"rest": 2})),
        # a mapping that shares no name with a forward of one argument is the argument
        (one, {"a": 1, "b": 2}, (({"a": 1, "b": 2},), {})),
        (optional, {"a": 1}, (({"a": 1},), {})),
        # a tuple or list by its leading elements
        (two, (1, 2), ((1, 2), {})),
        (two, [1, 2, 3], ((1, 2), {})),
        (two, Pair(1, 2), ((1, 2), {})),
        (one, (1, 2), ((1,), {})),
        (optional, (1, 2, 3), ((1,), {})),
        (all_optional, (1, 2), ((1,), {})),
        (spread, (1, 2, 3), ((1, 2, 3), {})),
        (one_and_spread, (1, 2, 3), ((1, 2, 3), {})),
        # whose first element spreads if it is a tuple or list and forward requires several
        (two, ((1, 2), "label"), ((1, 2), {})),
        (two, [[1, 2], "label"], ((1, 2), {})),
        (one, ((1, 2), "label"), (((1, 2),), {})),
        (two, (["a", "b"], ["c", "d"]), ((["a", "b"], ["c", "d"]), {})),
        (two, (Pair(1, 2), 3), ((Pair(1, 2), 3), {})),
        # anything else is the only argument
        (one, 1, ((1,), {})),
        (one, "word", (("word",), {})),
        (one, ["a", "b"], ((["a", "b"],), {})),
        (one, ("a", "b"), ((("a", "b"),), {})),
        (one, None, ((None,), {})),
        (keyword_optional, 1, ((1,), {})),
    ],
)
def test_a_batch_binds_by_its_form(forward: Callable[..., Any], batch: Any, call: Call) -> None:
    assert binder(forward).bind(batch) == call


def test_tensors_and_arrays_are_the_only_argument_and_stay_the_same_objects() -> None:
    for batch in (torch.zeros(3, 2), np.zeros((3, 2))):
        args, kwargs = binder(one).bind(batch)
        assert args[0] is batch
        assert kwargs == {}


def test_the_users_function_decides_where_there_is_one() -> None:
    def inputs(batch: Any) -> Any:
        return [batch[1]], collections.OrderedDict(y=batch[0])

    assert binder(two, inputs).bind((1, 2, 3)) == ((2, 1), {})
    assert binder(keyword, lambda batch: ((), {"x": batch, "mask": None})).bind(5) == ((5,), {"mask": None})


def test_an_exception_of_the_users_function_is_not_wrapped() -> None:
    error = KeyError("the user's own")

    def inputs(batch: Any) -> Any:
        raise error

    with pytest.raises(KeyError) as caught:
        binder(one, inputs).bind(1)
    assert caught.value is error


# --- the canonical form ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forward", "args", "kwargs", "call"),
    [
        (two, (1, 2), {}, ((1, 2), {})),
        (two, (1,), {"y": 2}, ((1, 2), {})),
        (two, (), {"y": 2, "x": 1}, ((1, 2), {})),
        (optional, (1,), {}, ((1,), {})),
        (optional, (1,), {"y": 5}, ((1, 5), {})),
        (optional, (1,), {"z": 5}, ((1,), {"z": 5})),
        (optional, (), {"z": 5, "y": 4, "x": 1}, ((1, 4, 5), {})),
        (keyword, (), {"mask": 2, "x": 1}, ((1,), {"mask": 2})),
        (keyword, (1,), {"mask": 2}, ((1,), {"mask": 2})),
        (keyword_optional, (1,), {}, ((1,), {})),
        (spread, (), {}, ((), {})),
        (spread, (1, 2, 3), {}, ((1, 2, 3), {})),
        (one_and_spread, (1, 2, 3), {}, ((1, 2, 3), {})),
        (one_and_spread, (), {"x": 1}, ((1,), {})),
        (named, (), {"x": 1, "b": 2}, ((1,), {"b": 2})),
        (nothing, (), {}, ((), {})),
    ],
)
def test_equal_calls_look_equal(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], call: Call
) -> None:
    assert binder(forward).canonical(args, kwargs) == call
    assert binder(forward).canonical(*call) == call


def test_a_canonical_call_does_what_the_original_does() -> None:
    def forward(self: Any, a: Any, b: Any = 2, *rest: Any, c: Any = 3, **more: Any) -> Any:
        return a, b, rest, c, more

    model = model_of(forward)
    for args, kwargs in (((1,), {}), ((1, 5, 6), {"c": 7}), ((1,), {"b": 5, "z": 8}), ((), {"a": 1, "c": 0})):
        args_now, kwargs_now = Binder(model, None).canonical(args, kwargs)
        assert model(*args_now, **kwargs_now) == model(*args, **kwargs)


@pytest.mark.parametrize(
    ("forward", "args", "kwargs", "problem"),
    [
        (two, (1,), {}, "missing a required argument: 'y'"),
        (two, (1, 2, 3), {}, "too many positional arguments"),
        (two, (1, 2), {"x": 3}, "multiple values for argument 'x'"),
        (two, (1, 2), {"w": 3}, "got an unexpected keyword argument 'w'"),
        (keyword, (1,), {}, "'mask'"),
        (keyword, (1, 2), {}, "too many positional arguments"),
    ],
)
def test_a_call_that_does_not_fit_is_refused_as_python_refuses_it(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], problem: str
) -> None:
    with pytest.raises(BindingError) as caught:
        binder(forward).canonical(args, kwargs)
    assert str(caught.value).startswith("the batch does not bind to Net.forward: ")
    assert problem in str(caught.value).splitlines()[0]
    with pytest.raises(TypeError):
        model_of(forward)(*args, **kwargs)


# --- messages -------------------------------------------------------------------------------------------------------


def message_of(forward: Callable[..., Any], batch: Any, inputs: Any = None) -> str:
    with pytest.raises(BindingError) as caught:
        binder(forward, inputs).bind(batch)
    assert isinstance(caught.value, TypeError)
    return str(caught.value)


def test_a_short_batch_is_shown_with_the_signature_and_a_way_out() -> None:
    def forward(self: Any, x: torch.Tensor, y: torch.Tensor) -> None: ...

    assert message_of(forward, (torch.zeros(32, 4),)) == (
        "the batch does not bind to Net.forward: forward requires 2 positional arguments, the batch has 1.\n"
        "  forward: Net.forward(x: torch.Tensor, y: torch.Tensor) -> None\n"
        "  batch:   (Tensor[32, 4] float32,)\n"
        "  Tell smart_stage how to call the model, for example:\n"
        "    inputs=lambda batch: ((batch[0], batch[0]), {})"
    )


def test_a_mapping_that_lacks_a_name_is_shown_with_a_way_out() -> None:
    def forward(self: Any, x: Any, y: Any) -> None: ...

    assert message_of(forward, {"x": ["a", "b"], "label": np.zeros(2)}) == (
        "the batch does not bind to Net.forward: missing a required argument: 'y'.\n"
        "  forward: Net.forward(x: Any, y: Any) -> None\n"
        "  batch:   {'x': list of 2 text rows, 'label': ndarray[2] float64}\n"
        "  Tell smart_stage how to call the model, for example:\n"
        "    inputs=lambda batch: ((), {'x': batch['x'], 'y': batch['label']})"
    )


@pytest.mark.parametrize(
    "result", [None, (1, 2), ((1,),), ((1,), {}, 3), (torch.zeros(1), {}), [(1,), {}], ((1,), [("y", 2)])]
)
def test_a_users_function_that_returns_no_call_is_told_so(result: Any) -> None:
    text = message_of(two, (1, 2), lambda batch: result)
    start = (
        "the batch does not bind to Net.forward: inputs must return (args, kwargs), a tuple and a dict; it returned "
    )
    assert text.startswith(start)
    assert "  batch:   (int, int)\n" in text


def test_a_users_function_whose_call_does_not_fit_is_told_so() -> None:
    text = message_of(two, (1, 2), lambda batch: ((batch[0],), {}))
    assert text.startswith("the batch does not bind to Net.forward: missing a required argument: 'y'.\n")
    assert "  forward: Net.forward(x: Any, y: Any) -> None\n" in text


def test_inputs_that_are_no_function_are_refused() -> None:
    with pytest.raises(BindingError) as caught:
        binder(one, inputs=("x",))
    assert str(caught.value) == (
        "inputs must be a function from a batch to (args, kwargs) of forward, "
        "for example inputs=lambda batch: ((batch[0],), {}). Found: ('x',)."
    )


@pytest.mark.parametrize(
    ("forward", "batch"),
    [
        (two, (1,)),
        (three, (1, 2)),
        (three, ((1, 2), "label")),
        (two, [["a"]]),
        (two, {"x": 1}),
        (two, {"a": 1, "b": 2, "c": 3}),
        (two, {0: 1, 1: 2}),
        (two, 1),
        (two, torch.zeros(2)),
        (two, ["a", "b"]),
        (keyword, (1, 2)),
        (keyword, 1),
        (keyword, {"x": 1}),
        (keyword, {"mask": 1}),
        (only_keyword, (1, 2)),
        (only_keyword, 1),
        (positional, {"x": 1}),
        (positional, (1,)),
        (nothing, (1,)),
        (nothing, 1),
        (named, {"x": 1, 2: 3}),
    ],
)
def test_the_way_out_that_a_message_shows_really_binds(forward: Callable[..., Any], batch: Any) -> None:
    shown = message_of(forward, batch).splitlines()[-1].strip()
    assert shown.startswith("inputs=lambda batch: ")
    inputs = eval(shown.removeprefix("inputs="))
    args, kwargs = binder(forward, inputs).bind(batch)
    model_of(forward)(*args, **kwargs)
