"""Hugging Face Accelerate: prepare the loader, stage, then prepare the model. Gradient accumulation included.

Run it with ``python examples/accelerate_prepare.py``.
"""

from typing import Any

import torch
from accelerate import Accelerator
from clicks import BATCH, Clicks, Rows, compare
from torch import nn
from torch.utils.data import DataLoader

import torchstage


def run(stage: bool, mixed_precision: str = "no") -> tuple[nn.Module, Any]:
    """Train two epochs, with an optimizer step every third batch and at the end of an epoch."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3, mixed_precision=mixed_precision)
    model: Any = Clicks()
    optimizer: Any = torch.optim.Adam(model.parameters(), lr=0.01)
    loader: Any = accelerator.prepare(DataLoader(Rows(), BATCH, shuffle=True))
    if stage:
        model, loader = torchstage.smart_stage(model, loader, capacity=4)
    model, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(model):
                logits = model(batch["numbers"], batch["education"], batch["occupation"])
                loss = nn.functional.binary_cross_entropy_with_logits(logits, batch["label"])
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return torchstage.unwrap(model), loader


if __name__ == "__main__":
    compare(run)
