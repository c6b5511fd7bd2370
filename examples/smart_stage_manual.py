"""The second example of the SmartStage documentation: a manual `staged` mark instead of the automatic search.

Run it with ``python examples/smart_stage_manual.py``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from columns import batches
from torch import nn

import torchstage
from torchstage import ops


class Model(nn.Module):
    """As in the first example, but the user says where the stage ends: after the hash, before the append."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(100, 3))

    def forward(self, users: list[str], words: list[str]) -> Any:
        """Return the rows of ``users`` [batch, 3] and ``words`` with one more entry."""
        ids = torchstage.staged(ops.string_to_hash_bucket(users, 10))
        rows = F.embedding(ids, self.table)
        more = words + ["xxx"]  # noqa: RUF005 - the addition is what the graph records
        return rows, more


def main() -> None:
    """Print the target of five steps, and what ran ahead."""
    options = torchstage.SmartStageOptions(num_threads=2, capacity=4, do_smart_stage=False)
    model, loader = torchstage.smart_stage(Model(), batches(), options)
    with torchstage.make_prefetch_hook(loader):
        for users, words in loader:
            print(model(users, words))
    print(loader.plan)


if __name__ == "__main__":
    main()
