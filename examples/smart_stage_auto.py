"""The first example of the SmartStage documentation: automatic staging of everything that needs only the batch.

A CSV of text columns: one is hashed and looked up in a table of ones, the other is appended to, the target is marked.

Run it with ``python examples/smart_stage_auto.py``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from columns import batches
from torch import nn

import torchstage
from torchstage import ops


class Model(nn.Module):
    """Hash a column, look it up in a trained table, append to the other column."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(100, 3))

    def forward(self, users: list[str], words: list[str]) -> Any:
        """Return the rows of ``users`` [batch, 3] and ``words`` with one more entry."""
        ids = ops.string_to_hash_bucket(users, 10)
        rows = F.embedding(ids, self.table)
        more = words + ["xxx"]  # noqa: RUF005 - the addition is what the graph records
        return torchstage.mark_target_node((rows, more))


def main() -> None:
    """Print the target of five steps, and what ran ahead."""
    model, loader = torchstage.smart_stage(Model(), batches(), num_threads=2, capacity=4)
    with torchstage.make_prefetch_hook(loader):
        for users, words in loader:
            print(model(users, words))
    print(loader.plan)


if __name__ == "__main__":
    main()
