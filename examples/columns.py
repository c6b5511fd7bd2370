"""The input of both examples: a CSV of two text columns, read two rows at a time."""

import csv
from collections.abc import Iterator
from pathlib import Path


def batches(rows: int = 2) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the columns ``user`` and ``word`` of columns.csv, ``rows`` rows at a time."""
    with Path(__file__).with_name("columns.csv").open(newline="") as file:
        lines = list(csv.reader(file))[1:]
    for start in range(0, len(lines), rows):
        users, words = zip(*lines[start : start + rows], strict=True)
        yield list(users), list(words)
