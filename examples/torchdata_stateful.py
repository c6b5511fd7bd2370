"""torchdata's StatefulDataLoader: staged like any other loader.

Run it with ``python examples/torchdata_stateful.py``.
"""

from typing import Any

from clicks import BATCH, Clicks, Rows, compare, train
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

import torchstage


def run(stage: bool) -> tuple[nn.Module, Any]:
    """Train two epochs."""
    model: Any = Clicks()
    loader: Any = StatefulDataLoader(Rows(), BATCH, shuffle=True)
    if stage:
        model, loader = torchstage.smart_stage(model, loader, capacity=4)
    train(model, loader)
    return torchstage.unwrap(model), loader


if __name__ == "__main__":
    compare(run)
