"""Parts: what runs a captured forward, split in what is done ahead of the step and what is done in it."""

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.fx

from torchstage._memory import share_memory
from torchstage._mode import Ambient, Mode
from torchstage._structure import TreeSpec, is_tracked
from torchstage._threads import set_intra_op_threads
from torchstage.errors import add_note
from torchstage.loaders._executors import executor
from torchstage.loaders._host_stage import HostStage, locate
from torchstage.loaders._policy import Policy
from torchstage.loaders._rows import Rows, gather
from torchstage.loaders._sites import Site
from torchstage.options import SmartStageOptions
from torchstage.stats import Recorder
from torchstage.transforms._captured import Capture
from torchstage.transforms._effects import Kind, effect_of
from torchstage.transforms._fuse import fuse
from torchstage.transforms._lift import Ahead
from torchstage.transforms._verdicts import input_position

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Parts(abc.ABC):
    """What is done ahead of a step, and how the step is done with it.

    Attributes:
        capture: the captured forward.
        in_spec: the structure of the call that was captured.
        inputs: the positions of the leaves that are read ahead.
        reads: the model's tensors that the stage reads, with their names.
        sites: the lookups whose rows are gathered ahead.
        unused: the positions of the leaves that nothing depends on, such as the number of the batch.
        idle: the positions of those that neither the step nor the stage's part on an accelerator reads.
        on_host: the positions of those that the host's part of the stage reads.
        moved: for each value of the host's part of the stage, whether the plain forward has it on the accelerator.
        once: whether what was staged for a batch serves a single forward.

    Args:
        capture: the captured forward.
        ahead: what of it is done ahead.
        mode: the mode it was captured in.
        options: where rows of trained tables are gathered.
        recorder: where the figures of lookups go.
        device: the accelerator that the step runs on; None for the CPU.
    """

    once = False
    idle: frozenset[int] = frozenset()

    def __init__(
        self,
        capture: Capture,
        ahead: Ahead,
        mode: Mode,
        options: SmartStageOptions,
        recorder: Recorder,
        device: torch.device | None = None,
    ) -> None:
        self.capture = capture
        self.in_spec = capture.in_spec
        self.reads = _state_reads(ahead, capture)
        lag = options.most_batches
        most_stale = lag if options.max_staleness is None else options.max_staleness
        nodes = {node.name: node for node in capture.graph.nodes}
        self.sites: tuple[Site, ...] = tuple(
            Site(
                gather,
                nodes[gather.lookup.node],
                most_stale if options.lookups == "stale" else None,
                recorder.lookup(gather.lookup.table),
                device,
            )
            for gather in ahead.gathers
        )
        self.on_host = () if ahead.host is None else ahead.host.part.inputs
        self.inputs = tuple(sorted({*self.on_host, *ahead.stage.inputs, *[p for s in self.sites for p in s.inputs()]}))
        effects = [effect_of(node, capture.modules).kind for node in capture.graph.nodes if node.op.startswith("call_")]
        self._writes = any(kind in (Kind.WRITES, Kind.UNKNOWN) for kind in effects)
        self.unused = _unused_numbers(capture)
        self._constants = capture.constants
        self._policy: Policy = Policy(options.lookups, lag)
        self._leaf_count = capture.in_spec.num_leaves
        self._ambient = mode.ambient
        self._ahead = ahead
        stage = ahead.stage.module
        # What runs on an accelerator is only launched here; another process has not got its memory.
        self._stage = executor(stage, mode.ambient, options, recorder) if device is None else fuse(stage).forward
        self.moved: tuple[bool, ...] = () if ahead.host is None else ahead.host.moved
        self._host: HostStage | None = (
            None if ahead.host is None else HostStage(ahead.host, mode.ambient, options, recorder)
        )

    @property
    def ambient(self) -> Ambient:
        """The settings that the stage runs under."""
        return self._ambient

    @property
    def settled(self) -> bool:
        """Whether no trial of the lookups is under way."""
        return not self.sites or self._policy.settled

    def misfit(self, leaves: Sequence[Any], spec: TreeSpec, home: torch.device | None = None) -> str | None:  # noqa: ARG002
        """Say why a call with these leaves is not the one that was captured, or None.

        Args:
            leaves: the leaves.
            spec: the structure of the call.
            home: where those on the host will have been moved when the call is made; None if they stay.
        """
        if len(leaves) != self._leaf_count or spec != self.in_spec:
            return "the arguments have another structure than at capture"
        if self._writes and share_memory(leaves):
            return "parts of the batch share memory and the forward writes in place"
        for position, value in self._constants.items():
            leaf = leaves[position]
            if type(leaf) is not type(value) or leaf != value:
                return "an argument that was fixed at capture has another value"
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                return "a tensor of the batch requires grad"
            if position in self.inputs and not is_tracked(leaf):
                return "the batch holds an object whose changes cannot be noticed"
        return None

    @abc.abstractmethod
    def changed(self) -> str | None:
        """Name the first thing of the model that is not as it was at capture, or None."""

    def run_host(self, leaves: Sequence[Any]) -> list[Any]:
        """Run the host's part of a stage that goes on on an accelerator; nothing where there is none.

        Raises:
            Exception: whatever an operation raises, with a note that names its node.
        """
        return [] if self._host is None else self._host.run(leaves)

    def run_stage(self, leaves: Sequence[Any], given: Sequence[Any] = ()) -> list[Any]:
        """Run the stage graph on the leaves of a call and return the values of the cut.

        Args:
            leaves: the leaves.
            given: what `run_host` returned for them, where it belongs.

        Raises:
            Exception: whatever an operation raises, with a note that names its node.
        """
        return self._run_stage(leaves, self._stage, given)

    def _run_stage(
        self, leaves: Sequence[Any], stage: Callable[..., list[Any]], given: Sequence[Any] = ()
    ) -> list[Any]:
        inputs = [*[leaves[position] for position in self._ahead.stage.inputs], *given]
        set_intra_op_threads(self._ambient.threads)
        with self._ambient.entered():
            try:
                return stage(*inputs)
            except Exception as error:
                add_note(error, f"in the stage graph of torchstage, {locate(self._ahead.stage.module, inputs)}")
                raise

    def gather(self, leaves: Sequence[Any], values: Sequence[Any]) -> list[Rows]:
        """Gather the rows of a call's lookups after its stage has run, where that is to happen ahead."""
        if not self.sites:
            return []
        ahead = self._policy.ahead()
        with torch.no_grad():
            return gather(
                self.sites, leaves, values, ahead=ahead, records=self._ambient.grad, trying=self._policy.trying
            )

    @abc.abstractmethod
    def run_main(
        self, leaves: Sequence[Any], values: Sequence[Any], rows: Sequence[Rows], call: Call
    ) -> tuple[Any, Sequence[Any]]:
        """Run the step's part of the forward.

        Args:
            leaves: the leaves of the call.
            values: what the stage returned for them.
            rows: what `gather` returned for them.
            call: ``(args, kwargs)`` as the caller gave them.

        Returns:
            What forward returns, and all that the caller has got hold of by it: the leaves of that, and of what forward
            assigns to attributes.

        Raises:
            IndexError, RuntimeError: a row number is out of range; torch's type, with the table, the range and the value.
            Exception: whatever the forward raises.
        """

    @contextlib.contextmanager
    def _lookups_explained(self, leaves: Sequence[Any], values: Sequence[Any]) -> Iterator[None]:
        """Name the table, the range and the value where a row number is out of range."""
        try:
            yield
        except (IndexError, RuntimeError) as error:
            told = any(words in str(error) for words in _OUT_OF_RANGE)
            for site in self.sites if told else ():
                message = site.out_of_range(site.given(leaves, values)[0])
                if message is not None:
                    raise type(error)(message) from error
            raise


