"""pack, split, pad and parse against plain Python; tracing; what errors say."""

import copy
import pickle
import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx
from torch.utils.data import default_collate

from torchstage import ops
from torchstage._ops import _spans
from torchstage.ops import (
    PackedStrings,
    hash_bucket,
    pack_strings,
    pad_ragged,
    split_strings,
    string_to_hash_bucket,
    string_to_number,
)


@pytest.fixture(params=[None, 16], ids=["one block", "blocks of 16"])
def _block_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(_spans, "BLOCK_ROWS", request.param)


# PackedStrings


def test_packed_strings_round_trip() -> None:
    packed = pack_strings(["ab", b"", "é"])
    assert (packed.data.dtype, packed.offsets.tolist()) == (torch.uint8, [0, 2, 2, 4])
    assert packed.lengths.tolist() == [2, 0, 2]
    assert packed.to_list() == [b"ab", b"", "é".encode()]
    assert pack_strings(packed).to_list() == packed.to_list()
    assert pack_strings([]).to_list() == []
    assert pack_strings(np.array(["ab", "", "c"])).to_list() == [b"ab", b"", b"c"]
    assert pack_strings(torch.tensor([[97, 0], [0, 0], [98, 99]], dtype=torch.uint8)).to_list() == [b"a", b"", b"bc"]


def test_packed_strings_is_a_plain_container() -> None:
    packed = pack_strings(["ab", "c"])
    again = pickle.loads(pickle.dumps(packed))
    assert type(again) is PackedStrings
    assert again.to_list() == packed.to_list()
    assert type(torch.utils._pytree.tree_map(lambda tensor: tensor + 0, packed)) is PackedStrings
    assert type(default_collate([packed, packed])) is PackedStrings


def test_packed_memory_is_writable_and_its_own() -> None:
    text = b"a\0b"
    packed = pack_strings([text, "é"])
    packed.data.zero_()
    assert text == b"a\0b"


# split_strings


def expected_split(strings: list[bytes], sep: bytes) -> list[list[bytes]]:
    return [text.split(sep) if text else [] for text in strings]


@pytest.mark.parametrize("sep", [b",", b"::", b"aa", b"aba", "é".encode(), b"\0"])
def test_split_equals_python(sep: bytes) -> None:
    source = random.Random(repr(sep))
    pieces = [sep, sep[:1], sep[-1:], b"a", b"b", b"xyz", b""]
    for count in (1, 2, 50, 300):
        strings = [b"".join(source.choices(pieces, k=source.randint(0, 8))) for _ in range(count)]
        tokens, lengths = split_strings(strings, sep)
        expected = expected_split(strings, sep)
        assert tokens.to_list() == [token for row in expected for token in row]
        assert lengths.tolist() == [len(row) for row in expected]
        assert lengths.dtype == torch.int64


@pytest.mark.parametrize("strings", [[], [""], ["", ""], [","], ["a", "", ",", "", "b,"]])
def test_split_of_few(strings: list[str]) -> None:
    tokens, lengths = split_strings(strings, ",")
    expected = expected_split([text.encode() for text in strings], b",")
    assert tokens.to_list() == [token for row in expected for token in row]
    assert lengths.tolist() == [len(row) for row in expected]


def test_split_takes_any_flat_form() -> None:
    for form in (
        ["a,b", "", "c"],
        np.array(["a,b", "", "c"]),
        np.array([b"a,b", b"", b"c"]),
        pack_strings(["a,b", "", "c"]),
    ):
        tokens, lengths = split_strings(form, ",")
        assert (tokens.to_list(), lengths.tolist()) == ([b"a", b"b", b"c"], [2, 0, 1])


# pad_ragged


@pytest.mark.parametrize("keep", ["first", "last"])
@pytest.mark.parametrize("width", [0, 1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8, torch.bfloat16])
def test_pad_equals_python(keep: Any, width: int, dtype: torch.dtype) -> None:
    for lengths in ([], [0], [0, 0], [2, 0, 5, 1, 3], [3, 3]):
        values = torch.arange(1, sum(lengths) + 1).to(dtype)
        rows = [list(part) for part in values.tolist() and torch.split(values, lengths)] or [[] for _ in lengths]
        kept = [row[:width] if keep == "first" else row[max(len(row) - width, 0) :] for row in rows]
        expected = [[float(value) for value in row] + [9.0] * (width - len(row)) for row in kept]
        padded = pad_ragged(values, torch.tensor(lengths, dtype=torch.int64), width, 9, keep=keep)
        assert (padded.dtype, padded.shape) == (dtype, (len(lengths), width))
        assert padded.double().tolist() == expected


