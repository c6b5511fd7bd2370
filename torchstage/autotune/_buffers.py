"""The buffer pass: buffers shrink to what was used of them, and grow where they were seen empty and full (section 9)."""

import math

from torchstage.autotune._node import Node
from torchstage.autotune._options import ModelOptions
from torchstage.autotune._parameters import BUFFER_SIZE, Parameter


def optimize_buffers(root: Node, ram_budget: float, options: ModelOptions) -> bool:
    """Downsize, then upsize the buffers of a snapshot, and publish; return whether a published value changed.

    Args:
        root: the snapshot's root.
        ram_budget: bytes.
        options: ``downsize_floor`` and ``upsize_at_low`` (D19).
    """
    buffers = [node for node in [root, *root.collect_nodes()] if node.is_async]  # D4: also below synchronous nodes
    downsized = [_downsize(node, options.downsize_floor) for node in buffers]
    upsized = _upsize(root, buffers, ram_budget, options.upsize_at_low)
    return upsized or any(downsized)


def _downsize(node: Node, floor: float) -> bool:
    """Section 9, downsizing: a buffer that never ran empty keeps what was used of it, ``floor`` of it at the least."""
    low, high = node.buffered_elements_low, node.buffered_elements_high
    if low > high:
        return False
    tunable = [parameter for _, parameter in node.collect_node_tunable_parameters() if parameter.name == BUFFER_SIZE]
    for parameter in tunable:  # one at the most: names differ
        size = parameter.value = parameter.published
        used = high - low + 1
        if low > 0 and used < size:
            parameter.value = min(size, max(used, math.floor(floor * size), parameter.min))
        if parameter.value != size:
            return parameter.publish()
    return False


def _upsize(root: Node, buffers: list[Node], ram_budget: float, at_low: int) -> bool:
    """Section 9, upsizing: to the double at the most, as far as the memory goes. Over the budget it shrinks (D15)."""
    candidates = [
        (node, p) for node in buffers for p in node.parameters.values() if _seen_empty_and_full(node, p, at_low)
    ]
    for _, parameter in candidates:
        parameter.value = parameter.published
    available = ram_budget - root.total_maximum_buffered_bytes()
    need = sum(
        node.buffered_bytes / node.buffered_elements * parameter.value
        for node, parameter in candidates
        if node.buffered_elements
    )
    factor = 1 + min(1.0, available / need) if need > 0 else 2.0
    changed = False
    for _, parameter in candidates:
        parameter.value = min(parameter.max, max(1, parameter.min, math.trunc(parameter.value * factor)))
        changed = parameter.publish() or changed  # compares under the lock of the state (D22)
    return changed


def _seen_empty_and_full(node: Node, parameter: Parameter, at_low: int) -> bool:
    full = node.buffered_elements_low <= at_low and node.buffered_elements_high >= parameter.value
    return parameter.name == BUFFER_SIZE and parameter.tunable and full
