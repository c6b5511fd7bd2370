"""The example: what the nodes of a graph give for one batch, as far as shapes, dtypes, devices and types go.

Tensors are fake ones, without contents, so nothing of the user's is computed, written or drawn, and whatever depends on
contents is not known. What is known is exact for every batch with the same shapes.
"""

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.fx
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode

from torchstage._structure import is_text_leaf
from torchstage.transforms._op_shapes import Text, made_by
from torchstage.transforms._twins import twin


class NotKnown(Exception):
    """A value depends on the contents of the batch or of the model's tensors, or on an unknown function."""


class Example:
    """Evaluates nodes in the order of their graph.

    Args:
        graph: the graph; it may still grow.
        leaves: the leaves of a call, by the target of their placeholder.
        state: the tensors and arrays that the graph reads, by the target of their node; it may still grow.
        modules: the submodules that the graph calls, by path; it may still grow.
    """

    def __init__(
        self,
        graph: torch.fx.Graph,
        leaves: Mapping[str, Any],
        state: Mapping[str, Any],
        modules: Mapping[str, torch.nn.Module],
    ) -> None:
        self._graph = graph
        self._leaves = leaves
        self._state = state
        self._modules = modules
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._open = False  # whether sizes that depend on contents are known as unknowns
        self._known: dict[torch.fx.Node, Any] = {}
        self._fakes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._grad = self._grad_before = torch.is_grad_enabled()

    def of(self, node: torch.fx.Node) -> Any:
        """Return what ``node`` gives, a tensor without contents for a tensor.

        Raises:
            NotKnown: it depends on the contents of a tensor or is made by an unknown function.
        """
        if node not in self._known:
            try:
                self._catch_up(node)
            except DynamicOutputShapeException:
                self._begin_again()
                self._catch_up(node)
        return self._argument(node)

    def _begin_again(self) -> None:
        """Evaluate once more with unknowns for sizes that depend on contents, such as of ``x[x > 0]``. That takes longer."""
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        environment = ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=environment)
        self._open = True
        self._known.clear()
        self._fakes.clear()
        self._grad = self._grad_before

    def _catch_up(self, last: torch.fx.Node) -> None:
        """Evaluate in order up to ``last``: an operation in place may change the shape of what came before it."""
        grad, profile = torch.is_grad_enabled(), sys.getprofile()
        watched = callable(
            profile
        )  # a tracer watches; what happens here is not the user's doing. cProfile is no function
        if watched:
            sys.setprofile(None)
        try:
            with torch._C.DisableTorchFunction(), self._mode:
                torch.set_grad_enabled(self._grad)
                for node in self._graph.nodes:
                    if node not in self._known:
                        self._known[node] = self._evaluate(node)
                    if node is last:
                        break
                self._grad = torch.is_grad_enabled()
        finally:
            with torch._C.DisableTorchFunction():
                torch.set_grad_enabled(grad)
            if watched:
                sys.setprofile(profile)

    def _evaluate(self, node: torch.fx.Node) -> Any:
        if node.op == "placeholder":
            leaf = self._leaves[str(node.target)]
            return Text(len(leaf)) if is_text_leaf(leaf) else leaf
        if node.op == "get_attr":
            return self._state[str(node.target)]
        try:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self._argument)
            return self._without_contents(self._call(node, args, kwargs))
        except DynamicOutputShapeException:
            if not self._open:
                raise
            why = "its shape depends on contents"
        except NotKnown as unknown:
            why = str(unknown)
        except Exception as error:  # noqa: BLE001 - a value that cannot be told is one that is not known
            why = f"{type(error).__name__}: {error}"
        return _Unknown(why)  # not the exception: its frames would keep proxies alive

    def _argument(self, node: torch.fx.Node) -> Any:
        value = self._known[node]
        if isinstance(value, _Unknown):
            raise NotKnown(value.why)
        return value

    def _call(self, node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
        target: Any = node.target
        made = made_by(target, args, kwargs) if node.op == "call_function" else None
        if made is not None:
            shape, dtype = made
            return torch.empty(shape, dtype=dtype, device="cpu")
        kinds = {_kind_of(leaf) for leaf in _leaves_of((args, kwargs))}
        home = str(getattr(target, "__module__", None))
        if target is getattr:
            if args[1] in _FIELDS or kinds == {_PLAIN}:
                return getattr(args[0], args[1])
            if args[1] in _VIEWS and kinds <= {_PLAIN, _TENSOR}:
                return getattr(self._fake(args[0]), args[1])
        elif target is len or target in QUESTION_METHODS:
            return target(args[0]) if target is len else getattr(args[0], target)(*args[1:], **kwargs)
        elif kinds <= {_PLAIN} and (node.op == "call_method" or home in ("_operator", "math", "builtins")):
            return (
                getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)
            )
        elif kinds <= {_PLAIN, _TENSOR} or (target in _FROM_ARRAY and kinds <= {_PLAIN, _TENSOR, _ARRAY}):
            args, kwargs = torch.fx.node.map_aggregate((args, kwargs), self._fake)
            if node.op == "call_module":
                return self._call_layer(target, args, kwargs)
            if node.op == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            if home == "_operator" or home.startswith(("torch.", "torchstage.markers")) or home == "torch":
                return target(*args, **kwargs)
        raise NotKnown(f"{getattr(target, '__name__', target)} depends on contents or is no function of torch")

    def _call_layer(self, path: str, args: Any, kwargs: Any) -> Any:
        module = self._modules[path]
        if not all(type(part).__module__.startswith("torch.nn.modules.") for part in module.modules()):
            raise NotKnown(f"the submodule {path} is called as a whole")
        return twin(module, self._fake)(*args, **kwargs)

    def _fake(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
            return value
        if id(value) not in self._fakes:
            self._fakes[id(value)] = value, self._mode.from_tensor(value, static_shapes=True)
        return self._fakes[id(value)][1]

    def _without_contents(self, value: Any) -> Any:
        """Return ``value`` with fake tensors only, that know no contents: torch keeps those of literals."""

        def strip(item: Any) -> Any:
            fake = self._fake(item)
            if isinstance(fake, FakeTensor):
                fake.constant = None
            return fake

        if not any(isinstance(leaf, torch.Tensor) for leaf in _leaves_of(value)):
            return value  # a torch.Size would come back as a tuple
        return torch.fx.node.map_aggregate(value, strip)


class _Unknown(NamedTuple):
    """Stands for a value that is not known."""

    why: str


def _leaves_of(tree: Any) -> list[Any]:
    found: list[Any] = []
    torch.fx.node.map_aggregate(tree, found.append)
    return found


def _kind_of(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return _TENSOR
    if isinstance(leaf, np.ndarray):
        return _ARRAY
    return _PLAIN if isinstance(leaf, _PLAIN_TYPES) else type(leaf).__name__


_TENSOR, _ARRAY, _PLAIN = "tensor", "array", "plain"
_PLAIN_TYPES = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    type(...),
    torch.Size,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.SymInt,
    torch.SymFloat,
    torch.SymBool,
)
# What tells of a tensor or an array what it is, not what it holds.
_FIELDS = frozenset(
    "shape dtype device ndim size layout itemsize is_cuda is_sparse is_nested is_quantized nbytes".split()
)
_VIEWS = frozenset("T mT H mH real imag data".split())
QUESTION_METHODS = frozenset(
    "size dim ndimension numel nelement stride element_size is_contiguous is_floating_point is_complex is_signed "
    "get_device".split()
)
_FROM_ARRAY = (torch.from_numpy, torch.as_tensor, torch.tensor, torch.asarray)
