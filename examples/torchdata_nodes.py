"""torchdata.nodes: the pipeline of nodes reads, torchstage does what the model's forward does to a batch first.

Run it with ``python examples/torchdata_nodes.py``.
"""

from typing import Any

import torch
from clicks import BATCH, Clicks, Rows, compare, train
from torch import nn
from torch.utils.data import RandomSampler, default_collate
from torchdata import nodes

import torchstage


def run(stage: bool) -> tuple[nn.Module, Any]:
    """Train two epochs."""
    model: Any = Clicks()
    rows = Rows()
    order = RandomSampler(rows, generator=torch.Generator().manual_seed(0))
    picked = nodes.MapStyleWrapper(rows, order)
    batches = nodes.ParallelMapper(nodes.Batcher(picked, BATCH, drop_last=False), default_collate, num_workers=2)
    loader: Any = nodes.Loader(batches)
    if stage:
        model, loader = torchstage.smart_stage(model, loader, capacity=4)
    train(model, loader)
    return torchstage.unwrap(model), loader


if __name__ == "__main__":
    compare(run)
