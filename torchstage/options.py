"""`SmartStageOptions`: everything a user can choose about staging, validated when it is made."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.fx

from torchstage._streams import check_stage_stream
from torchstage.autotune import AUTOTUNE, AutotuneAlgorithm
from torchstage.errors import OptionError


@dataclasses.dataclass(frozen=True)
class SmartStageOptions:
    """Options of `smart_stage` and `StagedDataLoader`. The names and defaults are those of DeepRec's SmartStage.

    Raises:
        OptionError: a value is of the wrong type or out of range; the message names the option, the rule and the value.
    """

    capacity: int = 1
    """Staged batches that may wait for the training step. 1 overlaps one batch with one step and is enough when both
    take a steady time; raise it when the stage's or the loader's time varies from batch to batch. Each one more costs
    the memory of one batch and its staged values. `AUTOTUNE` chooses it while the job runs."""

    num_threads: int = 1
    """Threads that read and stage batches. Order is kept for any number. Raise it while ``stats.wait`` is not near
    zero and processors are idle; on a machine whose cores the step itself uses, more threads make the step slower.
    `AUTOTUNE` chooses their number while the job runs."""

    num_clients: int = 1
    """Threads of the user's that iterate over the one loader. They share one buffer, each batch goes to exactly one of
    them, and the end of the epoch reaches each once."""

    timeout_millis: int = 300_000
    """Milliseconds that a staged batch may wait for room in the buffer before ``on_timeout`` applies. The default (5
    minutes) is the original's; a pause of the training loop (an evaluation, a checkpoint) must fit in it."""

    closed_exception_types: tuple[type[BaseException], ...] = (StopIteration,)
    """Exceptions from the loader or the stage that end the epoch normally. ``StopIteration`` from the loader always
    does."""

    ignored_exception_types: tuple[type[BaseException], ...] = ()
    """Exceptions from the loader or the stage that skip their batch. Each is counted in ``stats.drops`` and warned
    about once. A generator ends at its first exception, so only loaders that can go on gain from it."""

    use_stage_subgraph_thread_pool: bool = False
    """Run independent branches of the stage graph side by side in a pool made by `add_stage_thread_pool`. Pays when a
    stage has several branches of large operations; for many small ones handing them over costs more than it saves."""

    stage_subgraph_thread_pool_id: int = 0
    """Which pool: the number that `add_stage_thread_pool` returned."""

    stage_subgraph_stream_id: int | None = None
    """Which stream of the accelerator the stage and its copies are queued on. None: one of this loader's own. 0: the main
    graph's, as in the original, where nothing overlaps. Others are those of `add_stage_stream`. A CPU has none."""

    graph: torch.fx.GraphModule | None = None
    """An already captured graph of the model, used in place of capture while the model is in the training mode that
    the graph was captured in. It must hold the model's own parameters."""

    name: str | None = None
    """Name of this stage in thread names, statistics and messages. None: the model's class name."""

    do_smart_stage: bool = True
    """True: stage everything that can run ahead. False: stage only what is above `staged` marks."""

    stage_subgraph_on_cpu: bool | None = None
    """Where the stage of a model on an accelerator runs. None: on the host what gives the same bits there, and the rest on
    the accelerator, in a stream of its own. True: on the host, also what may differ in the last bit of a float there. False:
    on the accelerator, but for what the plain forward does on the host. On a CPU model all three mean the same."""

    on_timeout: Literal["drop", "raise", "wait"] = "drop"
    """What happens after ``timeout_millis``: ``"drop"`` the batch as the original does (counted and warned about),
    ``"raise"`` a `PutTimeoutError` at the batch's position, or ``"wait"`` on (counted and warned about)."""

    lookups: Literal["auto", "exact", "main", "stale"] = "auto"
    """Where rows of trained tables are gathered. ``"exact"``: ahead, and rows that the steps in between have written are
    read again, so that the numbers are those of the plain run. ``"main"``: in the step, as in the plain model. ``"auto"``:
    ``"exact"`` where it makes the step faster, which is tried on the running job now and then. ``"stale"``: ahead and
    never read again, which changes the numbers; see ``max_staleness``."""

    max_staleness: int | None = None
    """With ``lookups="stale"``: the most optimizer steps that a gathered row may miss; rows that would miss more are
    gathered in the step. None: ``most_batches``, which is ``capacity + num_threads`` or the bounds of the two."""

    planner: Literal["cost", "max"] = "cost"
    """Which of the operations that could run ahead do. ``"max"``: all, as in the original. ``"cost"``: at first all; once
    their costs are measured on a few batches, those with which a step is shortest, if a trial on the running job shows
    that it is. The numbers are the same. ``loader.plan`` says what was predicted and what was seen."""

    autotune_algorithm: AutotuneAlgorithm = AutotuneAlgorithm.DEFAULT
    """How the performance model searches, where ``capacity`` or ``num_threads`` is `AUTOTUNE`. ``DEFAULT`` is
    ``STAGE_BASED``: the fewest threads with which a batch is ready when the step wants it."""

    cpu_budget: int = 0
    """Processors that the stage's threads may keep busy under `AUTOTUNE`; threads that wait take none. 0: all that the
    process may use."""

    ram_budget: int = 0
    """Bytes that waiting batches may take under `AUTOTUNE`. 0: half of the memory that is free when the loader is made."""

    max_capacity: int = 16
    """The most that ``capacity=AUTOTUNE`` may choose."""

    max_num_threads: int = 8
    """The most that ``num_threads=AUTOTUNE`` may choose. Memory is bounded by both bounds together, see ``most_batches``."""

    warm_start: str | os.PathLike[str] | None = None
    """A file that ``loader.model.save(path)`` wrote: begin with what was chosen there, within the bounds."""

    verify: int = 0
    """How many of the first staged steps of each capture are compared with the plain forward and backward, bit for bit;
    after them every 1000th staged step is. A difference is a `VerificationError` that names the first operation that
    differs; ``stats.verified`` counts the steps that were equal. The run's numbers stay the same. A compared step runs the
    model three times more, on a copy that shares the parameters, and keeps its graph for a second backward. 0: none."""

    max_ignored: int | None = None
    """How many batches of one pass over the loader ``ignored_exception_types`` may skip; the next exception is raised,
    whatever its type. None: any number."""

    keep_random_order: bool = True
    """Whether a loader whose reading draws from a global random stream (torch's, NumPy's or Python's, in this process) is
    read only when the step asks for a batch, as the plain loop does, so that the numbers stay the same. Nothing overlaps
    then, which is warned about. False: read ahead all the same; the numbers may differ from the plain loop's."""

    bypass: bool = True
    """Whether some steps run the plain forward now and then, to see if they are faster, and staging is off for some thousand
    batches where they are; that is warned about once, and ``stats.fallbacks["bypassed"]`` counts such steps. False: what can
    be staged is. Not done with ``lookups="stale"``, whose numbers are not those of the plain forward."""

    device: str | torch.device | None = None
    """Where the tensors of a batch are when it is handed out. None: where the model is, if all of it is on one accelerator,
    and else where the loader has them. ``"cpu"``: for a forward that takes its batch from the host; staged values still travel.
    A loop's own ``.to(device)`` gives back the very tensors, at no cost."""

    stage_executor: Literal["thread", "process"] = "thread"
    """Where the operations of the stage run. ``"thread"``: in the threads that read, which share Python's lock with the step.
    ``"process"``: in a process for each of them, which a step of many small operations does not feel; tensors go there and
    back through shared memory, text is pickled, which costs more than hashing it. Not on Windows."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if name not in _TUNABLE or not _is_autotune(getattr(self, name)):
                _require_int(name, getattr(self, name), least)
        rule = "must be an AutotuneAlgorithm, for example AutotuneAlgorithm.HILL_CLIMB"
        _require("autotune_algorithm", self.autotune_algorithm, lambda v: isinstance(v, AutotuneAlgorithm), rule)
        _require("warm_start", self.warm_start, _is_path, "must be None or the path of a saved model")
        if self.warm_start is not None and not self.tuned:
            raise OptionError(
                "warm_start needs capacity=AUTOTUNE or num_threads=AUTOTUNE: fixed numbers have nothing to begin with. "
                f"Found: {os.fspath(self.warm_start)!r}."
            )
        for name in (
            "use_stage_subgraph_thread_pool",
            "do_smart_stage",
            "keep_random_order",
            "bypass",
        ):
            _require(name, getattr(self, name), lambda v: isinstance(v, bool), "must be True or False")
        _require("stage_subgraph_on_cpu", self.stage_subgraph_on_cpu, _is_bool_or_none, "must be True, False or None")
        _require("device", self.device, _is_device, 'must be None or a device, for example "cuda" or "cuda:1"')
        _require("name", self.name, _is_name, "must be None or a non-empty string")
        _require("on_timeout", self.on_timeout, lambda v: v in _ON_TIMEOUT, f"must be one of {_ON_TIMEOUT}")
        _require("lookups", self.lookups, lambda v: v in _LOOKUPS, f"must be one of {_LOOKUPS}")
        _require("stage_executor", self.stage_executor, lambda v: v in _EXECUTORS, f"must be one of {_EXECUTORS}")
        if self.stage_executor == "process" and os.name != "posix":
            raise OptionError('stage_executor="process" needs a POSIX system. Found: "process". Leave it at "thread".')
        _require("planner", self.planner, lambda v: v in _PLANNERS, f"must be one of {_PLANNERS}")
        if self.stage_subgraph_stream_id is not None:
            _require_int("stage_subgraph_stream_id", self.stage_subgraph_stream_id, 0)
            check_stage_stream(self.stage_subgraph_stream_id)
        if self.max_ignored is not None:
            _require_int("max_ignored", self.max_ignored, 0)
            if not self.ignored_exception_types:
                raise OptionError(
                    "max_ignored needs ignored_exception_types: without any, no batch is ignored. "
                    f"Found: max_ignored={self.max_ignored}."
                )
        if self.max_staleness is not None:
            _require_int("max_staleness", self.max_staleness, 0)
            if self.lookups != "stale":
                raise OptionError(
                    f'max_staleness needs lookups="stale": other modes have no stale rows. Found: {self.lookups!r}.'
                )
        if self.verify and (self.lookups == "stale" or self.num_clients > 1):
            raise OptionError(
                'verify needs lookups to be "auto", "exact" or "main", since stale ones differ by design, and num_clients=1, '
                "since other clients change the model while one is compared. "
                f"Found: lookups={self.lookups!r}, num_clients={self.num_clients}."
            )
        _require("graph", self.graph, _is_graph, "must be None or a torch.fx.GraphModule captured from the model")
        for name in ("closed_exception_types", "ignored_exception_types"):
            rule = "must be a tuple of exception classes, for example (ValueError,)"
            _require(name, getattr(self, name), _is_exception_types, rule)
        both = sorted(t.__name__ for t in set(self.closed_exception_types) & set(self.ignored_exception_types))
        if both:
            raise OptionError(
                f"closed_exception_types and ignored_exception_types both hold {', '.join(both)}: an exception can end "
                "the epoch or skip its batch, not both. Remove it from one of them."
            )

    @property
    def tuned(self) -> bool:
        """Whether anything is chosen while the job runs."""
        return AUTOTUNE in (self.capacity, self.num_threads)

    @property
    def most_capacity(self) -> int:
        """The most batches that may wait: ``capacity``, or its bound under `AUTOTUNE`."""
        return self.max_capacity if self.capacity == AUTOTUNE else self.capacity

    @property
    def most_threads(self) -> int:
        """The most threads: ``num_threads``, or its bound under `AUTOTUNE`."""
        return self.max_num_threads if self.num_threads == AUTOTUNE else self.num_threads

    @property
    def most_batches(self) -> int:
        """The most batches that are read and not taken: those that wait, and one in the hand of each thread."""
        return self.most_capacity + self.most_threads

    @classmethod
    def of(cls, options: "SmartStageOptions | None", overrides: dict[str, Any]) -> "SmartStageOptions":
        """Return ``options`` (the defaults if None) with single options replaced by ``overrides``.

        Raises:
            OptionError: ``options`` is of another type, a name is unknown, or a value is out of range.
        """
        if options is None:
            options = cls()
        if not isinstance(options, cls):
            raise OptionError(
                f"options must be a SmartStageOptions or None. Found: {type(options).__name__}. "
                "Single options can be given by keyword, for example num_threads=2."
            )
        names = [field.name for field in dataclasses.fields(cls)]
        for name in overrides:
            if name not in names:
                raise OptionError(f"unknown option {name!r}. The options are: {', '.join(names)}.")
        return dataclasses.replace(options, **overrides)


_LEAST = {
    "capacity": 1,
    "num_threads": 1,
    "num_clients": 1,
    "timeout_millis": 1,
    "cpu_budget": 0,
    "ram_budget": 0,
    "verify": 0,
    "max_capacity": 1,
    "max_num_threads": 1,
    "stage_subgraph_thread_pool_id": 0,
}
_TUNABLE = ("capacity", "num_threads")
_LOOKUPS = ("auto", "exact", "main", "stale")
_PLANNERS = ("cost", "max")
_EXECUTORS = ("thread", "process")
_ON_TIMEOUT = ("drop", "raise", "wait")


def _require(name: str, value: object, holds: Callable[[Any], bool], rule: str) -> None:
    if not holds(value):
        raise OptionError(f"{name} {rule}. Found: {value!r}.")


def _require_int(name: str, value: object, least: int) -> None:
    # bool is an int in Python; True for a count is a mistake, not a 1
    rule = f"must be a whole number >= {least}" + (" or AUTOTUNE" if name in _TUNABLE else "")
    _require(name, value, lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least, rule)


def _is_autotune(value: object) -> bool:
    return type(value) is int and value == AUTOTUNE


def _is_path(value: object) -> bool:
    return value is None or (isinstance(value, (str, os.PathLike)) and bool(os.fspath(value)))


def _is_bool_or_none(value: object) -> bool:
    return value is None or isinstance(value, bool)


def _is_device(value: object) -> bool:
    if isinstance(value, str):
        try:
            torch.device(value)
        except RuntimeError:
            return False
    return value is None or isinstance(value, (str, torch.device))


def _is_name(value: object) -> bool:
    return value is None or (isinstance(value, str) and value != "")


def _is_graph(value: object) -> bool:
    return value is None or isinstance(value, torch.fx.GraphModule)


def _is_exception_types(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(v, type) and issubclass(v, BaseException) for v in value)
