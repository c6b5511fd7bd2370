"""Rows of different lengths, laid out as a padded matrix with torch ops, so on any device and with gradients."""

import numpy as np
import torch


def check_ragged(values: object, lengths: object) -> None:
    """Raise an error that says what is wrong unless `lengths` cut `values` into rows."""
    values, lengths = _checked_vector("values", values), _checked_vector("lengths", lengths)
    if lengths.dtype == torch.bool or lengths.dtype.is_floating_point or lengths.dtype.is_complex:
        raise TypeError(f"lengths must be an integer tensor, not {lengths.dtype}")
    if values.device != lengths.device:
        raise ValueError(f"lengths must be on the device of values, {values.device}, not on {lengths.device}")
    if lengths.numel() and lengths.min() < 0:
        index = int(lengths.argmin())
        raise ValueError(f"lengths must not be negative, but lengths[{index}] is {int(lengths[index])}")
    total = int(lengths.sum())
    if total != values.numel():
        raise ValueError(f"lengths must sum to the size of values, {values.numel()}, but their sum is {total}")


def _checked_vector(name: str, tensor: object) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a 1-D tensor, not {type(tensor).__name__}")
    if tensor.dim() != 1:
        raise ValueError(f"{name} must be 1-D, not of shape {list(tensor.shape)}; flatten it")
    return tensor


def checked_width(max_length: object) -> int:
    """Return `max_length` as an int, or raise."""
    if isinstance(max_length, bool) or not isinstance(max_length, int | np.integer):
        raise TypeError(f"max_length must be an int of 0 or more, not {max_length!r} ({type(max_length).__name__})")
    if max_length < 0:
        raise ValueError(f"max_length must be 0 or more, not {max_length}")
    return int(max_length)


def checked_padding(padding_value: object, dtype: torch.dtype) -> float:
    """Return `padding_value` if `dtype` can hold it (a floating dtype may round it), or raise."""
    if not isinstance(padding_value, int | float | np.integer | np.floating):
        raise TypeError(f"padding_value must be a number, not {padding_value!r} ({type(padding_value).__name__})")
    if dtype.is_floating_point or dtype.is_complex:
        return float(padding_value)
    limits = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    if not limits[0] <= padding_value <= limits[1] or padding_value != int(padding_value):
        raise ValueError(
            f"padding_value must be a whole number from {limits[0]} to {limits[1]} for values of {dtype}, "
            f"not {padding_value!r}; convert values to a dtype that can hold it"
        )
    return int(padding_value)


def pad_rows(values: torch.Tensor, lengths: torch.Tensor, width: int, padding: float, keep: str) -> torch.Tensor:
    """Return the matrix [N, width]; see `torchstage.ops.pad_ragged`."""
    if keep not in ("first", "last"):
        raise ValueError(f'keep must be "first" or "last", not {keep!r}')
    kept = lengths.clamp(max=width)
    columns = torch.arange(width, device=values.device)
    inside = columns < kept[:, None]
    if not torch.equal(kept, lengths):
        ends = lengths.cumsum(0)
        firsts = ends - (lengths if keep == "first" else kept)
        values = values[(firsts[:, None] + columns)[inside]]
    padded = torch.full(inside.shape, padding, dtype=values.dtype, device=values.device)
    return padded.masked_scatter(inside, values)