def test_pad_passes_gradients() -> None:
    values = torch.arange(5.0, requires_grad=True)
    pad_ragged(values, torch.tensor([3, 2]), 2, keep="last").sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0, 1, 1, 1, 1]


# string_to_number


def random_number_texts(seed: int, count: int) -> list[str]:
    source = random.Random(seed)

    def digits(most: int) -> str:
        return "".join(source.choices("0123456789", k=source.randint(0, most)))

    def text() -> str:
        kind = source.randrange(12)
        sign = source.choice(["", "", "-", "+"])
        if kind < 3:
            return sign + digits(20)
        if kind < 6:
            return sign + digits(9) + "." + digits(9)
        if kind == 6:
            return repr(struct.unpack("<d", source.randbytes(8))[0])
        if kind == 7:
            return f"{source.gauss(0, 1):.{source.randint(0, 17)}{source.choice('efg')}}"
        if kind == 8:
            return sign + digits(30) + "." + digits(30)
        if kind == 9:
            return source.choice(
                ["", " ", "\t12\n", "nan", "-inf", "Infinity", "-nan", "1e5", "1E-320", "-0", "-0.0", "."]
            )
        if kind == 10:
            return "".join(source.choices("0123456789.-+e _x", k=source.randint(1, 6)))
        return source.choice(["0." + "0" * 25 + digits(5), digits(5) + "." + "0" * 10])

    return [text() for _ in range(count)]


def python_number(text: str, read: Callable[[str], float], default: float) -> float:
    try:
        return read(text) if text.strip() and "_" not in text else default
    except ValueError:
        return default


@pytest.mark.usefixtures("_block_rows")
def test_floats_equal_python_bit_for_bit() -> None:
    texts = random_number_texts(1, 6000)
    numbers = string_to_number(texts, default=-7.5, dtype=torch.float64, on_error="default")
    expected = np.array([python_number(text, float, -7.5) for text in texts])
    assert numbers.numpy().tobytes() == expected.tobytes()
    narrow = string_to_number(texts, default=-7.5, on_error="default")
    assert narrow.numpy().tobytes() == torch.from_numpy(expected).float().numpy().tobytes()


@pytest.mark.usefixtures("_block_rows")
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64])
def test_integers_equal_python(dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)
    near = [str(limit + step) for limit in (limits.min, limits.max) for step in (-1, 0, 1)]
    texts = random_number_texts(2, 3000) + near + ["9" * 5000]

    def read(text: str) -> int:
        number = int(text)
        return number if limits.min <= number <= limits.max else 3

    numbers = string_to_number(texts, default=3, dtype=dtype, on_error="default")
    assert numbers.dtype == dtype
    assert numbers.tolist() == [python_number(text, read, 3) for text in texts]


