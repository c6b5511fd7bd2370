"""A graph run node by node, so that somebody may look at each."""

from collections.abc import Sequence
from typing import Any

import torch.fx


class Interpreter(torch.fx.Interpreter):
    """`torch.fx.Interpreter` that makes no progress bar: `run` makes one of tqdm's, whose thread lives on for good."""

    def run_all(self, inputs: Sequence[Any]) -> Any:
        """Run the graph's nodes by `run_node`; return what the graph returns.

        Raises:
            Exception: whatever an operation raises, as it is.
        """
        self.env = {}
        self.args_iter = iter(inputs)
        value = None
        for node in self.graph.nodes:
            self.env[node] = value = self.run_node(node)
            for dead in self.user_to_last_uses.get(node, ()):
                del self.env[dead]
        self.env = {}
        return value  # of the last node, the output
