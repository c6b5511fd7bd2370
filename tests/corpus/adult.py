"""Real rows for the corpus: UCI Adult, which comes with the package."""

import functools
from collections.abc import Iterator

import torch

from torchstage import ops
from torchstage._adult import Adult, Texts


@functools.cache
def _data() -> Adult:
    return Adult()


def numbers_and_texts(sizes: tuple[int, ...]) -> Iterator[tuple[torch.Tensor, Texts]]:
    """Yield batches of consecutive rows.

    Args:
        sizes: rows of each batch.

    Yields:
        The standardised numbers, float32 [rows, 6], and the columns of text, NumPy byte strings [rows] each.
    """
    data, start = _data(), 0
    mean, deviation = data.numbers.mean(0), data.numbers.std(0)
    for rows in sizes:
        at = slice(start, start + rows)
        yield (data.numbers[at] - mean) / deviation, [column[at] for column in data.texts]
        start += rows


def numbers_and_codes(sizes: tuple[int, ...], buckets: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the same rows with the columns of text hashed into ``buckets`` codes, int64 [rows, 8]."""
    for numbers, texts in numbers_and_texts(sizes):
        yield numbers, torch.stack([ops.string_to_hash_bucket(column, buckets) for column in texts], dim=1)
