"""Runs the runners: a process for each, and all of them in turn.

A process of its own keeps what one does out of the others' times: threads that wait, hooks on optimizers, a changed number of
intra-op threads. In a round each runs a number of steps while the others wait; the steps at the beginning of a turn are
not timed, since what a loader read ahead during the others' turns must be gone. After each round the weights of all runners must be
equal: they have done the same steps from the same start.
"""

import dataclasses
import multiprocessing
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from benchmarks.peers.speed.model import STEPS, Job, Size
from benchmarks.peers.speed.peers import runner_of
from benchmarks.peers.speed.runner import Runner, Steps, one_thread

WARMUP = 8
PATIENCE = 300.0


class DigestError(AssertionError):
    """Two runners have trained different weights: what they took cannot be compared."""


class Turn(NamedTuple):
    """What one turn gave.

    Attributes:
        seconds: per step.
        digest: of the weights after it.
    """

    seconds: float
    digest: str


class Here:
    """A runner in this process.

    Args:
        runner: the runner.
        step: the name of the main step.
        size: of model and data.
    """

    def __init__(self, runner: Runner, step: str, size: Size) -> None:
        self._runner = runner
        self._job = Job(size, STEPS[step])
        self._steps: Steps = runner.steps(self._job)

    def turn(self, steps: int, warmup: int = WARMUP) -> Turn:
        """Train ``warmup`` steps and then ``steps`` that are timed."""
        for _ in range(warmup):
            next(self._steps)
        begun = time.perf_counter()
        for _ in range(steps):
            next(self._steps)
        return Turn((time.perf_counter() - begun) / steps, self._job.digest())

    def close(self) -> str:
        """End what runs in the background; return the runner's report."""
        self._steps.close()
        return self._runner.report


class Elsewhere:
    """A runner in a process of its own, with the same methods.

    Args:
        name: the runner's name.
        step: the name of the main step.
        size: of model and data.

    Raises:
        RuntimeError: the runner raised; the message is its traceback.
    """

    def __init__(self, name: str, step: str, size: Size) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, name, step, size))
        self._process.start()
        other.close()

    def wait(self) -> None:
        """Return when the runner has been made."""
        self._answer()

    def turn(self, steps: int, warmup: int = WARMUP) -> Turn:
        """As `Here.turn`."""
        self._connection.send((steps, warmup))
        found: Turn = self._answer()
        return found

    def close(self) -> str:
        """As `Here.close`; the process ends."""
        try:
            self._connection.send(None)
            return str(self._answer())
        finally:
            self.end()

    def end(self) -> None:
        """End the process, whatever it does."""
        self._connection.close()
        self._process.join(5.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv() if self._connection.poll(PATIENCE) else "no answer"
        except (EOFError, ConnectionError):
            answer = f"the process ended with code {self._process.exitcode}"
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer[0]


def _serve(connection: Connection, name: str, step: str, size: Size) -> None:
    """Answer requests for turns: a tuple with what was asked for, or a traceback."""
    warnings.simplefilter("ignore")
    one_thread()
    try:
        session = Here(runner_of(name), step, size)
        connection.send((None,))
        while (request := connection.recv()) is not None:
            connection.send((session.turn(*request),))
        connection.send((session.close(),))
    except EOFError:
        sys.exit(1)
    except BaseException:  # noqa: BLE001 - told to who asked
        connection.send(traceback.format_exc())


@dataclasses.dataclass
class Figures:
    """What is known of one runner under one main step.

    Attributes:
        rounds: seconds per step, one figure for each timed round.
        digest: of the weights at the end.
        report: what the runner said at the end.
        problem: why there are no figures, or nothing.
    """

    rounds: list[float] = dataclasses.field(default_factory=list)
    digest: str = ""
    report: str = ""
    problem: str = ""


def compare(
    runners: Sequence[Runner],
    step: str,
    size: Size,
    rounds: int,
    steps: int,
    start: Callable[[Runner, str, Size], Any],
    told: Callable[[str], None] = print,
) -> dict[str, Figures]:
    """Time ``runners`` in turn; the first round more is not kept.

    Args:
        runners: what to compare; the first one's weights are what the others are held against.
        step: the name of the main step.
        size: of model and data.
        rounds: how many rounds to keep.
        steps: timed steps of a turn.
        start: makes `Here` or `Elsewhere`.
        told: called with a line for each round, and each runner without figures.

    Raises:
        DigestError: weights differ.
    """
    figures = {runner.name: Figures() for runner in runners}
    sessions: dict[str, Any] = {}
    try:
        for name, session in _started(runners, step, size, start, figures):
            sessions[name] = session
        for number in range(rounds + 1):
            for name in list(sessions):
                _take_turn(sessions, name, steps, figures[name], keep=number > 0)
            _check_digests({name: figures[name].digest for name in sessions}, number)
            told(f"{step}: round {number} of {rounds}")
        for name in list(sessions):
            figures[name].report = sessions.pop(name).close()
    finally:
        for session in sessions.values():
            getattr(session, "end", session.close)()
    for name, found in figures.items():
        if found.problem:
            told(f"{name}: {found.problem}")
    return figures


def elsewhere(runner: Runner, step: str, size: Size) -> Elsewhere:
    """Start a runner in a process of its own, and wait until it is made."""
    session = Elsewhere(runner.name, step, size)
    try:
        session.wait()
    except BaseException:
        session.end()
        raise
    return session


def _started(
    runners: Iterable[Runner], step: str, size: Size, start: Callable[..., Any], figures: dict[str, Figures]
) -> Iterator[tuple[str, Any]]:
    for runner in runners:
        if missing := runner.missing:
            figures[runner.name].problem = f"not installed: {missing}"
            continue
        try:
            yield runner.name, start(runner, step, size)
        except RuntimeError as error:
            figures[runner.name].problem = f"does not run: {_last(error)}"


def _take_turn(sessions: dict[str, Any], name: str, steps: int, figures: Figures, keep: bool) -> None:
    try:
        turn = sessions[name].turn(steps)
    except RuntimeError as error:
        figures.rounds.clear()
        figures.problem = f"does not run: {_last(error)}"
        session = sessions.pop(name)
        getattr(session, "end", session.close)()
        return
    figures.digest = turn.digest
    if keep:
        figures.rounds.append(turn.seconds)


def _check_digests(digests: dict[str, str], number: int) -> None:
    names = list(digests)
    different = [name for name in names if digests[name] != digests[names[0]]]
    if different:
        raise DigestError(
            f"after round {number} the weights of {', '.join(different)} are not those of {names[0]}: "
            + ", ".join(f"{name} {digests[name]}" for name in [names[0], *different])
        )


def _last(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
