"""Sites: the lookups of a model, each with its table's journal, its plain operation and what it costs."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx

from torchstage.loaders._optimizers import table_of
from torchstage.loaders._sent import destination
from torchstage.loaders._tables import Table
from torchstage.stats import LookupCounts
from torchstage.transforms._hooks import has_hooks
from torchstage.transforms._lift import Gather, Origin
from torchstage.transforms._lookups import Form, Lookup


class Site:
    """One lookup of a model: its table's journal, the plain operation, its figures.

    Args:
        gather: the lookup and where its row numbers come from.
        node: its node in the captured graph.
        max_staleness: None to repair; else how many writes of the table rows may miss.
        figures: its counts.
        device: the accelerator that the step runs on; None for the CPU.

    Attributes:
        destination: the accelerator that the result goes to at once; None if it is used where the table is.
    """

    def __init__(
        self,
        gather: Gather,
        node: torch.fx.Node,
        max_staleness: int | None,
        figures: LookupCounts,
        device: torch.device | None = None,
    ) -> None:
        self.lookup: Lookup = gather.lookup
        self.destination = destination(node, gather.lookup, device)
        self.table: Table = table_of(gather.lookup.weight)
        self.figures = figures
        self.max_staleness = max_staleness
        self.counting = threading.Lock()
        self._usual: dict[bool, float] = {}  # seconds of a lookup in the step, by whether its rows came from ahead
        self._ids = gather.ids
        self._offsets = gather.offsets
        self._plain = _operation(node, gather.lookup)

    def inputs(self) -> list[int]:
        """Return the positions of the leaves that the gather reads."""
        return [o.leaf for o in (self._ids, self._offsets) if o is not None and o.leaf is not None]

    def given(self, leaves: Sequence[Any], values: Sequence[Any]) -> tuple[Any, Any]:
        """Return the row numbers and the bags' starts of a call."""
        return _value(self._ids, leaves, values), _value(self._offsets, leaves, values)

    def why_not(self, records: bool, trying: bool) -> str | None:
        """Say why gathering ahead would be in vain, or None.

        Args:
            records: whether the steps record gradients, so that the table is written between them.
            trying: whether to gather although it was seen to save nothing.
        """
        whole = self.table.why_whole if records and self.max_staleness is None else None
        if whole is not None:
            return whole
        if not trying and len(self._usual) == 2 and self._usual[True] >= self._usual[False]:
            return AS_FAST
        return None

    def kept(self, why: str) -> None:
        """Count a lookup that gathers in the step."""
        with self.counting:
            self.figures.reasons[why] += 1

    def took(self, ahead: bool, seconds: float) -> None:
        """Note how long a lookup in the step took."""
        usual = self._usual.get(ahead, seconds)
        self._usual[ahead] = usual + _LATEST * (seconds - usual)
        if ahead:
            self.figures.used += 1
            self.figures.used_seconds += seconds
        else:
            self.figures.kept += 1
            self.figures.kept_seconds += seconds

    def replaced(self) -> str | None:
        """Say that the layer's table is not the one that was captured, or None."""
        module = self.lookup.module
        if module is None or module._parameters.get("weight") is self.lookup.weight:
            return None  # the table of a function is guarded with the rest of the captured state
        return f"`{self.lookup.table}` was replaced"

    def hooked(self) -> str | None:
        """Say that calling the layer does more than its lookup now, or None."""
        module = self.lookup.module
        if module is None or not (has_hooks(module) or "forward" in module.__dict__ or module._modules):
            return None
        return "the layer has a hook or a forward of its own"

    def run_plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the lookup as the plain model does."""
        return self._plain(*args, **kwargs)

    def out_of_range(self, ids: Any) -> str | None:
        """Name the table, the range and the value if a row number is out of range, else None."""
        module = self.lookup.module
        rows = len(self.lookup.weight if module is None else module.weight)  # type: ignore[arg-type]
        least = -rows if self.lookup.form is Form.INDEX else 0
        if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int64, torch.int32):
            return None
        outside = ids[(ids < least) | (ids >= rows)]
        if not outside.numel():
            return None
        more = f" and {outside.numel() - 1} more" if outside.numel() > 1 else ""
        return (
            f"a row number of the table `{self.lookup.table}` is out of range: it has {rows} rows, so row numbers are "
            f"{least} to {rows - 1}. Found: {int(outside[0])}{more} in a tensor of shape {list(ids.shape)}."
        )


def _value(origin: Origin | None, leaves: Sequence[Any], values: Sequence[Any]) -> Any:
    if origin is None:
        return None
    return leaves[origin.leaf] if origin.leaf is not None else values[origin.value or 0]


def _operation(node: torch.fx.Node, lookup: Lookup) -> Callable[..., Any]:
    """Return what the node calls."""
    if lookup.module is not None:
        return lookup.module
    target: Any = node.target
    if isinstance(target, str):
        return lambda table, *args, **kwargs: getattr(table, target)(*args, **kwargs)
    return target  # type: ignore[no-any-return]


AS_FAST = 'as fast in the step (lookups="auto")'
_LATEST = 0.1  # the weight of the latest lookup in the usual time of one
