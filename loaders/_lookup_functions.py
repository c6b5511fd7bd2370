"""Lookups with rows that were gathered before: forwards that use them, and backwards that are the plain model's own.

Each backward calls the ATen operator that autograd calls for the plain lookup (torch's ``derivatives.yaml``), with the same
arguments: the original row numbers, in their order, not the unique ones. So the gradient of the table has the same form
and the same bits, and any optimizer takes it as it would the plain one.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd import Function

from torchstage.transforms._lookups import Form, Lookup

aten = torch.ops.aten


class Bags(NamedTuple):
    """The bags of a lookup over gathered rows.

    Attributes:
        ids: int32 or int64 [N], the original row numbers.
        offsets: int [B] or [B + 1], where each bag starts.
        places: like ``ids``, for each of them its row among the gathered ones.
        keys: int [M], the original number of each gathered row.
        padding: the gathered row that gets no gradient, or -1.
    """

    ids: torch.Tensor
    offsets: torch.Tensor
    places: torch.Tensor
    keys: torch.Tensor
    padding: int


class Taken:
    """Rows on their way into autograd.

    They are no argument of the function, since autograd makes a view of an argument that is returned, which may not be
    written in place; the plain lookup's result may.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows: torch.Tensor | None = rows

    def pop(self) -> torch.Tensor:
        rows, self._rows = self._rows, None
        assert rows is not None
        return rows


class GatheredRows(Function):
    """The result of `torch.nn.functional.embedding`, ``weight[ids]`` or ``weight.index_select(0, ids)``."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, ids: torch.Tensor, taken: Taken, lookup: Lookup) -> torch.Tensor:
        ctx.set_materialize_grads(False)  # no gradient stays none, as for torch's own functions
        ctx.save_for_backward(ids)
        ctx.lookup, ctx.shape, ctx.options = lookup, weight.shape, (weight.dtype, weight.device)
        return taken.pop()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (ids,), (grad,), lookup = ctx.saved_tensors, grads, ctx.lookup
        if grad is None:
            return None, None, None, None
        grad = grad.to(
            ids.device
        )  # from an accelerator, where the rows were sent: as the plain model's `.to` brings it back
        if lookup.form is Form.INDEX:
            dtype, device = ctx.options
            zeros = torch.zeros(ctx.shape, dtype=dtype, device=device)
            result = aten._index_put_impl_(zeros, [ids], grad, True, True)
        elif lookup.form is Form.SELECT:
            result = aten.index_select_backward(grad, ctx.shape, 0, ids)
        else:
            result = aten.embedding_backward(grad, ids, ctx.shape[0], lookup.padding_idx, lookup.scale, lookup.sparse)
        return result, None, None, None


class BagOfRows(Function):
    """The result of `torch.nn.functional.embedding_bag`."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        sample_weights: torch.Tensor | None,
        rows: torch.Tensor,
        bags: Bags,
        lookup: Lookup,
    ) -> torch.Tensor:
        result, offset2bag, bag_size, largest = aten._embedding_bag(
            rows,
            bags.places,
            bags.offsets,
            lookup.scale,
            lookup.mode,
            lookup.sparse,
            sample_weights,
            lookup.last_offset,
            bags.padding,
        )
        if lookup.mode == 2 and largest.numel():  # the largest rows by their own numbers
            largest = bags.keys[largest.clamp_max(len(bags.keys) - 1)].to(largest.dtype)
        ctx.set_materialize_grads(False)
        kept_rows = rows if sample_weights is not None and sample_weights.requires_grad else None
        saved = bags.ids, bags.offsets, bags.places, sample_weights, offset2bag, bag_size, largest, kept_rows
        # The plain lookup reads the table in the backward for the samples' weights, and raises if it was written since.
        ctx.save_for_backward(*saved, None if kept_rows is None else weight)
        ctx.lookup, ctx.count, ctx.padding = lookup, weight.shape[0], bags.padding
        return result  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ids, offsets, places, sample_weights, offset2bag, bag_size, largest, rows, _ = ctx.saved_tensors
        (grad,), lookup = grads, ctx.lookup
        of_weight = of_samples = None
        if grad is None:
            return None, None, None, None, None
        if ctx.needs_input_grad[0]:
            of_weight = aten._embedding_bag_backward(
                grad,
                ids,
                offsets,
                offset2bag,
                bag_size,
                largest,
                ctx.count,
                lookup.scale,
                lookup.mode,
                lookup.sparse,
                sample_weights,
                lookup.padding_idx,
            )
        if ctx.needs_input_grad[1]:
            of_samples = aten._embedding_bag_per_sample_weights_backward(
                grad, rows, places, offsets, offset2bag, lookup.mode, ctx.padding
            )
        return of_weight, of_samples, None, None, None