def _unused_numbers(capture: Capture) -> frozenset[int]:
    decided = capture.decisions.positions() if capture.decisions is not None else frozenset()
    inputs = [node for node in capture.graph.nodes if node.op == "placeholder" and not node.users]
    numbers = frozenset(input_position(node) for node in inputs if node.meta.get("type") in (int, float))
    return numbers - decided


def _state_reads(ahead: Ahead, capture: Capture) -> tuple[tuple[str, torch.Tensor], ...]:
    """Return the model's tensors that the stage reads, with their names in the capture."""
    modules = [ahead.stage.module, *([ahead.host.part.module] if ahead.host is not None else [])]
    own = {id(t) for module in modules for t in [*module.parameters(), *module.buffers()]}
    if ahead.host is not None:
        own |= {id(tensor) for tensor, _ in ahead.host.copies.pairs}
    found = [(name, tensor) for name, tensor in capture.state.items() if id(tensor) in own]
    for path, module in capture.modules.items():
        named = [*module.named_parameters(), *module.named_buffers()]
        found += [(f"{path}.{name}", tensor) for name, tensor in named if id(tensor) in own]
    return tuple(found)


# What torch says of a row number in the three kinds of lookup: to `embedding` and `index_select`, to an index, to a bag.
_OUT_OF_RANGE = ("out of range", "out of bounds", "valid range", "Expected idx")
