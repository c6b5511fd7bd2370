"""Whose code runs: the user's, or torch's and torchstage's. For the lines that a plan shows, and for what is watched."""

import inspect
import types

from torchstage.transforms._mirror import UntraceableError


def user_line() -> str:
    """Return ``file:line`` of the innermost frame of the user's code."""
    frame = inspect.currentframe()
    while frame is not None:
        if is_users(frame):
            return line_of(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return ""


def sentence(error: BaseException) -> str:
    if isinstance(error, UntraceableError):
        return str(error)
    lines = str(error).splitlines()
    where = _raised_at(error)
    return f"{type(error).__name__}: {lines[0] if lines else ''}{f' ({where})' if where else ''}"


def _raised_at(error: BaseException) -> str:
    found = ""
    trace = error.__traceback__
    while trace is not None:
        if is_users(trace.tb_frame):
            found = line_of(trace.tb_frame.f_code.co_filename, trace.tb_lineno)
        trace = trace.tb_next
    return found


def is_users(frame: types.FrameType) -> bool:
    module = f"{frame.f_globals.get('__name__', '')}."
    return not module.startswith(_NOT_USERS)


def line_of(filename: str, line: int) -> str:
    return f"{filename.replace(chr(92), '/').rsplit('/', 1)[-1]}:{line}"


_NOT_USERS = (
    "torch.",
    "torchstage.transforms.",
    "torchstage.loaders.",
    "torchstage.ops.",
    "torchstage._ops.",
    "torchstage.markers.",
    "torchstage._structure.",
    "torchstage._forms.",
    "torchstage._objects.",
    "torchstage._memory.",
)
