"""`SmartStageOptions`: everything a user can choose about staging, validated when it is made."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch.fx

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
    the memory of one batch and its staged values."""

    num_threads: int = 1
    """Threads that read and stage batches. Order is kept for any number. Raise it while ``stats.wait`` is not near
    zero and processors are idle; on a machine whose cores the step itself uses, more threads make the step slower."""

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

    stage_subgraph_stream_id: int = 0
    """Which CUDA stream of the stage (0 is the main graph's own). Validated here; a stage on the CPU uses none."""

    graph: torch.fx.GraphModule | None = None
    """An already captured graph of the model, used in place of capture while the model is in the training mode that
    the graph was captured in. It must hold the model's own parameters."""

    name: str | None = None
    """Name of this stage in thread names, statistics and messages. None: the model's class name."""

    do_smart_stage: bool = True
    """True: stage everything that can run ahead. False: stage only what is above `staged` marks."""

    stage_subgraph_on_cpu: bool | None = None
    """Run the stage on the CPU although the model is on an accelerator; None chooses. On a CPU model all three mean
    the same."""

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
    gathered in the step. None: ``capacity + num_threads``."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            _require_int(name, getattr(self, name), least)
        for name in ("use_stage_subgraph_thread_pool", "do_smart_stage"):
            _require(name, getattr(self, name), lambda v: isinstance(v, bool), "must be True or False")
        _require("stage_subgraph_on_cpu", self.stage_subgraph_on_cpu, _is_bool_or_none, "must be True, False or None")
        _require("name", self.name, _is_name, "must be None or a non-empty string")
        _require("on_timeout", self.on_timeout, lambda v: v in _ON_TIMEOUT, f"must be one of {_ON_TIMEOUT}")
        _require("lookups", self.lookups, lambda v: v in _LOOKUPS, f"must be one of {_LOOKUPS}")
        if self.max_staleness is not None:
            _require_int("max_staleness", self.max_staleness, 0)
            if self.lookups != "stale":
                raise OptionError(
                    f'max_staleness needs lookups="stale": other modes have no stale rows. Found: {self.lookups!r}.'
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
    "stage_subgraph_thread_pool_id": 0,
    "stage_subgraph_stream_id": 0,
}
_LOOKUPS = ("auto", "exact", "main", "stale")
_ON_TIMEOUT = ("drop", "raise", "wait")


def _require(name: str, value: object, holds: Callable[[Any], bool], rule: str) -> None:
    if not holds(value):
        raise OptionError(f"{name} {rule}. Found: {value!r}.")


def _require_int(name: str, value: object, least: int) -> None:
    # bool is an int in Python; True for a count is a mistake, not a 1
    _require(
        name,
        value,
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least,
        f"must be a whole number >= {least}",
    )


def _is_bool_or_none(value: object) -> bool:
    return value is None or isinstance(value, bool)


def _is_name(value: object) -> bool:
    return value is None or (isinstance(value, str) and value != "")


def _is_graph(value: object) -> bool:
    return value is None or isinstance(value, torch.fx.GraphModule)


def _is_exception_types(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(v, type) and issubclass(v, BaseException) for v in value)
