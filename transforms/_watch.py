"""What neither proxies nor a torch function mode see while a forward is traced: plain Python calls, globals, generators."""

import collections
import dis
import functools
import gc
import operator
import random
import sys
import time
import types
from typing import Any

import numpy as np
import torch

from torchstage.transforms._frames import is_users
from torchstage.transforms._mirror import StandIn, UntraceableError
from torchstage.transforms._value import Attribute, Number, Value


class Watch:
    """Watches the Python calls of the tracing thread for what neither proxies nor the function mode can see.

    A custom autograd function runs its forward on proxies and loses its backward; a generator that is seeded is seeded at
    capture only; a global name that is read is baked in, so it is noted for the guards.
    """

    def __init__(self, tracer: Any, *, mirrored: bool = False) -> None:
        self._tracer = tracer
        self._mirrored = mirrored  # whether the forward runs on stand-ins

    def __enter__(self) -> None:
        self._made: dict[int, Any] = {}  # modules that the forward made; kept, so that no other one gets the id
        self._holders: dict[int, Any] = {}
        self._contents: dict[int, tuple[Any, Any, str]] = {}
        self._before = sys.getprofile()
        self._collects = gc.isenabled()
        gc.disable()  # what finalizers and callbacks of the collector call is not the forward's
        sys.setprofile(self._see)

    def __exit__(self, *exc: object) -> None:
        if self._before is None or callable(self._before):
            sys.setprofile(self._before)
        else:  # cProfile, which is no Python function
            sys.setprofile(None)
            self._before.enable()
        if self._collects:
            gc.enable()
        self._put_back()
        self._made.clear()

    def _put_back(self) -> None:
        """Undo what the forward did to globals and what they hold: the step that runs it as Python does it again."""
        for container, before, name in self._contents.values():
            if isinstance(container, dict):
                for kind in _PROXIES & container.keys():  # a cache by type of value, which came to know a proxy's
                    del container[kind]
            if not _equal_items(container, before):
                container.clear()
                (container.update if isinstance(container, (dict, set)) else container.extend)(before)
                self._tracer.refused = UntraceableError(f"forward changes the {type(container).__name__} {name}")
        for owner, name, value in self._tracer.globals.values():
            if owner.get(name, owner) is not value and id(owner) in self._holders:
                setattr(self._holders[id(owner)], name, value)
                self._tracer.refused = UntraceableError(f"forward changes the {name} of a global object")

    def _see(self, frame: types.FrameType, event: str, arg: Any) -> None:
        if event == "call":
            if frame.f_code is _APPLY:
                self._refuse(f"forward calls the autograd function {frame.f_locals['cls'].__name__}")
            self._see_self(frame)
            if is_users(frame):
                if _stores_global(frame.f_code):
                    self._refuse("forward assigns a global variable")
                self._note_globals(frame)
        elif arg is isinstance:
            user = frame.f_code is _IS_TENSOR or is_users(frame)
            self._tracer.asking = event == "c_call" and user
        elif event == "c_call":
            if _is_torchs(arg) and not str(frame.f_globals.get("__name__")).startswith("torchstage.transforms."):
                self._tracer.in_torch, self._tracer.calling = frame, arg.__name__
            if isinstance(getattr(arg, "__self__", None), torch.Generator):
                self._see_generator(arg.__name__)
            elif arg in _TELLS and is_users(frame) and not _is_standard(frame):
                self._refuse(f"forward calls {arg.__name__}")
        elif frame is self._tracer.in_torch and event in ("c_return", "c_exception"):
            self._tracer.returned()

    def _see_self(self, frame: types.FrameType) -> None:
        """Refuse a call on a module that was there before: only what is read through a stand-in is guarded."""
        code = frame.f_code
        names = ("forward", "__init__")
        if not self._mirrored or not code.co_argcount or not (code.co_name in names or is_users(frame)):
            return
        given = frame.f_locals.get(code.co_varnames[0])
        if not issubclass(type(given), torch.nn.Module) or id(given) in self._made:
            return
        if code.co_name == "__init__" and not vars(given):
            self._made[id(given)] = given
            return
        if not issubclass(type(given), StandIn):
            self._refuse(f"forward reaches a {type(given).__name__} that is not among its modules")
        if "type" in code.co_names or "__class__" in code.co_names:
            for base in type(given).__mro__:
                for name in code.co_names:
                    if name in vars(base) and not callable(vars(base)[name]):
                        self._note(vars(base), name, vars(base)[name])

    def _see_generator(self, method: str) -> None:
        if method in ("manual_seed", "seed", "set_state", "graphsafe_set_state", "set_offset"):
            self._refuse("forward seeds a random generator")

    def _refuse(self, why: str) -> None:
        self._tracer.refused = UntraceableError(why)
        raise self._tracer.refused

    def _note_globals(self, frame: types.FrameType) -> None:
        names = frame.f_code.co_names
        if _is_standard(frame):
            return
        for name in _globals_of(frame.f_code):
            if name in frame.f_globals:
                value = frame.f_globals[name]
                self._note(frame.f_globals, name, value)
                inner = getattr(value, "__dict__", None)
                if inner is not None and not getattr(value, "__name__", "").startswith("torch"):
                    for attribute in names:
                        if attribute in inner:
                            self._holders[id(inner)] = value
                            self._note(inner, attribute, inner[attribute])

    def _note(self, owner: Any, name: str, value: Any) -> None:
        if type(value) in (list, dict, set, collections.deque) and not name.startswith("__"):
            self._contents.setdefault(id(value), (value, value.copy(), name))
        self._tracer.globals.setdefault((id(owner), name), (owner, name, value))


