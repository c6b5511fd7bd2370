"""Reads: what the Python code of a forward may have read while it ran, where nothing stands between it and its objects.

The code that ran is known, from a profile function, and with it every name in it. An attribute of the model whose name
occurs there may have been read; where code asks for attributes in a way that shows no names, all may have been.
"""

import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from torchstage import markers
from torchstage.transforms._frames import is_users
from torchstage.transforms._mirror import MISSING, UntraceableError
from torchstage.transforms._watch import Watch


class Reads:
    """Notes what runs and what it reads, in the calling thread, while it is entered.

    Attributes:
        globals: names outside the model that were read: (dictionary, name, value) by where they are.
        tensors: the tensors with contents that torch functions were called with, by id.
        refused: why the forward cannot be captured, if that was seen.
        codes: the users' code that ran.
        layer_codes: the code of torch's layers that ran.
    """

    def __init__(self) -> None:
        self.globals: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        self.tensors: dict[int, torch.Tensor] = {}
        self.refused: UntraceableError | None = None
        self.asking, self.in_torch, self.calling = False, None, ""  # what `Watch` tells a tracer; not used here
        self.codes: set[types.CodeType] = set()
        self.layer_codes: set[types.CodeType] = set()
        self._watch = _Watch(self)
        self._mode = _Mode(self)

    def __enter__(self) -> "Reads":
        self._mode.__enter__()
        self._watch.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._watch.__exit__(*exc)
        self._mode.__exit__(*exc)

    def returned(self) -> None:
        """Take no note of a built-in function that has returned; a tracer does."""

    def attributes(self, modules: Mapping[str, torch.nn.Module]) -> Iterator[tuple[str, str, Any]]:
        """Yield the attributes of ``modules`` that may have been read, as (path, name, value)."""
        names, texts = self._names()
        everything = not names.isdisjoint(_SHOW_NO_NAMES)
        for path, module in modules.items():
            own = vars(module)
            for name, value in own.items():
                if name in _MACHINERY or isinstance(value, (torch.Tensor, torch.nn.Module)):
                    continue  # tensors and modules are guarded where the graph reads or runs them
                if everything or name in names or name in texts:
                    yield path, name, value
            if not _is_torchs(type(module)):
                for name in sorted(texts):
                    if not hasattr(module, name):
                        yield path, name, MISSING

    def class_attributes(self, modules: Mapping[str, torch.nn.Module]) -> Iterator[tuple[Any, str, Any]]:
        """Yield the data of the users' classes of ``modules`` that may have been read, as (dictionary, name, value)."""
        names, texts = self._names()
        kinds = dict.fromkeys(cls for module in modules.values() for cls in type(module).__mro__ if not _is_torchs(cls))
        for cls in kinds:
            for name, value in vars(cls).items():
                if (name in names or name in texts) and not name.startswith("__") and not _is_code(value):
                    yield vars(cls), name, value

    def metadata(self) -> bool:
        """Whether a shape, dtype or device may have been asked for."""
        return not self._names()[0].isdisjoint(_METADATA)

    def _names(self) -> tuple[set[str], set[str]]:
        """Return the names in the code that ran, and the texts in code that asks for attributes by text."""
        names = {name for code in (*self.codes, *self.layer_codes) for name in code.co_names}
        texts: set[str] = set()
        for code in self.codes:
            if not _ASK_BY_TEXT.isdisjoint(code.co_names):
                found = [c for c in code.co_consts if isinstance(c, str) and c.isidentifier()]
                texts.update(found)
                if not found:
                    names.add("__dict__")  # the text comes from elsewhere
        return names, texts


class _Watch(Watch):
    """A `Watch` that also keeps the code that ran: the users', and that of torch's layers."""

    def __init__(self, reads: Reads) -> None:
        super().__init__(reads)
        self._reads = reads

    def _see(self, frame: types.FrameType, event: str, arg: Any) -> None:
        home = str(frame.f_globals.get("__name__", ""))
        if event == "call":
            if home.startswith(("torch.nn.modules.", "torch.nn.functional")):
                self._reads.layer_codes.add(frame.f_code)
                return
            if home == "torch.utils.checkpoint":
                self._refuse(
                    "forward uses checkpoint, whose backward computes again, and a graph would keep all values"
                )
            if _is_exports(home):
                return
            if is_users(frame):
                self._reads.codes.add(frame.f_code)
        elif _is_exports(home) or not is_users(frame):
            return
        super()._see(frame, event, arg)


class _Mode(TorchFunctionMode):
    """Notes the tensors with contents among the arguments of torch's functions: they are the users' own."""

    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (markers.boundary, markers.target):
            self._reads.refused = UntraceableError("forward has a `staged` or `mark_target_node` mark, which is lost")
            raise self._reads.refused
        for value in (*args, *(kwargs or {}).values()):
            if type(value) in _WITH_CONTENTS and not (value.is_meta or torch._is_functional_tensor(value)):
                self._reads.tensors[id(value)] = value
        return func(*args, **(kwargs or {}))


def _is_exports(home: str) -> bool:
    """Whether a module is one that torch.export itself is made of: its names are no names of the forward's."""
    return home.startswith("namedtuple_") or home.partition(".")[0] in _EXPORTS_OWN


def _is_torchs(cls: type) -> bool:
    return cls is object or cls.__module__.partition(".")[0] == "torch"


def _is_code(value: Any) -> bool:
    return callable(value) or hasattr(value, "__get__")


_MACHINERY = frozenset(vars(torch.nn.Module()))
_WITH_CONTENTS = (torch.Tensor, torch.nn.Parameter)
_SHOW_NO_NAMES = frozenset(["vars", "__dict__", "__getattribute__", "__getstate__", "attrgetter", "eval", "exec"])
_ASK_BY_TEXT = frozenset(["getattr", "hasattr"])
_METADATA = frozenset("shape size dim ndim numel dtype device stride is_contiguous is_cuda type".split())
_EXPORTS_OWN = (sys.stdlib_module_names - {"__main__"}) | {"sympy", "mpmath", "numpy", "optree", "typing_extensions"}
