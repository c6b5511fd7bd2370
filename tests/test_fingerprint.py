"""string_to_hash_bucket and hash_bucket: numbers equal to TensorFlow's, whatever the form and the place of the text."""

import json
import random
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchstage._ops import _spans
from torchstage.ops import PackedStrings, hash_bucket, pack_strings, string_to_hash_bucket

GOLDEN = Path(__file__).with_name("golden")
MASK = 2**64 - 1
K0, K1, K2 = 0xC3A5C85C97CB3127, 0xB492B66FBE98F273, 0x9AE16A3B2F90404F
WIDE = 2**63 - 1  # nearly all bits of the hash show in the bucket number


def scalar_fingerprint64(text: bytes) -> int:
    """Fingerprint64 of one string in plain Python ints, the oracle of the array version."""
    size = len(text)

    def word(at: int, width: int = 8) -> int:
        return int.from_bytes(text[at : at + width], "little")

    def rotate(value: int, bits: int) -> int:
        value &= MASK
        return (value >> bits | value << (64 - bits)) & MASK

    def shift_mix(value: int) -> int:
        value &= MASK
        return value ^ value >> 47

    def hash_16(first: int, second: int, mul: int) -> int:
        first, second = first & MASK, second & MASK
        inner = shift_mix((first ^ second) * mul)
        return shift_mix((second ^ inner) * mul) * mul & MASK

    def weak(at: int, first: int, second: int) -> tuple[int, int]:
        first += word(at)
        second = rotate(second + first + word(at + 24), 21)
        total = first + word(at + 8) + word(at + 16)
        return (total + word(at + 24)) & MASK, (second + rotate(total, 44) + first) & MASK

    mul = K2 + 2 * size & MASK
    if size == 0:
        return K2
    if size <= 3:
        low = text[0] + (text[size >> 1] << 8)
        high = size + (text[-1] << 2)
        return shift_mix(low * K2 ^ high * K0) * K2 & MASK
    if size <= 7:
        return hash_16(size + (word(0, 4) << 3), word(size - 4, 4), mul)
    if size <= 16:
        a, b = word(0) + K2, word(size - 8)
        return hash_16(rotate(b, 37) * mul + a, (rotate(a, 25) + b) * mul, mul)
    if size <= 64:
        k = K1 if size <= 32 else K2
        a, b, c, d = word(0) * k, word(8), word(size - 8) * mul, word(size - 16) * K2
        y = rotate(a + b, 43) + rotate(c, 30) + d
        z = hash_16(y, a + rotate(b + K2, 18) + c, mul)
        if size <= 32:
            return z
        e, f = word(16) * mul, word(24)
        g, h = (y + word(size - 32)) * mul, (z + word(size - 24)) * mul
        return hash_16(rotate(e + f, 43) + rotate(g, 30) + h, e + rotate(f + a, 18) + g, mul)

    x, y = 81, 81 * K1 + 113 & MASK
    z = shift_mix(y * K2 + 113) * K2 & MASK
    v, w = (0, 0), (0, 0)
    x = x * K2 + word(0)
    loop = (size - 1) // 64 * 64
    for at, last in [*((at, False) for at in range(0, loop, 64)), (size - 64, True)]:
        if last:
            mul = K1 + ((z & 0xFF) << 1)
            w = (w[0] + (size - 1 & 63), w[1])
            v = (v[0] + w[0], v[1])
            w = (w[0] + v[0], w[1])
        factor, k = (9, mul) if last else (1, K1)
        x = rotate(x + y + v[0] + word(at + 8), 37) * k ^ w[1] * factor
        y = rotate(y + v[1] + word(at + 48), 42) * k + v[0] * factor + word(at + 40)
        z = rotate(z + w[0], 33) * k
        v, w = weak(at, v[1] * k, x + w[0]), weak(at + 32, z + w[1], y + word(at + 16))
        x, z = z & MASK, x & MASK
    first = hash_16(v[0], w[0], mul) + shift_mix(y) * K0 + z
    return hash_16(first, hash_16(v[1], w[1], mul) + x, mul)


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    """The script's namespace, plus the stored buckets and the strings they belong to."""
    namespace = runpy.run_path(str(GOLDEN / "make_tf_golden.py"))
    stored = json.loads((GOLDEN / "tf_to_hash_bucket_fast.json").read_text())
    return {**namespace, **stored, "strings": namespace["make_strings"]()}


def oracle(strings: list[bytes], num_buckets: int = WIDE) -> list[int]:
    return [scalar_fingerprint64(text) % num_buckets for text in strings]


def random_strings(seed: int, count: int, longest: int, byte_values: range = range(256)) -> list[bytes]:
    source = random.Random(seed)
    return [bytes(source.choices(byte_values, k=source.randint(0, longest))) for _ in range(count)]