_PROXIES = {Value, Number, Attribute}
_STDLIB = sys.stdlib_module_names - {"__main__"}
_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]


class PythonRandomUntouched:
    """Refuse a forward that draws from Python's or NumPy's generators: the draw would be done once, at capture."""

    def __enter__(self) -> None:
        self._before = _generators()

    def __exit__(self, *exc: object) -> None:
        before, after = self._before, _generators()
        if before[1] != after[1]:
            random.setstate(before[1])
        if before[3] != after[3]:
            np.random.set_state(before[2])
        if before[1:2] + before[3:] != after[1:2] + after[3:]:
            raise UntraceableError("forward draws from Python's or NumPy's random generator")


def _generators() -> tuple[Any, ...]:
    legacy: Any = np.random.get_state()
    return None, random.getstate(), legacy, (legacy[1].tobytes(), *legacy[2:])


def _equal_items(container: Any, before: Any) -> bool:
    if len(container) != len(before):
        return False
    if isinstance(container, dict):
        return all(container.get(key, container) is value for key, value in before.items())
    return container == before if isinstance(container, set) else all(map(operator.is_, container, before))


@functools.cache
def _stores_global(code: types.CodeType) -> bool:
    return any(instruction.opname == "STORE_GLOBAL" for instruction in dis.get_instructions(code))


@functools.cache
def _globals_of(code: types.CodeType) -> tuple[str, ...]:
    """Return the names that may be globals, and not only attributes: `self.loss` has nothing to do with a loop's ``loss``."""
    named = [i for i in dis.get_instructions(code) if i.opcode in dis.hasname]
    return tuple(dict.fromkeys(i.argval for i in named if not i.opname.endswith(("_ATTR", "_METHOD"))))


def _is_standard(frame: types.FrameType) -> bool:
    """Whether the standard library's code runs."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] in _STDLIB


def _is_torchs(function: Any) -> bool:
    """Whether a built-in function is one of torch's."""
    home = f"{getattr(function, '__module__', None)}."
    return home.startswith("torch.") or isinstance(getattr(function, "__self__", None), torch.Tensor)


# What does something at every call that a graph would not do, or gives something else at every call.
_TELLS = (print, input, open, time.time, time.time_ns, time.perf_counter, time.perf_counter_ns, time.monotonic)
_IS_TENSOR = torch.is_tensor.__code__
