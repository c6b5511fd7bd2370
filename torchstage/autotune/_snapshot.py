"""Copies of a tree for a search to move about in (section 12.1), and its text (section 12.3)."""

import collections
import copy
import threading
from typing import TYPE_CHECKING

from torchstage.autotune._recorded import InputHistory

if TYPE_CHECKING:
    from torchstage.autotune._node import Node


def snapshot(root: "Node", carry_history: bool = False) -> "Node":
    """Copy the tree below ``root``, which has no output in the copy.

    Parameters are copies too, with the shared state of the original; to publish one moves the model value of the
    original as well (D6). Metrics are not recorded.

    Args:
        root: where the tree begins.
        carry_history: share the input history, which only snapshots are asked for (D12); a new one otherwise.
    """
    twin = _twin(root, None, carry_history)
    waiting = collections.deque([(root, twin)])
    while waiting:
        node, copied = waiting.popleft()
        for other in node.inputs:
            below = _twin(other, copied, carry_history)
            copied.add_input(below)
            waiting.append((other, below))
    return twin


def _twin(node: "Node", output: "Node | None", carry_history: bool) -> "Node":
    with node._lock:
        twin = copy.copy(node)
    twin._lock = threading.RLock()
    twin._inputs = []
    twin.output = output
    twin.parameters = {name: parameter.copy() for name, parameter in node.parameters.items()}
    twin.metrics, twin.record_metrics = None, False
    if not carry_history:
        twin.history = InputHistory()
    return twin


def debug_string(root: "Node") -> str:
    """Return the text of the tree below ``root``, a node after the other with its inputs after it."""
    lines: list[str] = []
    waiting = [root]
    while waiting:
        node = waiting.pop()
        lines.append(f"{node.long_name}:")
        lines += [f"  {key}={_text(value)}" for key, value in zip(_KEYS, _values(node), strict=True)]
        lines.append(f"  inputs={{{''.join(f'{other.long_name},' for other in node.inputs)}}}")
        waiting += reversed(node.inputs)
    return "\n".join(lines) + "\n"


def _values(node: "Node") -> list[float]:
    return [int(node.autotune), *[getattr(node, key) for key in _KEYS[1:]]]


def _text(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


_KEYS = "autotune buffered_bytes buffered_elements bytes_consumed bytes_produced processing_time num_elements".split()
