"""What a worker does to one batch: bind it to the forward, run the stage, move both to where the step runs, make the ticket."""

import threading
import weakref
from collections.abc import Container
from typing import Any, NamedTuple

import torch

from torchstage._deferred import Deferred
from torchstage._memory import has_unseen_writes, parts_of
from torchstage._structure import TreeSpec, flatten
from torchstage.loaders._carrier import Arrival, Carrier
from torchstage.loaders._parts import Call, Parts
from torchstage.loaders._source import Batch
from torchstage.loaders._staging import Staging
from torchstage.loaders._tickets import Reads, Ticket, states_of
from torchstage.transforms._binding import Binder


class Bound(NamedTuple):
    """A batch with its ticket. ``leaves`` are the leaves of the call that the batch binds to."""

    ticket: Ticket
    leaves: list[Any]


class Staged(NamedTuple):
    """What became of a batch.

    Attributes:
        batch: what is handed out.
        bound: its ticket; None where nothing is staged.
        arrival: when what was moved to an accelerator may be used; None where nothing was.
    """

    batch: Batch
    bound: Bound | None = None
    arrival: Arrival | None = None


def hand_on(batch: Batch, number: int, carrier: Carrier | None) -> Staged:
    """Hand on a batch for which nothing is staged; it is on its way to the accelerator if there is a ``carrier``."""
    if carrier is None:
        return Staged(batch)
    batch, _, arrival = carrier.carry(batch, number)
    return Staged(batch, arrival=arrival)


class Handler:
    """See the module.

    Args:
        binder: maps a batch to the arguments of forward.

    Attributes:
        carrier: moves batches and staged values to the accelerator that the step runs on; None for the CPU.
    """

    def __init__(self, binder: Binder) -> None:
        self.carrier: Carrier | None = None
        self._binder = binder
        self._seen: weakref.WeakKeyDictionary[Parts, list[Any]] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def call(self, batch: Any) -> tuple[Call, frozenset[int]]:
        """Bind a batch as the step will get it, to capture from. The calling thread waits for the move.

        Returns:
            The arguments, and the positions of those of their leaves that the host does not have.

        Raises:
            BindingError: the batch does not bind to forward.
        """
        call = self._binder.bind(batch)
        if self.carrier is None:
            return call, frozenset()
        own = {id(leaf) for leaf in flatten(batch)[0]}
        away = frozenset(p for p, leaf in enumerate(flatten(call)[0]) if not _is_on_host(leaf, own))
        return self._binder.bind(self.carrier.at_once(batch)), away

    def stage(self, owner: Any, staging: Staging, batch: Batch, number: int, flaw: str | None = None) -> Staged:
        """Stage a batch.

        Args:
            owner: the stager, which the ticket tells when it is refused.
            staging: what with.
            batch: what was read.
            number: which read it was, for messages.
            flaw: why nothing is to be computed ahead, if that is known.
        """
        carrier = self.carrier
        leaves, spec = flatten(self._binder.bind(batch.value), batch.texts)
        parts = staging.parts if flaw is None else None
        if parts is not None:
            flaw = self._misfit(carrier, parts, batch, leaves, spec)
        parts = parts if flaw is None else None
        if carrier is not None:
            return self._stage_there(carrier, owner, staging, batch, number, leaves, parts, flaw)
        ticket = Ticket(owner, staging, leaves, spec, flaw)
        if parts is not None:
            ticket.fill(parts, leaves)
        return Staged(batch, Bound(ticket, leaves))

    def _misfit(
        self, carrier: Carrier | None, parts: Parts, batch: Batch, leaves: list[Any], spec: TreeSpec
    ) -> str | None:
        flaw = parts.misfit(leaves, spec, carrier.device if carrier is not None and carrier.moves_batch else None)
        if flaw is None and has_unseen_writes(batch.leaves):
            return "a sparse tensor of the batch shares memory with another part, whose writes it does not show"
        if flaw is None and carrier is not None:
            own = {id(leaf) for leaf in batch.leaves}
            if not all(_is_on_host(leaves[position], own) for position in parts.on_host):
                return "the host does not have a tensor that it was to work on"
        return flaw

    def _stage_there(
        self,
        carrier: Carrier,
        owner: Any,
        staging: Staging,
        batch: Batch,
        number: int,
        leaves: list[Any],
        parts: Parts | None,
        flaw: str | None,
    ) -> Staged:
        """Stage a batch for an accelerator: on the host what is done there, then the move, then the rest."""
        if parts is None:
            batch, values, arrival = carrier.carry(batch, number)
        else:
            reads = states_of(parts)
            self._follow_writes(carrier, parts, reads)
            with carrier.lane.entered():
                values = parts.run_host(leaves)
            needed = {id(leaf) for position, leaf in enumerate(leaves) if position not in parts.idle}
            staying = {id(leaves[position]) for position in parts.idle} - needed
            batch, values, arrival = carrier.carry(batch, number, staying, values, parts.moved)
        with carrier.lane.entered(), torch.no_grad():  # what `inputs` computes comes behind the move
            leaves, spec = flatten(self._binder.bind(batch.value), batch.texts)
        # What was carried is kept already, and a deferred tensor must not be looked into.
        known = {id(leaf) for leaf in batch.leaves}
        made = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and id(leaf) not in known]
        asked = [leaf._moved for leaf in batch.leaves if type(leaf) is Deferred]  # of a deferred one, by `inputs`
        made += [tensor for tensor in asked if tensor is not None]
        arrival.keep(part for leaf in made for part in parts_of(leaf) if part.device == carrier.device)
        ticket = Ticket(owner, staging, leaves, spec, flaw)
        ticket.arrival = arrival
        if parts is not None:
            with carrier.lane.entered():
                ticket.fill(parts, leaves, values, reads)
            arrival.keep(ticket.tensors_on(carrier.device))
            _send_rows(carrier, ticket, arrival)
        arrival.close()
        return Staged(batch, Bound(ticket, leaves), arrival)

    def _follow_writes(self, carrier: Carrier, parts: Parts, reads: Reads) -> None:
        """Let the stage's stream wait for writes to what ``parts`` reads: a version moves when one is queued, not when done.

        The first time it waits for what was made with ``parts``, too. Other workers wait for the lock, to come behind that.
        """
        states = [state for _, _, state in reads]
        with self._lock:
            if self._seen.get(parts) != states:
                carrier.lane.follow(training=True)
                self._seen[parts] = states


def _send_rows(carrier: Carrier, ticket: Ticket, arrival: Arrival) -> None:
    """Send the rows of tables on the host to the accelerator where the step wants them."""
    travelling = [rows for rows in ticket.rows if rows.sent is not None]
    if travelling:
        tensors = iter(carrier.send([tensor for rows in travelling for tensor in rows.load()], arrival))
        for rows in travelling:
            assert rows.sent is not None
            rows.sent.arrive(next(tensors), next(tensors))


def _is_on_host(leaf: Any, own: Container[int]) -> bool:
    """Whether the host has a leaf of a call: what ``inputs=`` makes of a batch is made anew of the moved one."""
    return not isinstance(leaf, torch.Tensor) or (leaf.device.type == "cpu" and id(leaf) in own)
