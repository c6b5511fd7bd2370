"""How a stage graph is run: in the calling thread, or in a process of its own."""

from collections.abc import Callable
from typing import Any

import torch.fx

from torchstage._mode import Ambient
from torchstage.loaders._process import ProcessStage
from torchstage.options import SmartStageOptions
from torchstage.stats import Recorder
from torchstage.transforms._fuse import fuse


def executor(
    module: torch.fx.GraphModule, ambient: Ambient, options: SmartStageOptions, recorder: Recorder
) -> Callable[..., list[Any]]:
    """Return what runs a stage graph as the options say.

    Args:
        module: the graph.
        ambient: the settings of the training thread.
        options: the loader's.
        recorder: where warnings go.
    """
    fused = fuse(module)
    works = any(node.op.startswith("call_") for node in fused.graph.nodes)
    if options.stage_executor == "process" and works:
        return ProcessStage(fused, fused.forward, ambient, recorder)
    return fused.forward
