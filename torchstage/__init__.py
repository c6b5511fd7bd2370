"""torchstage: overlap the part of a model's forward that needs only the batch with training, with the same numbers."""

from importlib.metadata import PackageNotFoundError, version

from torchstage import autotune, errors, ops
from torchstage._explain import Explanation, explain
from torchstage._smart_stage import Staged, smart_stage
from torchstage._streams import add_stage_stream
from torchstage._threads import add_stage_thread_pool, close_stage_thread_pools
from torchstage.autotune import AUTOTUNE, AutotuneAlgorithm
from torchstage.loaders import StagedDataLoader, StagedModel, make_prefetch_hook, unwrap
from torchstage.markers import mark_target_node, staged
from torchstage.options import SmartStageOptions
from torchstage.stats import Stats
from torchstage.transforms import Plan

try:
    __version__ = version("torchstage")
except PackageNotFoundError:  # a plain checkout that was not installed
    __version__ = "0+unknown"

__all__ = [
    "AUTOTUNE",
    "AutotuneAlgorithm",
    "Explanation",
    "Plan",
    "SmartStageOptions",
    "Staged",
    "StagedDataLoader",
    "StagedModel",
    "Stats",
    "add_stage_stream",
    "add_stage_thread_pool",
    "autotune",
    "close_stage_thread_pools",
    "errors",
    "explain",
    "make_prefetch_hook",
    "mark_target_node",
    "ops",
    "smart_stage",
    "staged",
    "unwrap",
]
