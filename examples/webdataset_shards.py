"""webdataset: samples from tar files, batched by the data set, staged as they come.

Run it with ``python examples/webdataset_shards.py``.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
import webdataset
from clicks import BATCH, Clicks, Rows, compare, train
from torch import nn
from torch.utils.data import default_collate

import torchstage


def write_shards(folder: Path, shards: int = 2) -> list[str]:
    """Write the rows as tar files and return their paths."""
    rows = Rows()
    paths = [str(folder / f"adult-{number}.tar") for number in range(shards)]
    for number, path in enumerate(paths):
        with webdataset.TarWriter(path) as writer:
            for row in range(number, len(rows), shards):
                sample = rows[row]
                fields = {name: value if isinstance(value, str) else value.tolist() for name, value in sample.items()}
                writer.write({"__key__": f"{row:06}", "json": fields})
    return paths


def run(stage: bool) -> tuple[nn.Module, Any]:
    """Train two epochs."""
    model: Any = Clicks()
    with tempfile.TemporaryDirectory() as folder:
        data = webdataset.WebDataset(write_shards(Path(folder)), shardshuffle=False).shuffle(500, seed=0)
        loader: Any = data.decode().map(_row).batched(BATCH, collation_fn=default_collate)
        if stage:
            model, loader = torchstage.smart_stage(model, loader, capacity=4)
        train(model, loader)
    return torchstage.unwrap(model), loader


def _row(sample: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = sample["json"]
    return fields | {"numbers": torch.tensor(fields["numbers"]), "label": torch.tensor(fields["label"])}


if __name__ == "__main__":
    compare(run)
