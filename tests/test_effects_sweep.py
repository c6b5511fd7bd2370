"""Every operation and layer of torch's own test database against what is said of its effect and memory.

The database comes with torch but needs `expecttest`; without that package these tests are skipped.
"""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.fx

from torchstage.transforms._effect_memory import shared_with
from torchstage.transforms._effects import Kind, effect_of, module_effect
from torchstage.transforms._module_effects import gives_fresh_memory

pytest.importorskip("expecttest", reason="torch's database of operations needs it")
pytestmark = pytest.mark.filterwarnings("ignore")  # samples of deprecated operations are among them

MOST_SAMPLES = 8
MOST_ELEMENTS = 20_000
UNSET = ("empty", "lstsq")  # what they return is not all computed


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def memory(tensor: torch.Tensor) -> int:
    strided = tensor.layout is torch.strided and not tensor.is_nested
    return tensor.untyped_storage()._cdata if strided else id(tensor)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    dense = tensor.detach().to_dense() if tensor.layout is not torch.strided else tensor.detach()
    dense = dense.resolve_conj().resolve_neg().reshape(-1).clone(memory_format=torch.contiguous_format)
    return dense.view(torch.uint8) if dense.dtype is not torch.bool else dense


def same(one: Any, other: Any) -> bool:
    pairs = list(zip(tensors(one), tensors(other), strict=True))
    return all(a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b)) for a, b in pairs)


def variants(op: Any) -> Iterator[tuple[str, Any]]:
    target: Any = torch
    for part in op.name.split("."):
        target = getattr(target, part, None)
    if target is not None:
        yield "call_function", target
    last = op.name.rpartition(".")[2]
    if op.method_variant is not None and hasattr(torch.Tensor, last):
        yield "call_method", last
    if op.inplace_variant is not None and hasattr(torch.Tensor, f"{last}_"):
        yield "call_method", f"{last}_"


def samples(op: Any) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    if not op.dtypes:  # for other devices only
        return
    dtype = torch.float32 if torch.float32 in op.dtypes else min(op.dtypes, key=str)
    try:
        made = list(op.sample_inputs("cpu", dtype, requires_grad=False))
    except Exception:  # samples that need another device or library
        return
    for sample in made[:MOST_SAMPLES]:
        call = (sample.input, *sample.args), sample.kwargs
        if all(t.numel() <= MOST_ELEMENTS for t in tensors(call)):
            yield call


def node_of(kind: str, target: Any, args: Any, kwargs: Any) -> tuple[torch.fx.Node, dict[torch.fx.Node, torch.Tensor]]:
    graph = torch.fx.Graph()
    inputs: dict[torch.fx.Node, torch.Tensor] = {}

    def convert(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        node = graph.placeholder(f"input_{len(inputs)}")
        inputs[node] = value
        return node

    args, kwargs = torch.fx.node.map_aggregate((tuple(args), dict(kwargs)), convert)
    return graph.create_node(kind, target, args, kwargs), inputs


def run(kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return getattr(args[0], target)(*args[1:], **kwargs) if kind == "call_method" else target(*args, **kwargs)


def lies_of(op: Any) -> Iterator[str]:
    for kind, target in variants(op):
        for args, kwargs in samples(op):
            try:
                node, inputs = node_of(kind, target, args, kwargs)
            except Exception:  # a graph cannot hold these arguments, so no capture has them
                continue
            effect = effect_of(node, {})
            call = functools.partial(run, kind, target, args, kwargs)
            before, state = [t._version for t in inputs.values()], torch.get_rng_state()
            in_place = effect.kind is Kind.WRITES and effect.in_place
            if not in_place and effect.kind not in (Kind.PURE, Kind.FREE):
                continue
            try:
                with torch.no_grad():
                    result = call()
            except Exception:  # samples for another form of the operation
                continue
            name = f"{op.name} as {kind} of {target}"
            written = [t for t, version in zip(inputs.values(), before, strict=True) if t._version != version]
            if any(t is not args[0] for t in written) or (written and not in_place):
                yield f"{name} writes into its arguments"
            if not torch.equal(state, torch.get_rng_state()):
                yield f"{name} draws random numbers"
            shared = shared_with(node, effect, {})
            known = {memory(tensor) for tensor in inputs.values()}
            allowed = {memory(tensor) for n, tensor in inputs.items() if shared is None or n in shared}
            if any(memory(tensor) in known - allowed for tensor in tensors(result)):
                yield f"{name} returns memory that it was said not to share"
            if effect.kind is Kind.PURE and not any(word in op.name for word in UNSET):
                with torch.enable_grad():
                    if not same(result, call()):
                        yield f"{name} gives other bits with grad mode on"


def test_no_operation_does_more_than_is_said_of_it() -> None:
    from torch.testing._internal.common_methods_invocations import op_db

    torch.manual_seed(0)
    lies = sorted({lie for op in op_db for lie in lies_of(op)})
    assert not lies, "\n".join(lies)


def test_no_layer_does_more_than_is_said_of_it() -> None:
    from torch.testing._internal.common_modules import module_db

    lies: set[str] = set()
    seen = 0
    for info in module_db:
        for training in (True, False):
            made = info.module_inputs_func(
                info, device="cpu", dtype=torch.float32, requires_grad=False, training=training
            )
            for sample in made[:MOST_SAMPLES]:
                module = info.module_cls(*sample.constructor_input.args, **sample.constructor_input.kwargs)
                module.train(training)
                if sample.forward_input is None or module_effect(module).kind is not Kind.PURE:
                    continue
                module.requires_grad_(False)
                args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
                held = [*tensors((args, kwargs)), *module.parameters(), *module.buffers()]
                before, state = [t._version for t in held], torch.get_rng_state()
                try:
                    with torch.no_grad():
                        result = module(*args, **kwargs)
                except Exception:  # samples of errors are among them
                    continue
                seen += 1
                name = f"{info.name} {'in train' if training else 'in eval'} mode"
                if before != [t._version for t in held]:
                    lies.add(f"{name} writes")
                if not torch.equal(state, torch.get_rng_state()):
                    lies.add(f"{name} draws")
                if not same(result, module(*args, **kwargs)):
                    lies.add(f"{name} gives other bits with grad mode on")
                if gives_fresh_memory(module) and {memory(t) for t in tensors(result)} & {memory(t) for t in held}:
                    lies.add(f"{name} shares memory")
    assert not lies, "\n".join(sorted(lies))
    assert seen > 300
