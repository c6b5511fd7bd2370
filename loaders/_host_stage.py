"""The host's part of a stage that goes on on an accelerator, and the search for the operation of a stage that raises."""

import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx

from torchstage._memory import is_in, state_of
from torchstage._mode import Ambient
from torchstage._streams import follow_training
from torchstage._threads import set_intra_op_threads
from torchstage.errors import add_note
from torchstage.loaders._executors import executor
from torchstage.options import SmartStageOptions
from torchstage.stats import Recorder
from torchstage.transforms._lift import Host


class HostStage:
    """Runs the host's part of a stage. Any thread may.

    Args:
        host: what runs.
        ambient: the settings of the training thread. A default device is not among those that count here.
        options: how it is run.
        recorder: where warnings go.
    """

    def __init__(self, host: Host, ambient: Ambient, options: SmartStageOptions, recorder: Recorder) -> None:
        self._part = host.part
        self._run = executor(host.part.module, ambient, options, recorder)
        self._ambient = ambient._replace(device=None)
        self._copies = [_Copy(tensor, copy) for tensor, copy in host.copies.pairs]
        self._lock = threading.Lock()

    def run(self, leaves: Sequence[Any]) -> list[Any]:
        """Return the values for the leaves of a call, on the host.

        Raises:
            Exception: whatever an operation raises, with a note that names its node.
        """
        inputs = [leaves[position] for position in self._part.inputs]
        set_intra_op_threads(self._ambient.threads)
        with self._ambient.entered():
            with self._lock:
                for copy in self._copies:
                    copy.renew()
            try:
                return self._run(*inputs)
            except Exception as error:
                add_note(error, f"in the stage graph of torchstage, {locate(self._part.module, inputs)}")
                raise


class _Copy:
    """The host's copy of a tensor of the model."""

    def __init__(self, tensor: torch.Tensor, copy: torch.Tensor) -> None:
        self._tensor = tensor
        self._copy = copy
        self._state: tuple[Any, ...] | None = None

    def renew(self) -> None:
        """Copy the tensor again if it has changed. What is computed from an old copy meanwhile is refused by its version."""
        if self._state is None or not is_in(self._tensor, self._state):
            self._state = state_of(self._tensor)
            follow_training()  # a write that came since the stage's stream did so is in this state, and queued
            self._copy.copy_(self._tensor)


class _Locator(torch.fx.Interpreter):
    """Runs a graph node by node to find the one that raises."""

    at: torch.fx.Node | None = None

    def run_node(self, n: torch.fx.Node) -> Any:
        self.at = n
        return super().run_node(n)


def locate(module: torch.fx.GraphModule, inputs: list[Any]) -> str:
    """Name the node of a pure graph that raises on ``inputs``, by running it once more."""
    locator = _Locator(module)
    locator.extra_traceback = False
    try:
        locator.run(*inputs, enable_io_processing=False)
    except Exception:  # noqa: BLE001 - the first run's exception is the one that is raised
        node = locator.at
        if node is not None:
            source = node.meta.get("source", "")
            return f"node `{node.name}`{f' from {source}' if source else ''}"
    return "at a node that did not raise when run again"
