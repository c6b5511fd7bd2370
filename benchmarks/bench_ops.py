"""Speed of the ops on one core: `pytest benchmarks/bench_ops.py --benchmark-enable`, ns per row in `extra_info`.

The bar for hashing 8-byte strings from packed bytes, modulo included, is 20 million a second: 50 ns each.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from torchstage.ops import (
    PackedStrings,
    hash_bucket,
    pack_strings,
    pad_ragged,
    split_strings,
    string_to_hash_bucket,
    string_to_number,
)

ROWS = 1_000_000
BUCKETS = 1_000_003


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows_of(width: int) -> torch.Tensor:
    letters = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, (ROWS, width), dtype=np.uint8)
    return torch.from_numpy(letters)


def texts_of(low: int, high: int) -> list[str]:
    """Return texts of random letters with lengths from `low` to `high`."""
    lengths = np.random.default_rng(1).integers(low, high + 1, ROWS).tolist()
    letters = rows_of(high).numpy().tobytes().decode()
    return [letters[at * high : at * high + length] for at, length in enumerate(lengths)]


def packed_eights() -> PackedStrings:
    return PackedStrings(rows_of(8).reshape(-1), torch.arange(ROWS + 1) * 8)


def report(benchmark: BenchmarkFixture, call: Callable[[], object], rows: int = ROWS) -> None:
    """Time `call` and note the median in ns per row."""
    benchmark.pedantic(call, rounds=9, warmup_rounds=1)
    if benchmark.stats is not None:  # None where benchmarks are disabled
        median_ns = benchmark.stats.stats.median / rows * 1e9
        benchmark.extra_info["median_ns_per_row"] = round(median_ns, 2)
        print(f"\n{benchmark.name}: {median_ns:.1f} ns per row, {1e3 / median_ns:.1f} million rows/s")


HASHED: dict[str, Callable[[], Any]] = {
    "uint8 rows of 8": lambda: rows_of(8),
    "packed, 8 bytes": packed_eights,
    "list of str, 8 bytes": lambda: texts_of(8, 8),
    "list of bytes, 8 bytes": lambda: [text.encode() for text in texts_of(8, 8)],
    "S8 array": lambda: np.array(texts_of(8, 8), dtype="S"),
    "U8 array": lambda: np.array(texts_of(8, 8)),
    "object array, 8 bytes": lambda: np.array(texts_of(8, 8), dtype=object),
    "list of str, 0 to 16 bytes": lambda: texts_of(0, 16),
    "packed, 0 to 16 bytes": lambda: pack_strings(texts_of(0, 16)),
    "uint8 rows, 1 to 8 bytes": lambda: torch.from_numpy(np.array(texts_of(1, 8), dtype="S").view((np.uint8, 8))),
    "packed, 17 to 32 bytes": lambda: pack_strings(texts_of(17, 32)),
    "packed, 1 to 100 bytes": lambda: pack_strings(texts_of(1, 100)),
}


@pytest.mark.parametrize("form", HASHED)
def test_string_to_hash_bucket(benchmark: BenchmarkFixture, form: str) -> None:
    strings = HASHED[form]()
    report(benchmark, lambda: string_to_hash_bucket(strings, BUCKETS))


@pytest.mark.parametrize("bound", [10**3, 10**7, 2**62], ids=["to 1e3", "to 1e7", "int64"])
def test_hash_bucket(benchmark: BenchmarkFixture, bound: int) -> None:
    ids = torch.randint(-bound, bound, (ROWS,))
    report(benchmark, lambda: hash_bucket(ids, BUCKETS))


NUMBERS: dict[str, Callable[[], list[str]]] = {
    "integers, a third empty": lambda: [
        str(value // 3) if value % 3 else "" for value in np.random.default_rng(2).integers(0, 9999, ROWS).tolist()
    ],
    "all empty": lambda: [""] * ROWS,
    "decimals": lambda: [f"{value:.4f}" for value in np.random.default_rng(2).normal(0, 100, ROWS).tolist()],
    "exponents": lambda: [f"{value:.4e}" for value in np.random.default_rng(2).normal(0, 100, ROWS).tolist()],
}


@pytest.mark.parametrize("column", NUMBERS)
def test_string_to_number(benchmark: BenchmarkFixture, column: str) -> None:
    packed = pack_strings(NUMBERS[column]())
    report(benchmark, lambda: string_to_number(packed))


def test_pack_strings(benchmark: BenchmarkFixture) -> None:
    texts = texts_of(0, 16)
    report(benchmark, lambda: pack_strings(texts))


def test_split_strings(benchmark: BenchmarkFixture) -> None:
    rows = ROWS // 4
    packed = pack_strings(["|".join(texts) for texts in np.array(texts_of(1, 8)).reshape(rows, 4).tolist()])
    report(benchmark, lambda: split_strings(packed, "|"), rows)


@pytest.mark.parametrize("width", [8, 3], ids=["all fit", "some cut"])
def test_pad_ragged(benchmark: BenchmarkFixture, width: int) -> None:
    lengths = torch.randint(0, 9, (ROWS // 4,))
    values = torch.arange(int(lengths.sum()))
    report(benchmark, lambda: pad_ragged(values, lengths, width), ROWS // 4)
