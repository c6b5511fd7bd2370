"""The host's graph: operations of a forward that belong on an accelerator, rewritten to run on the host. Pure."""

from typing import Any

import torch
import torch.fx


class HostCopies:
    """The host's copies of tensors that the model has on an accelerator. Empty until somebody fills them in.

    Args:
        device: the accelerator.

    Attributes:
        pairs: each of the model's tensors with its copy.
    """

    def __init__(self, device: torch.device) -> None:
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._device = device

    def of(self, held: Any) -> Any:
        """Return the copy of a tensor that is on the accelerator; everything else as it is."""
        if not isinstance(held, torch.Tensor) or held.device != self._device:
            return held
        for tensor, copy in self.pairs:
            if tensor is held:
                return copy
        self.pairs.append((held, torch.empty_like(held, device="cpu", requires_grad=False)))
        return self.pairs[-1][1]


def retarget(module: torch.fx.GraphModule, device: torch.device) -> None:
    """Let the operations of a graph that name ``device`` name the CPU instead."""
    for node in module.graph.nodes:
        if node.op == "call_method" and node.target == device.type:  # x.cuda()
            node.target, node.args, node.kwargs = "to", (node.args[0], "cpu"), {}
        elif node.op in ("call_method", "call_function"):
            moves = node.target in ("to", torch.Tensor.to)
            node.args = tuple([_on_host(argument, device, moves) for argument in node.args])
            node.kwargs = {name: _on_host(value, device, name == "device") for name, value in node.kwargs.items()}
    module.recompile()


def _on_host(argument: Any, device: torch.device, moves: bool) -> Any:
    """Return the CPU for the device, and for its name and number where these mean the device that something moves to."""
    named = argument if isinstance(argument, torch.device) else None
    if moves and isinstance(argument, str):
        named = torch.device(argument)
    elif moves and type(argument) is int:
        named = torch.device(device.type, argument)
    return torch.device("cpu") if named is not None and named.type == device.type else argument
