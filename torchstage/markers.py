"""Marks that a user may put into a forward. In an ordinary forward both are identities."""

from typing import Any

from torch.overrides import handle_torch_function, has_torch_function_unary

from torchstage._structure import map_leaves


def staged(*values: Any) -> Any:
    """Mark a manual boundary: everything that ``values`` are computed from is staged.

    Args:
        *values: tensors, text columns, or containers of them.

    Returns:
        ``values`` unchanged: the one value, or a tuple of several.

    When the model is captured, a value that cannot be staged is a `MarkError` that says why. With
    ``do_smart_stage=True`` the search for more to stage goes on below the mark; with False the stage ends at it.
    """
    return _mark(boundary, values)


def mark_target_node(*values: Any) -> Any:
    """Mark ``values`` as the step's own: they and everything computed from them stay in the main graph.

    Args:
        *values: tensors, text columns, or containers of them.

    Returns:
        ``values`` unchanged: the one value, or a tuple of several.
    """
    return _mark(target, values)


def boundary(value: Any) -> Any:
    """Stand for a `staged` mark in a captured graph; the identity."""
    return value


def target(value: Any) -> Any:
    """Stand for a `mark_target_node` in a captured graph; the identity."""
    return value


def _mark(function: Any, values: tuple[Any, ...]) -> Any:
    def mark(leaf: Any) -> Any:
        # A node per leaf keeps the container a real one, so that a traced forward can go on unpacking it. A tracer sees
        # the call as it sees torch's own functions: through the proxy, or through its torch function mode.
        if hasattr(type(leaf), "__torch_function__") and has_torch_function_unary(leaf):
            return handle_torch_function(function, (leaf,), leaf)
        return leaf

    if len(values) == 1:
        return map_leaves(mark, values[0])
    return tuple(map_leaves(mark, value) for value in values)
