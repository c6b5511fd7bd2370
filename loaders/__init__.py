"""Run time: the staged loader, its pipeline, and the staged model that recognises its batches."""

from torchstage.loaders._model import StagedModel, unwrap
from torchstage.loaders._staged import StagedDataLoader, make_prefetch_hook

__all__ = ["StagedDataLoader", "StagedModel", "make_prefetch_hook", "unwrap"]
