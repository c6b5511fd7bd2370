"""What a forward gives, as a value that can be compared, and the plain forward as something to run again and again."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from torchstage._structure import TreeSpec, flatten, unflatten
from torchstage.loaders._differences import difference
from torchstage.loaders._twin import (
    CannotVerifyError,
    RandomState,
    Twin,
    Watch,
    WriteSeen,
    check_repeatable,
    copy_leaf,
    copy_tree,
    devices_of,
    without_hooks,
)
from torchstage.transforms._captured import Capture


@dataclasses.dataclass(frozen=True)
class Difference:
    """One thing in which two runs differ.

    Attributes:
        subject: what, for the message.
        how: the difference itself.
        parameter: the parameter, if it is a gradient.
    """

    subject: str
    how: str
    parameter: torch.Tensor | None = None


@dataclasses.dataclass
class Run:
    """What a forward gave.

    Attributes:
        outputs: the leaves of the result.
        spec: the structure of the result.
        state: copies of the buffers, and of the parameters that the forward writes, by name.
        random: the states of the generators after the forward; empty if it draws nothing.
        grads: a gradient, or None, by the id of its leaf; None if there was no backward.
        leaves: the leaves of autograd that have them, by id.
        refusal: why there are no gradients, where they could not be computed.
    """

    outputs: list[Any]
    spec: TreeSpec
    state: dict[str, torch.Tensor]
    random: list[torch.Tensor]
    grads: dict[int, Any] | None = None
    leaves: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    refusal: str | None = None

    def add_gradients(self, leaves: Sequence[Any]) -> None:
        """Run a backward from all outputs, and keep the graph for one more; ``.grad`` of nobody is touched.

        Args:
            leaves: the leaves of the call.
        """
        heads = [v for v in self.outputs if _records(v) and v.layout is torch.strided and not v.is_nested]
        self.leaves = _leaves_of(heads, [leaf for leaf in leaves if _records(leaf)])
        self.grads = {}
        if not heads or not self.leaves:
            return
        cotangents = [_cotangent(head, number) for number, head in enumerate(heads)]
        wanted = list(self.leaves.values())
        try:
            with without_hooks(wanted):
                found = torch.autograd.grad(heads, wanted, cotangents, retain_graph=True, allow_unused=True)
        except Exception as error:  # noqa: BLE001 - the caller's own backward raises it, if it is the model's
            self.grads = None
            self.refusal = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            return
        self.grads = dict(zip(self.leaves, found, strict=True))

    def differs_forward(self, plain: "Run") -> Difference | None:
        """Return the first difference of the forwards: in outputs, buffers or random states."""
        if self.spec != plain.spec:
            return Difference("the result", f"the structure {self.spec} instead of {plain.spec}")
        for number, (mine, theirs) in enumerate(zip(self.outputs, plain.outputs, strict=True)):
            subject = "the output" if len(self.outputs) == 1 else f"output {number}"
            how = difference(mine, theirs)
            if how is None and getattr(mine, "requires_grad", None) != getattr(theirs, "requires_grad", None):
                how = f"requires_grad {mine.requires_grad} instead of {theirs.requires_grad}"
            if how is not None:
                return Difference(subject, how)
        for name, tensor in self.state.items():
            how = difference(tensor, plain.state.get(name))
            if how is not None:
                return Difference(f"`{name}` after the forward", how)
        for mine, theirs in zip(self.random, plain.random, strict=True):
            if not torch.equal(mine, theirs):
                return Difference("the state of a random generator after the forward", "another number of draws")
        return None

    def differs_backward(self, plain: "Run", names: dict[int, str]) -> Difference | None:
        """Return the first difference of the gradients; none if one of the runs has no gradients.

        Args:
            plain: the run to compare with.
            names: names of leaves by id.
        """
        if self.grads is None or plain.grads is None:
            return None
        for key, leaf in {**plain.leaves, **self.leaves}.items():
            mine, theirs = self.grads.get(key), plain.grads.get(key)
            if mine is None and theirs is None:
                continue
            how = difference(mine, theirs)
            if how is not None:
                name = names.get(key)
                subject = f"the gradient of `{name}`" if name else f"the gradient of a tensor {list(leaf.shape)}"
                return Difference(subject, how.replace("no tensor", "none").replace("a Tensor", "one"), leaf)
        return None


class Plain:
    """The plain forward of one call, which can be run again and again from the state that the model has now.

    Args:
        model: the user's model.
        capture: what is known of its forward.
        leaves: the leaves of the call; copied.
        spec: the structure of the call.

    Attributes:
        names: names of the model's parameters and of the inputs that require grad, by id.

    Raises:
        CannotVerifyError: the forward cannot be run without a trace.
    """

    def __init__(self, model: torch.nn.Module, capture: Capture, leaves: Sequence[Any], spec: TreeSpec) -> None:
        check_repeatable(model, capture)
        self._model = model
        self._spec = spec
        self._given = list(leaves)
        self._copies = [copy_leaf(leaf) for leaf in leaves]
        self._written: list[torch.Tensor] = []
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.names.update((id(v), f"input_{i}") for i, v in enumerate(leaves) if _records(v))
        # Modules that are called as a whole may draw from the generators of Python, too.
        self._method = capture.method
        self._draws = any(not type(part).__module__.startswith("torch.nn.") for part in capture.modules.values())
        self._random = RandomState(devices_of([*model.parameters(), *model.buffers(), *leaves]), self._draws)
        while (parameter := self._find_write()) is not None:
            self._written.append(parameter)
            if len(self._written) > _MOST_RESTARTS:
                self._written = list(model.parameters())
        self._before = Twin(model, [id(parameter) for parameter in self._written])

    def twin(self) -> Twin:
        """Return a copy of the model as it was before the call, seen as a copy of the user's model."""
        before = self._before
        return Twin(before.model, [id(before.of(p)) for p in self._written], before)

    def leaves(self) -> list[Any]:
        """Return copies of the leaves of the call, as they were before it."""
        return [copy_leaf(leaf) for leaf in self._copies]

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """A time in which random generators start from before the call; they and the grad mode are put back after it."""
        now = self._random.again() if self._draws else None
        grad = torch.is_grad_enabled()
        try:
            if now is not None:
                self._random.restore()
            yield
        finally:
            if now is not None:
                now.restore()
            torch.set_grad_enabled(grad)

    def run(self) -> Run:
        """Run forward and backward from the state before the call.

        Raises:
            CannotVerifyError: the forward raises on a copy of the model.
        """
        twin, leaves = self.twin(), self.leaves()
        with self.undone():
            run = self._keep(self.forward(twin, leaves), twin.model)
            run.add_gradients(leaves)
        run.outputs = [v.detach().requires_grad_(v.requires_grad) if _is_tensor(v) else v for v in run.outputs]
        given = {id(leaf): original for leaf, original in zip(leaves, self._given, strict=True)}
        originals = {key: given.get(key, twin.original(leaf)) for key, leaf in run.leaves.items()}
        if run.grads is not None:
            run.grads = {id(originals[key]): grad for key, grad in run.grads.items()}
        run.leaves = {id(leaf): leaf for leaf in originals.values()}
        return run

    def run_instead(self, forward: Callable[[], Any]) -> tuple[Any, Run]:
        """Run ``forward`` on the model itself; return its result and what is to be compared.

        The backward that is run for the comparison leaves no trace: the caller's own works as if it had not been.
        """
        result = forward()
        run = self._keep(result, self._model)
        now = self._random.again() if self._draws else None
        try:
            run.add_gradients(self._given)
        finally:
            if now is not None:
                now.restore()
            for name, buffer in self._model.named_buffers():  # a checkpointed part runs again in a backward
                if difference(buffer, run.state[name]) is not None:
                    buffer.data.copy_(run.state[name])
        return result, run

    def forward(self, twin: Twin, leaves: list[Any]) -> Any:
        args, kwargs = unflatten(leaves, self._spec)
        try:
            return getattr(twin.model, self._method)(*args, **kwargs)
        except Exception as error:
            raise CannotVerifyError(
                f"its forward raises on a copy of the model: {type(error).__name__}: {error}"
            ) from error

    def _keep(self, result: Any, model: torch.nn.Module) -> Run:
        outputs, spec = flatten(result)
        state = {name: copy_tree(buffer) for name, buffer in model.named_buffers()}
        written = {id(parameter) for parameter in self._written}
        for original, (name, parameter) in zip(self._model.parameters(), model.named_parameters(), strict=True):
            if id(original) in written:
                state[name] = copy_tree(parameter)
        return Run(outputs, spec, state, self._random.again().states if self._draws else [])

    def _find_write(self) -> torch.Tensor | None:
        """Run once under a watch; return a parameter that forward or backward is about to write and the twin shares."""
        twin, leaves = Twin(self._model, [id(parameter) for parameter in self._written]), self.leaves()
        watch = Watch(twin.shared())
        grad = torch.is_grad_enabled()
        try:
            with watch:
                outputs, spec = flatten(self.forward(twin, leaves))
                Run(outputs, spec, {}, []).add_gradients(leaves)
        except WriteSeen:
            pass
        finally:
            torch.set_grad_enabled(grad)
            self._draws |= watch.draws
            if self._draws:
                self._random.restore()
        return watch.written


def _leaves_of(heads: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
    """Return the leaves of autograd that ``heads`` come from, by id; what lies behind ``inputs`` is left out."""
    found = {id(leaf): leaf for leaf in inputs}
    found.update((id(head), head) for head in heads if head.is_leaf)
    seen: set[Any] = {leaf.grad_fn for leaf in inputs}
    waiting = [head.grad_fn for head in heads if head.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # of the node that accumulates into a leaf
        if isinstance(variable, torch.Tensor):
            found[id(variable)] = variable
        waiting += [source for source, _ in node.next_functions if source is not None]
    return found


def _cotangent(head: torch.Tensor, number: int) -> torch.Tensor:
    """Return what a loss might send back for output ``number``: of its shape and dtype, the same in every run."""
    generator = torch.Generator().manual_seed(number)
    with _disable_current_modes():  # a watch shall not see it draw
        return torch.randn(head.shape, generator=generator, dtype=head.dtype, device="cpu").to(head.device)


def _records(value: Any) -> bool:
    return _is_tensor(value) and value.requires_grad


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


_MOST_RESTARTS = 4