def test_equals_tensorflow(cases: dict[str, Any]) -> None:
    assert len(cases["buckets"]) == len(cases["NUM_BUCKETS"])
    for num_buckets in cases["NUM_BUCKETS"]:
        expected = cases["buckets"][str(num_buckets)]
        assert string_to_hash_bucket(cases["strings"], num_buckets).tolist() == expected
        each = [int(string_to_hash_bucket([text], num_buckets)) for text in cases["strings"]]
        assert each == expected


def test_integers_equal_tensorflow(cases: dict[str, Any]) -> None:
    integers = torch.tensor(cases["make_integers"]())
    for num_buckets in cases["NUM_BUCKETS"]:
        expected = cases["buckets"][str(num_buckets)][-integers.numel() :]
        assert hash_bucket(integers, num_buckets).tolist() == expected


def test_scalar_oracle_equals_tensorflow(cases: dict[str, Any]) -> None:
    assert oracle(cases["strings"], 2**62 + 57) == cases["buckets"][str(2**62 + 57)]


@pytest.mark.parametrize("longest", [3, 7, 16, 32, 64, 128, 300])
def test_random_strings_equal_the_oracle(longest: int) -> None:
    strings = random_strings(longest, 400, longest)
    assert string_to_hash_bucket(strings, WIDE).tolist() == oracle(strings)


@pytest.mark.parametrize("size", [*range(18), 31, 32, 33, 63, 64, 65, 127, 128, 129, 200])
def test_strings_of_one_length_equal_the_oracle(size: int) -> None:
    source = random.Random(size)
    strings = [source.randbytes(size) for _ in range(37)]
    expected = oracle(strings)
    assert string_to_hash_bucket(pack_strings(strings), WIDE).tolist() == expected
    assert string_to_hash_bucket(strings, WIDE).tolist() == expected
    assert string_to_hash_bucket(strings[:1], WIDE).tolist() == expected[:1]


@pytest.mark.parametrize("num_buckets", [1, 2, 3, 7, 1000, 2**31 - 1, 2**32, 2**61 - 1, 2**62, WIDE])
def test_modulo_is_unsigned(num_buckets: int) -> None:
    strings = random_strings(1, 200, 20)
    assert string_to_hash_bucket(strings, num_buckets).tolist() == oracle(strings, num_buckets)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 31, 32, 33, 100])
