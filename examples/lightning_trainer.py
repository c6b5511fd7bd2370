"""Lightning: the module is staged like any other, and the `Trainer` is given the pair.

Run it with ``python examples/lightning_trainer.py``.
"""

import logging
from typing import Any

import lightning
import torch
from clicks import BATCH, Clicks, Rows, compare
from torch import nn
from torch.utils.data import DataLoader

import torchstage


class Module(lightning.LightningModule):
    """An ordinary LightningModule, whose training_step calls its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Clicks()

    def forward(self, numbers: torch.Tensor, education: list[str], occupation: list[str]) -> Any:
        """Return logits [rows]."""
        return self.net(numbers, education, occupation)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:  # noqa: ARG002 - Lightning's name
        """Return the loss of a batch."""
        logits = self(batch["numbers"], batch["education"], batch["occupation"])
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch["label"])
        self.log("loss", loss, batch_size=len(logits))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=0.01)


def run(stage: bool) -> tuple[nn.Module, Any]:
    """Train two epochs."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module: Any = Module()
    loader: Any = DataLoader(Rows(), BATCH, shuffle=True)
    if stage:
        module, loader = torchstage.smart_stage(module, loader, capacity=4)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return torchstage.unwrap(module), loader


if __name__ == "__main__":
    compare(run)
