"""Lightning asks a loader for an iterator only to see whether it has one: then none of the user's loader is opened."""

import sys


def only_looks() -> bool:
    """Whether ``__iter__``, which calls this, was called by Lightning's check that a loader can be iterated.

    It leaves that check out for a `DataLoader`. Opening one draws a seed from torch's global stream, so the order would be
    another than in the plain run.
    """
    caller = sys._getframe(2)
    return caller.f_code.co_name == "_check_dataloader_iterable" and "lightning" in caller.f_globals.get("__name__", "")
