"""Rows of trained tables that are gathered ahead of the step, and repaired in it.

On the stage's thread `gather` notes what each table is (`torchstage.loaders._tables`) and copies the rows of a batch. In
the step `Rows.lookup` stands in for the plain lookup: it reads again the rows that may have been written since, exactly
those, and hands the rest to autograd as the lookup's result. Whenever that is not possible, the plain lookup runs.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from torchstage.loaders._lookup_functions import BagOfRows, Bags, GatheredRows, Taken
from torchstage.loaders._sent import Sent
from torchstage.loaders._sites import AS_FAST, Site
from torchstage.loaders._tables import Positions, Reading, memory_of_table
from torchstage.transforms._lookups import Form, Lookup


class Rows:
    """The rows of one lookup for one batch. Used once: they become part of the forward's results.

    Args:
        site: the lookup.
        ids: its row numbers. Held as an alias: the batch's own tensor must be free to go when the user drops it.
        why: why no rows were gathered.
    """

    def __init__(self, site: Site, ids: Any, why: str) -> None:
        self.site = site
        self.ids = ids.detach() if isinstance(ids, torch.Tensor) else ids
        self.why = why
        self._reading: Reading | None = None
        self._number = 0
        self._keys: torch.Tensor | None = None
        self._rows: torch.Tensor | None = None
        self._bytes: Any = None
        self._table: Any = None
        self._bags: Bags | None = None
        self._sent: Sent | None = None
        self._piece: torch.Tensor | None = None
        self._probed = (0, 0)
        self._checked = slice(0, 0)
        self._spent = False

    @property
    def gathered(self) -> bool:
        """Whether there are rows that can be used."""
        return self._rows is not None

    @property
    def sent(self) -> "Sent | None":
        """What of them travels to an accelerator; None if they are used where the table is."""
        return self._sent if self.gathered else None

    def load(self) -> list[torch.Tensor]:
        """Return the tensors that travel."""
        return [] if self.sent is None or self._rows is None else self.sent.load(self._rows)

    def fill(self, reading: Reading, number: int, keys: torch.Tensor, bags: "Bags | Sent | None") -> None:
        """Copy the rows. Runs on the stage's thread, after the reading was taken."""
        lookup = self.site.lookup
        weight = lookup.weight.detach()
        if memory_of_table(weight) != reading.memory:  # the very memory that rows are copied from
            self.why = "table replaced"
            return
        self._keys, self._bags = keys, None if isinstance(bags, Sent) else bags
        self._sent = bags if isinstance(bags, Sent) else None
        rows = self._copy(weight) if self._sent is None else weight.index_select(0, keys)
        if not rows.is_contiguous():
            self.why = "the row numbers are in an unusual order in memory"
            return
        if lookup.sparse:  # the row numbers of the sparse gradient that this lookup will have
            flat = self.ids.reshape(-1)
            self._piece = flat.clone() if lookup.padding_idx < 0 else flat[flat != lookup.padding_idx]
        at = max(_without(len(keys), reading.suspects[number].at, reading.serial), 0)
        self._probed = at, int(keys[at])
        step = max(len(keys) // _SOME_ROWS, 1)
        self._checked = slice(reading.serial % step, None, step)
        self._bytes, self._table = _rows_as_bytes(rows), _rows_as_bytes(weight)
        self._reading, self._number, self._rows = reading, number, rows

    def _copy(self, weight: torch.Tensor) -> torch.Tensor:
        """Gather as the plain lookup would, so that the result has its layout too; of bags, each row once."""
        if self._bags is not None:
            assert self._keys is not None
            return weight.index_select(0, self._keys)
        if self.site.lookup.form is Form.INDEX:
            return weight[self.ids]
        if self.site.lookup.form is Form.SELECT:
            return weight.index_select(0, self.ids)
        return torch.embedding(weight, self.ids)

    def lookup(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the plain lookup that is called so."""
        started = time.perf_counter()
        why = self._not_usable(args, kwargs)
        if why is not None:
            self.site.kept(why)
            # A second call is of the same kind as the first: checkpointing compares what the two save for the backward.
            again = why is _SPENT and self.site.hooked() is None
            self._reading = self._sent = None
            self._rows = self._copy(self.site.lookup.weight.detach()) if again else None
        if self._rows is None:
            result: Any = self.site.run_plain(args, kwargs)
        else:
            result = self._use(args, kwargs)
            if self.site.lookup.packed:
                result = (result,)  # nobody reads the other items of the tuple
        self.site.took(why is None, time.perf_counter() - started)
        return result

    def _not_usable(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Bring the rows up to date; say why that cannot be, or None."""
        if self._rows is None:
            return _SPENT if self._spent else self.why
        site, reading, keys = self.site, self._reading, self._keys
        assert reading is not None
        assert keys is not None
        self.why = "the first call did not use the rows"
        why = self._unusual_call(args, kwargs)
        if why is not None:
            return why
        weight = site.lookup.weight
        stale = site.table.stale_rows(weight, reading, self._number, keys)
        if site.max_staleness is not None:
            missed = site.table.staleness(reading)
            if isinstance(stale, str) and stale == "table replaced":
                return stale
            if missed > site.max_staleness:
                return "too stale"
            site.figures.staleness = max(site.figures.staleness, missed)
            return None
        if isinstance(stale, str):
            return stale
        return self._repair(stale)  # the same memory still, or it would be stale as a whole

    def _unusual_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Say why the call is left to torch, which may refuse it, or None."""
        hooked = self.site.hooked()
        if hooked is not None:
            return hooked
        given = _sample_weights(self.site.lookup, args, kwargs)
        if given is not None and (self.site.lookup.mode != 0 or given.shape != self.ids.shape):
            return "the sample weights are of another form"
        return None

    def _repair(self, stale: Positions | None) -> str | None:
        """Read again the rows that may have been written, as whole rows of bytes: that is faster than torch's ways."""
        table = self._table
        if self._probe(stale):
            return self.site.table.doubt(whole=True)
        if stale is not None and len(stale.at):
            self._bytes[stale.at.numpy()] = table[stale.keys.numpy()]
            self.site.figures.repaired += len(stale.at)
            if self._sent is not None and self._rows is not None:
                self._sent.repair(stale.at, self._rows)
        # Somebody who writes single rows without a trace is likely to do so from the start and again and again.
        used = self.site.figures.used
        often = used < _ALL_ROWS or (used % _OFTEN if used < _OFTEN * 10 else used % _SELDOM) == 0
        checked = slice(None) if often else self._checked
        assert self._keys is not None
        if self._bytes[checked].tobytes() != table[self._keys[checked].numpy()].tobytes():
            return self.site.table.doubt(whole=False)
        return None

    def _probe(self, stale: Positions | None) -> bool:
        """Whether a row that nobody is known to have written differs: a write through ``.data`` leaves no other trace."""
        assert self._keys is not None
        (at, key), table = self._probed, self._table
        if self._bytes[at].tobytes() == table[key].tobytes():
            return False
        if stale is None or not (stale.at == at).any():
            return True
        at = _without(len(self._keys), stale.at, at)  # a search found it written: look at another
        return bool(at >= 0 and self._bytes[at].tobytes() != table[int(self._keys[at])].tobytes())

    def _use(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        lookup, rows, reading = self.site.lookup, self._rows, self._reading
        assert rows is not None
        weight = lookup.weight
        records = torch.is_grad_enabled() and weight.requires_grad
        if records and self._piece is not None and reading is not None:
            self.site.table.used(reading, self._piece)
        self._rows = self._reading = self._bytes = self._table = None
        self._spent = True
        if self._sent is not None:
            rows, self._sent = self._sent.spread(self.ids.shape), None
        if self._bags is not None:
            return self._use_bags(rows, self._bags, _sample_weights(lookup, args, kwargs))
        if not records:
            return rows
        return GatheredRows.apply(weight, self.ids, Taken(rows), lookup)  # type: ignore[no-any-return]

    def _use_bags(self, rows: torch.Tensor, bags: Bags, sample_weights: torch.Tensor | None) -> torch.Tensor:
        if sample_weights is not None:
            sample_weights = sample_weights.reshape(-1)
        lookup = self.site.lookup
        return BagOfRows.apply(lookup.weight, sample_weights, rows, bags, lookup)  # type: ignore[no-any-return]


def gather(
    sites: Sequence[Site], leaves: Sequence[Any], values: Sequence[Any], *, ahead: bool, records: bool, trying: bool
) -> list[Rows]:
    """Gather the rows of a batch for all lookups; nothing if none is to be gathered. Runs on the stage's thread.

    Args:
        sites: the lookups.
        leaves: the leaves of the call.
        values: what the stage returned.
        ahead: whether to gather at all.
        records: whether the steps record gradients, so that tables are written between them.
        trying: whether to gather although it was seen to save nothing.
    """
    whys = [site.why_not(records, trying) if ahead else AS_FAST for site in sites]
    if all(whys) and not (trying and AS_FAST in whys):  # in a trial the lookups in the step are timed
        for site, why in zip(sites, whys, strict=True):
            site.kept(why or "")
        return []
    found: list[Rows] = []
    by_table: dict[int, list[tuple[Rows, torch.Tensor, Bags | Sent | None]]] = {}
    for site, why in zip(sites, whys, strict=True):
        ids, offsets = site.given(leaves, values)
        rows = Rows(site, ids, why or "")
        found.append(rows)
        if not why:
            prepared = _prepare(site, rows.ids, offsets)
            if isinstance(prepared, str):
                rows.why = prepared
            else:
                by_table.setdefault(id(site.table), []).append((rows, *prepared))
    for members in by_table.values():
        started = time.perf_counter()
        table = members[0][0].site.table
        try:
            reading = table.read([keys for _, keys, _ in members])
        except (IndexError, RuntimeError):  # the plain lookup raises it, in the step that has the batch
            for rows, _, _ in members:
                rows.why = "row numbers out of range"
            continue
        for number, (rows, keys, bags) in enumerate(members):
            try:
                rows.fill(reading, number, keys, bags)
            except (IndexError, RuntimeError):  # the plain lookup raises it, or does not
                rows.why = "the gather raised"
                continue
            now = time.perf_counter()
            _count(rows.site, keys, rows.ids, now - started)
            started = now
    return found


def _prepare(site: Site, ids: Any, offsets: Any) -> tuple[torch.Tensor, Bags | Sent | None] | str:
    """Return the row numbers to gather, [M], and what becomes of the rows; or why there is nothing to gather."""
    lookup = site.lookup
    if type(ids) is not torch.Tensor or ids.dtype not in (torch.int64, torch.int32):
        return "the row numbers are no tensor of whole numbers"
    if ids.dim() == 0 or not ids.numel() or ids.device != lookup.weight.device:
        return "no row numbers"
    flat = ids.reshape(-1)
    if lookup.form is Form.INDEX:
        flat = torch.where(flat < 0, flat + len(lookup.weight), flat)
    if site.destination is not None:
        keys, places = torch.unique(flat, return_inverse=True)
        return keys, Sent(places)
    if lookup.form is not Form.BAG:
        return flat, None
    if lookup.mode == 2 and (lookup.sparse or lookup.scale):
        return "torch refuses such bags"
    if ids.dim() == 2 and offsets is None:
        offsets = torch.arange(0, ids.numel(), ids.shape[1], dtype=ids.dtype)
    elif ids.dim() != 1:
        offsets = None
    if type(offsets) is not torch.Tensor or offsets.dim() != 1:
        return "the bags are of another form"
    flat, offsets = flat.contiguous(), offsets.contiguous()  # as torch does
    # Each row once, which pays for a bag on both threads: sorted rows are gathered faster than the sort takes, and the
    # step's sums read few rows, from the cache. For single rows it does not: the step would have to spread them.
    keys, places = torch.unique(flat, return_inverse=True)
    places = places.to(flat.dtype)
    padding = -1
    if lookup.padding_idx >= 0:
        # A row of its own stands for the padding, so that its kernel is used although none may occur.
        padding = len(keys)
        keys = torch.cat([keys, flat.new_tensor([lookup.padding_idx])])
        places = torch.where(flat == lookup.padding_idx, padding, places)
    return keys, Bags(flat, offsets.detach(), places, keys, padding)


def _count(site: Site, keys: torch.Tensor, ids: torch.Tensor, seconds: float) -> None:
    figures = site.figures
    with site.counting:
        look = figures.gathers % _UNIQUE_EVERY == 0
        figures.gathers += 1
        figures.gather_seconds += seconds
        figures.bytes += len(keys) * site.lookup.weight.shape[1] * site.lookup.weight.element_size()
    if look:
        figures.unique = len(torch.unique(keys)) / ids.numel()


def _sample_weights(lookup: Lookup, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    if lookup.sample_weights is None:
        return None
    position = 2 if lookup.module is not None else 6 if lookup.packed else 8
    given: torch.Tensor = kwargs["per_sample_weights"] if "per_sample_weights" in kwargs else args[position]
    return given


def _without(count: int, some: torch.Tensor, start: int) -> int:
    """Return a position among ``count`` that is not among ``some``, int64 [K]; -1 if there is none."""
    others = torch.ones(count, dtype=torch.bool, device="cpu").index_fill_(0, some, False).nonzero()
    return int(others[start % len(others)]) if len(others) else -1


def _rows_as_bytes(rows: torch.Tensor) -> Any:
    """Return the rows of a contiguous CPU tensor [..., columns] as a NumPy array whose elements are whole rows."""
    columns = rows.shape[-1]
    memory = rows.as_strided((rows.numel() // columns, columns), (columns, 1)).view(torch.uint8)
    return memory.numpy().view(np.dtype((np.void, memory.shape[1]))).reshape(-1)


_SPENT = "rows used by an earlier call"
# How many rows are compared with the table: all, in the first lookups, then in one of 7 and at last of 127, which have no
# common rhythm with a loop; else a few.
_ALL_ROWS, _OFTEN, _SELDOM, _SOME_ROWS = 4, 7, 127, 16
_UNIQUE_EVERY = 64
