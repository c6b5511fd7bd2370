"""The buffer pass: buffers shrink to what was used of them, and grow where they were seen empty and full (section 9)."""

import math

from torchstage.autotune._node import Node
from torchstage.autotune._options import ModelOptions
from torchstage.autotune._parameters import BUFFER_SIZE, Parameter


def optimize_buffers(root: Node, ram_budget: float, options: ModelOptions) -> bool:
    """Downsize, then upsize the buffers of a snapshot, and publish; return whether a published value changed."""
    buffers = [node for node in [root, *root.collect_nodes()] if node.is_async]  # D4: also below synchronous nodes
    downsized = [_downsize(node, options.downsize_floor) for node in buffers]
    return _upsize(root, buffers, ram_budget, options.upsize_at_low) or any(downsized)


def _downsize(node: Node, floor: float) -> bool:
    """Section 9, downsizing: a buffer that never ran empty keeps what was used of it, and 3/4 at the least."""
    low, high = node.buffered_elements_low, node.buffered_elements_high
    if low > high:
        return False
    parameters = [p for _, p in node.collect_node_tunable_parameters() if p.name == BUFFER_SIZE]
    changed = False
    for parameter in parameters:
        parameter.value = parameter.published
        used = high - low + 1
        if low > 0 and used < parameter.value:
            smaller = max(used, math.floor(floor * parameter.value), parameter.min)
            changed = changed or smaller != parameter.value
            parameter.value = smaller
    if changed:
        for parameter in parameters:
            parameter.publish()
    return changed


def _upsize(root: Node, buffers: list[Node], ram_budget: float, at_low: int) -> bool:
    """Section 9, upsizing: as far as the memory budget goes, and to the double at the most."""
    candidates = [
        (node, p) for node in buffers for p in node.parameters.values() if _ran_empty_and_full(node, p, at_low)
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
        larger = min(parameter.max, max(1, parameter.min, math.trunc(parameter.value * factor)))  # D15
        if larger != parameter.value:
            parameter.value = larger
            changed = parameter.publish() or changed  # D22
    return changed


def _ran_empty_and_full(node: Node, parameter: Parameter, at_low: int) -> bool:
    full = node.buffered_elements_low <= at_low and node.buffered_elements_high >= parameter.value
    return parameter.name == BUFFER_SIZE and parameter.tunable and full