def test_block_boundaries_change_nothing(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    strings = random_strings(count, count, 150, range(1, 128))
    ids = torch.randint(-(2**63), 2**63 - 1, (count,))
    whole = string_to_hash_bucket(strings, WIDE), hash_bucket(ids, WIDE)
    rows = np.array(strings)
    monkeypatch.setattr(_spans, "BLOCK_ROWS", 16)
    for form in (strings, rows, pack_strings(strings)):
        torch.testing.assert_close(string_to_hash_bucket(form, WIDE), whole[0], rtol=0, atol=0)
    torch.testing.assert_close(hash_bucket(ids, WIDE), whole[1], rtol=0, atol=0)


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_true_block_size(offset: int) -> None:
    count = _spans.BLOCK_ROWS + offset
    strings = [str(index) for index in range(count)]
    buckets = string_to_hash_bucket(strings, WIDE)
    assert torch.equal(buckets, hash_bucket(torch.arange(count), WIDE))
    assert buckets[-3:].tolist() == oracle([text.encode() for text in strings[-3:]])


def to_uint8_rows(strings: list[bytes]) -> torch.Tensor:
    width = max(map(len, strings))
    padded = b"".join(text.ljust(width, b"\0") for text in strings)
    return torch.frombuffer(bytearray(padded), dtype=torch.uint8).reshape(len(strings), width)


FORMS: dict[str, Callable[[list[bytes]], object]] = {
    "list of bytes": list,
    "tuple of bytes": tuple,
    "list of str": lambda strings: [text.decode() for text in strings],
    "mixed list": lambda strings: [text.decode() if index % 2 else text for index, text in enumerate(strings)],
    "list of np.str_": lambda strings: list(np.array([text.decode() for text in strings])),
    "S array": np.array,
    "U array": lambda strings: np.array([text.decode() for text in strings]),
    "big-endian U array": lambda strings: np.array([text.decode() for text in strings]).astype(">U40"),
    "strided S array": lambda strings: np.repeat(np.array(strings), 2)[::2],
    "object array of str": lambda strings: np.array([text.decode() for text in strings], dtype=object),
    "object array of bytes": lambda strings: np.array(strings, dtype=object),
    "uint8 rows": to_uint8_rows,
    "non-contiguous uint8 rows": lambda strings: to_uint8_rows(strings).T.contiguous().T,
    "packed": pack_strings,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("words", ["", "é日本🚀"], ids=["ascii", "non-ascii"])
def test_all_forms_agree(form: str, words: str) -> None:
    alphabet = "abc,XYZ019 " + words
    source = random.Random(form)
    strings = ["".join(source.choices(alphabet, k=source.randint(0, 40))).encode() for _ in range(300)]
    given = FORMS[form](strings)
    assert string_to_hash_bucket(given, WIDE).tolist() == oracle(strings)


@pytest.mark.skipif(not hasattr(np, "dtypes") or not hasattr(np.dtypes, "StringDType"), reason="needs NumPy 2")
def test_string_dtype_arrays() -> None:
    strings = np.array([["a", "é\0"], ["", "long" * 30]], dtype=np.dtypes.StringDType())
    expected = [oracle([text.encode() for text in row]) for row in strings.tolist()]
    assert string_to_hash_bucket(strings, WIDE).tolist() == expected


def test_nul_bytes_inside_strings() -> None:
    strings: list[str | bytes] = ["a\0b", "", "\0", "é\0", b"x\0"]
    expected = oracle([b"a\0b", b"", b"\0", "é\0".encode(), b"x\0"])
    assert string_to_hash_bucket(strings, WIDE).tolist() == expected
    assert pack_strings(strings).to_list() == [b"a\0b", b"", b"\0", "é\0".encode(), b"x\0"]


def test_trailing_nul_of_a_row_is_padding() -> None:
    rows = torch.tensor([[97, 0, 98, 0], [97, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.uint8)
    assert string_to_hash_bucket(rows, WIDE).tolist() == oracle([b"a\0b", b"a", b""])


def test_lengths_of_rows_with_every_highest_bit() -> None:
    rows = np.zeros((21 * 8 * 2, 21), np.uint8)
    strings = []
    for index, row in enumerate(rows):
        at, value = index // 2 % 21, 1 << index // 42
        row[: at + 1] = 255 if index % 2 else 0  # all ones below would round up, were they not cleared
        row[at] = value
        strings.append(row[: at + 1].tobytes())
    assert string_to_hash_bucket(torch.from_numpy(rows), WIDE).tolist() == oracle(strings)


def test_shapes() -> None:
    one: Any = oracle([b"a"])[0]
    rows = torch.full((2, 3, 1), 97, dtype=torch.uint8)
    array = np.full((2, 0, 3), "a")
    assert string_to_hash_bucket([], WIDE).shape == (0,)
    assert string_to_hash_bucket([[], []], WIDE).shape == (2, 0)
    assert string_to_hash_bucket(array, WIDE).shape == (2, 0, 3)
    assert string_to_hash_bucket(np.array("a"), WIDE).tolist() == one
    assert string_to_hash_bucket(rows[0, 0], WIDE).tolist() == one
    assert string_to_hash_bucket(rows, WIDE).tolist() == [[one] * 3] * 2
    assert string_to_hash_bucket(rows[..., :0], WIDE).tolist() == [[K2 % WIDE] * 3] * 2
    assert string_to_hash_bucket([("a", b"a"), ["a", "a"]], WIDE).tolist() == [[one] * 2] * 2
    assert string_to_hash_bucket(PackedStrings(rows[0, 0, :0], torch.tensor([0])), WIDE).shape == (0,)
    assert string_to_hash_bucket(["a"], 10).dtype == torch.int64
    assert hash_bucket(torch.zeros(2, 0, dtype=torch.int32), 10).shape == (2, 0)
    assert hash_bucket(torch.tensor(5), 10).shape == ()


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_hash_bucket_of_every_integer_dtype(dtype: str) -> None:
    limits = np.iinfo(dtype)
    powers = [sign * 10**power + near for power in range(20) for near in (-1, 0, 1) for sign in (1, -1)]
    values = [value for value in [*powers, limits.min, limits.max] if limits.min <= value <= limits.max]
    ids = torch.from_numpy(np.array(values, dtype))
    expected = oracle([str(value).encode() for value in values])
    assert hash_bucket(ids, WIDE).tolist() == expected
    assert hash_bucket(ids.repeat(2, 1).T, WIDE).T.tolist() == [expected] * 2
    assert [int(hash_bucket(each, WIDE)) for each in ids] == expected


def test_inputs_stay_as_they_are() -> None:
    rows = torch.randint(0, 256, (50, 24), dtype=torch.uint8)
    packed = pack_strings(rows)
    ids = torch.randint(-(2**40), 2**40, (50,))
    before = [tensor.clone() for tensor in (rows, *packed, ids)]
    string_to_hash_bucket(rows, 7)
    string_to_hash_bucket(packed, 8)
    hash_bucket(ids, 9)
    for tensor, copy in zip((rows, *packed, ids), before, strict=True):
        assert torch.equal(tensor, copy)