@pytest.mark.parametrize("count", [1, 7, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_all_empty_column(count: int, dtype: torch.dtype) -> None:
    for column in ([""] * count, np.array([""] * count), torch.zeros(count, 4, dtype=torch.uint8)):
        assert string_to_number(column, default=-1, dtype=dtype).tolist() == [-1] * count


def test_empty_texts_between_and_at_the_ends() -> None:
    texts = ["", "1", "", "", "-2.5", "", ".5", ""]
    for form in (texts, np.array(texts), pack_strings(texts), np.array(texts, dtype=object)):
        assert string_to_number(form, default=float("inf")).tolist() == [
            float(text) if text else float("inf") for text in texts
        ]
    assert string_to_number([["1", ""], ["3", " 4"]], default=9).tolist() == [[1, 9], [3, 4]]
    assert string_to_number([]).shape == (0,)


def test_sign_behind_a_point_is_no_number() -> None:
    texts = [".-5", "1.2.3", "--1", "+-1", "-", "+", ".", "-.", "1-", "0x10", "1_000", "\uff11"]
    assert string_to_number(texts, default=-7, on_error="default").tolist() == [-7] * len(texts)


# Tracing


OP_CALLS: dict[str, tuple[Callable[[Any], Any], object]] = {
    "string_to_hash_bucket": (lambda x: string_to_hash_bucket(x, 100), pack_strings(["a", "bc"])),
    "string_to_hash_bucket by keyword": (lambda x: string_to_hash_bucket(strings=x, num_buckets=100), ["a", "bc"]),
    "hash_bucket": (lambda x: hash_bucket(x, 100), torch.arange(5)),
    "pack_strings": (pack_strings, ["a", "bc"]),
    "split_strings": (lambda x: split_strings(x, ","), ["a,b", "c"]),
    "string_to_number": (lambda x: string_to_number(x, default=2, dtype=torch.int32), ["1", ""]),
    "pad_ragged": (lambda x: pad_ragged(x, torch.tensor([2, 3]), 4, keep="last"), torch.arange(5)),
    "Proxy in a list": (lambda x: string_to_hash_bucket(["a", x], 100), "b"),
    "Proxy in a nested list": (lambda x: string_to_hash_bucket([["a", x]], 100), "b"),
    "Proxy in PackedStrings": (
        lambda x: string_to_hash_bucket(PackedStrings(x, torch.tensor([0, 1, 3])), 100),
        torch.tensor([1, 2, 3], dtype=torch.uint8),
    ),
}


def op_nodes(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op not in ("placeholder", "output", "get_attr")]


class Call(torch.nn.Module):
    """Calls one function in its forward."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


def flat(result: Any) -> list[torch.Tensor]:
    leaves: list[torch.Tensor] = torch.utils._pytree.tree_leaves(result)
    return leaves


@pytest.mark.parametrize("case", OP_CALLS)
def test_traces_as_one_node(case: str) -> None:
    call, value = OP_CALLS[case]
    traced = fx.symbolic_trace(Call(call))
    nodes = op_nodes(traced.graph)
    if case == "Proxy in PackedStrings":  # torch.fx itself makes a node of a named tuple
        assert nodes.pop(0).target is PackedStrings
    (node,) = nodes
    assert node.op == "call_function"
    assert any(node.target is getattr(ops, name) for name in ops.__all__)
    traced.graph.lint()
    expected = flat(call(value))
    for module in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        result = flat(module(value))
        assert len(result) == len(expected)
        assert all(torch.equal(one, other) for one, other in zip(result, expected, strict=True))


def test_a_whole_prefix_traces() -> None:
    def prefix(text: Any) -> Any:
        tokens, lengths = split_strings(text, "|")
        return pad_ragged(string_to_hash_bucket(tokens, 1000) + 1, lengths, 3)

    traced = fx.symbolic_trace(Call(prefix))
    names = [getattr(node.target, "__name__", "") for node in op_nodes(traced.graph)]
    assert [name for name in names if name in ops.__all__] == ["split_strings", "string_to_hash_bucket", "pad_ragged"]
    text = ["a|b|c|d", "", "e"]
    assert torch.equal(traced(text), prefix(text))


def test_every_op_is_marked_pure_and_named() -> None:
    for name in ops.__all__:
        op = getattr(ops, name)
        assert op.__torchstage_pure__ is True
        assert (op.__module__, op.__name__) == ("torchstage.ops", name)
        assert op.__doc__


# Errors

T = torch.tensor
_BAD_CALLS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: string_to_hash_bucket(["a"], 0), ValueError, r"num_buckets must be an int from 1 to 2\*\*63 - 1, not 0"),
    (
        lambda: hash_bucket(T([1]), 2**63),
        ValueError,
        "num_buckets must .*, not 9223372036854775808; bucket numbers are",
    ),
    (lambda: string_to_hash_bucket(["a"], True), TypeError, r"num_buckets must be an int .*, not True \(bool\)"),
    (lambda: hash_bucket(T([1]), 2.0), TypeError, r"num_buckets must be an int .*, not 2\.0 \(float\)"),  # type: ignore[arg-type]
    (lambda: pack_strings("ab"), TypeError, "strings must be a list .*, not str; put it into a list"),
    (lambda: pack_strings(None), TypeError, "strings must be a list .*, not NoneType$"),
    (lambda: pack_strings(["a", None]), TypeError, r"strings\[1\] must be str or bytes, not None .*; replace missing"),
    (lambda: pack_strings([b"a", 3]), TypeError, r"strings\[1\] must be str or bytes, not 3 \(int\); convert it"),
    (lambda: pack_strings(["a", ["b"]]), TypeError, r"strings\[1\] must be str or bytes, not \['b'\].*lists nest once"),
    (lambda: pack_strings(["\ud800"]), ValueError, r"strings\[0\] = .* has no UTF-8 form: .*; pass bytes"),
    (
        lambda: string_to_hash_bucket([["a"], ["b", "c"]], 5),
        ValueError,
        r"strings\[1\] has 2 elements and strings\[0\] 1; .*split_strings.*pack_strings",
    ),
    (
        lambda: string_to_hash_bucket([["a"], "b"], 5),
        TypeError,
        r"strings\[1\] must be a list like strings\[0\], not 'b'",
    ),
    (lambda: string_to_hash_bucket([["a", None]], 5), TypeError, r"strings\[0\]\[1\] must be str or bytes, not None"),
    (
        lambda: string_to_hash_bucket(np.array([["a"], [None]], dtype=object), 5),
        TypeError,
        r"strings\[1\]\[0\] must be str or bytes, not None",
    ),
    (lambda: pack_strings(np.array([1, 2])), TypeError, "strings must be .*, not a NumPy array of dtype int64"),
    (
        lambda: pack_strings(T([1, 2])),
        TypeError,
        r"torch\.uint8 .*, not torch\.int64 of shape \[2\]; .* use hash_bucket",
    ),
    (lambda: pack_strings(T([1.0])), TypeError, r"torch\.uint8 .*, not torch\.float32 of shape \[1\]$"),
    (lambda: pack_strings(T(1, dtype=torch.uint8)), TypeError, r"not torch\.uint8 of shape \[\]"),
    (
        lambda: pack_strings(torch.empty(2, 3, dtype=torch.uint8, device="meta")),
        ValueError,
        r"strings must have contents, which a tensor on the meta device has not",
    ),
    (
        lambda: pack_strings([["a"]]),
        ValueError,
        r"strings must be one-dimensional here, not of shape \[1, 1\]; flatten",
    ),
    (
        lambda: pack_strings(PackedStrings(T([1]), T([0, 1]))),
        TypeError,
        r"strings\.data must be a 1-D torch\.uint8 tensor, not torch\.int64 \[1\]; make it with pack_strings",
    ),
    (
        lambda: pack_strings(PackedStrings(T([1], dtype=torch.uint8), [0, 1])),  # type: ignore[arg-type]
        TypeError,
        r"strings\.offsets must be a 1-D torch\.int64 tensor, not list",
    ),
    (lambda: split_strings(["a"], ""), ValueError, "sep must not be empty; pass the separator itself"),
    (lambda: split_strings(["a"], 5), TypeError, r"sep must be str or bytes, not 5 \(int\)"),  # type: ignore[arg-type]
    (lambda: split_strings([["a"]], ","), ValueError, "strings must be one-dimensional here"),
    (lambda: hash_bucket([1], 5), TypeError, "ids must be an integer tensor, not list; for text use"),  # type: ignore[arg-type]
    (lambda: hash_bucket(T([1.0]), 5), TypeError, r"ids must be an integer tensor, not torch\.float32; convert it"),
    (lambda: hash_bucket(T([True]), 5), TypeError, r"ids must be an integer tensor, not torch\.bool"),
    (lambda: pad_ragged([1], T([1]), 2), TypeError, "values must be a 1-D tensor, not list"),  # type: ignore[arg-type]
    (lambda: pad_ragged(T([[1]]), T([1]), 2), ValueError, r"values must be 1-D, not of shape \[1, 1\]"),
    (lambda: pad_ragged(T([1]), T([1.0]), 2), TypeError, r"lengths must be an integer tensor, not torch\.float32"),
    (lambda: pad_ragged(T([1]), T([2, -1]), 2), ValueError, r"lengths must not be negative, but lengths\[1\] is -1"),
    (
        lambda: pad_ragged(T([1]), T([2]), 2),
        ValueError,
        "lengths must sum to the size of values, 1, but their sum is 2",
    ),
    (lambda: pad_ragged(T([1]), T([1]), -1), ValueError, "max_length must be 0 or more, not -1"),
    (lambda: pad_ragged(T([1]), T([1]), 2.0), TypeError, r"max_length must be an int .*, not 2\.0"),  # type: ignore[arg-type]
    (
        lambda: pad_ragged(T([1]), T([1]), 2, 0.5),
        ValueError,
        r"padding_value must be a whole number .*torch\.int64, not 0\.5",
    ),
    (
        lambda: pad_ragged(T([1]), T([1]), 2, float("nan")),
        ValueError,
        "padding_value must be a whole number .* not nan",
    ),
    (lambda: pad_ragged(T([1], dtype=torch.uint8), T([1]), 2, -1), ValueError, "whole number from 0 to 255 .* not -1"),
    (lambda: pad_ragged(T([1]), T([1]), 2, "x"), TypeError, "padding_value must be a number, not 'x'"),  # type: ignore[arg-type]
    (lambda: pad_ragged(T([1]), T([1]), 2, keep="all"), ValueError, 'keep must be "first" or "last", not \'all\''),  # type: ignore[arg-type]
    (
        lambda: string_to_number(["1", "x"]),
        ValueError,
        r"strings\[1\] is not a number: 'x'; correct it, or pass on_error=",
    ),
    (lambda: string_to_number([["1"], ["1_0"]]), ValueError, r"strings\[1\]\[0\] is not a number: '1_0'"),
    (lambda: string_to_number([b"\xff"]), ValueError, r"strings\[0\] is not a number: '\\\\xff'"),
    (
        lambda: string_to_number(["300"], dtype=torch.uint8),
        ValueError,
        r"strings\[0\] is not an integer from 0 to 255 \(torch\.uint8\): '300'; .* or another dtype",
    ),
    (lambda: string_to_number(["3.0"], dtype=torch.int64), ValueError, r"strings\[0\] is not an integer .*: '3\.0'"),
    (lambda: string_to_number(["1"], dtype=torch.bool), TypeError, r"dtype must be one of .*, not torch\.bool"),
    (lambda: string_to_number(["1"], default="0"), TypeError, r"default must be a number, not '0' \(str\)"),  # type: ignore[arg-type]
    (
        lambda: string_to_number(["1"], default=0.5, dtype=torch.int8),
        ValueError,
        "default must be a whole number from -128",
    ),
    (lambda: string_to_number(["1"], on_error="skip"), ValueError, 'on_error must be "raise" or "default", not'),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "error", "message"), _BAD_CALLS, ids=[case[2][:40] for case in _BAD_CALLS])
def test_errors_name_the_argument_and_the_rule(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("offsets", [[], [0], [1, 3], [0, 2], [0, 4], [0, 2, 1, 3], [0, -1, 3]])
def test_offsets_that_do_not_fit(offsets: list[int]) -> None:
    packed = PackedStrings(torch.zeros(3, dtype=torch.uint8), torch.tensor(offsets, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"strings\.offsets must begin with 0, never fall and end with .* = 3, not be"):
        string_to_hash_bucket(packed, 5)


def test_numpy_integers_are_ints() -> None:
    count: Any = np.int64(10)
    assert torch.equal(string_to_hash_bucket(["a"], count), string_to_hash_bucket(["a"], 10))
    assert pad_ragged(torch.tensor([1]), torch.tensor([1]), count, count).tolist() == [[1] + [10] * 9]


def test_series_like_objects_are_told_how() -> None:
    class Series:
        def to_numpy(self) -> np.ndarray:
            return np.array(["a"])

    with pytest.raises(TypeError, match=r"not Series; use its to_numpy\(\)"):
        pack_strings(Series())


@pytest.mark.parametrize("column", [["a", "", "some longer text"], [1, -5, 2**40]], ids=["text", "ids"])
def test_an_op_in_a_compiled_function_runs_as_it_is(column: list[Any]) -> None:
    def double(values: Any) -> torch.Tensor:
        hashed = (
            ops.hash_bucket(values, 50) if isinstance(values, torch.Tensor) else ops.string_to_hash_bucket(values, 50)
        )
        return hashed * 2

    values = torch.tensor(column) if isinstance(column[0], int) else column
    torch.compiler.reset()
    assert torch.equal(torch.compile(double, backend="eager")(values), double(values))
