"""Rows of a table on the host that the step wants on an accelerator: each row travels once, ahead, and is spread out there."""

from collections.abc import Sequence

import torch
import torch.fx

from torchstage._streams import has_streams
from torchstage.transforms._lookups import Form, Lookup


class Sent:
    """The rows of one lookup for one batch, each once.

    Args:
        places: int [N], for each row number of the batch its row among those that were gathered.
    """

    def __init__(self, places: torch.Tensor) -> None:
        self._places = places
        self._rows: torch.Tensor | None = None

    def load(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Return what is to travel: ``rows``, [M, columns] on the host, and the places."""
        return [rows, self._places]

    def arrive(self, rows: torch.Tensor, places: torch.Tensor) -> None:
        """Note what has arrived for `load`."""
        self._rows, self._places = rows, places

    def repair(self, at: torch.Tensor, rows: torch.Tensor) -> None:
        """Send the rows at the positions ``at``, int64 [K], of ``rows`` on the host once more, into those that are there."""
        assert self._rows is not None
        device, parts = self._rows.device, (at, rows.index_select(0, at))
        if has_streams(device):  # out of pinned memory the training thread does not wait for what is queued there
            parts = (parts[0].pin_memory(), parts[1].pin_memory())
        there, again = (part.to(device, non_blocking=True) for part in parts)
        self._rows.index_copy_(0, there, again)

    def spread(self, shape: Sequence[int]) -> torch.Tensor:
        """Return the lookup's result, [*shape, columns] on the accelerator."""
        assert self._rows is not None
        return self._rows.index_select(0, self._places).view(*shape, self._rows.shape[1])


def destination(node: torch.fx.Node, lookup: Lookup, device: torch.device | None) -> torch.device | None:
    """Return where the result of a lookup goes at once and as a whole, so that its rows may travel there; None if it does not.

    A bag's sum is not among them: the accelerator would add in another order.
    """
    single = lookup.form is not Form.BAG and not lookup.packed
    if device is None or device == lookup.weight.device or not single or not node.users:
        return None
    return device if all(_moves_to(user, device) for user in node.users) else None


def _moves_to(user: torch.fx.Node, device: torch.device) -> bool:
    if user.op != "call_method" or set(user.kwargs) - {"non_blocking"} or len(user.args) > 2:
        return False
    if user.target == device.type:
        return len(user.args) == 1
    if user.target != "to" or len(user.args) != 2 or not isinstance(user.args[1], (str, torch.device)):
        return False
    named = torch.device(user.args[1])
    return named.type == device.type and named.index in (None, device.index)
