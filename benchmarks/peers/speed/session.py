"""Runs the runners: a process for each, and all of them in turn.

A process of its own keeps what one does out of the others' times: threads that wait, hooks on optimizers, a changed number
of intra-op threads. In a round each runs a number of steps while the others wait; the steps at the beginning of a turn are
not timed, since what a loader read ahead during the others' turns must be gone. After each round the weights of all
runners must be equal: they have done the same steps from the same start.
"""

import dataclasses
import multiprocessing
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
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

    def wait(self) -> None:
        """Return when the runner has been made."""

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

    def end(self) -> None:
        """End what runs in the background."""
        self._steps.close()


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
        found: Turn = self._answer((steps, warmup))
        return found

    def close(self) -> str:
        """As `Here.close`; the process ends."""
        try:
            return str(self._answer(None))
        finally:
            self.end()

    def end(self) -> None:
        """End the process, whatever it does."""
        self._connection.close()
        self._process.join(5.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _answer(self, *requests: Any) -> Any:
        try:
            for request in requests:
                self._connection.send(request)
            answered = self._connection.poll(PATIENCE)
            good, answer = self._connection.recv() if answered else (False, f"no answer within {PATIENCE:g} seconds")
        except (EOFError, ConnectionError):
            self._process.join(1.0)
            good, answer = False, f"the process ended with code {self._process.exitcode}"
        if not good:
            raise RuntimeError(answer)
        return answer


def _serve(connection: Connection, name: str, step: str, size: Size) -> None:
    """Answer requests for turns: whether it went well, and what was asked for or a traceback."""
    warnings.simplefilter("ignore")
    one_thread()
    try:
        session = Here(runner_of(name), step, size)
        connection.send((True, None))
        while (request := connection.recv()) is not None:
            connection.send((True, session.turn(*request)))
        connection.send((True, session.close()))
    except EOFError:
        sys.exit(1)
    except BaseException:  # noqa: BLE001 - told to who asked
        connection.send((False, traceback.format_exc()))


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
    start: Callable[[Runner, str, Size], Here | Elsewhere],
    told: Callable[[str], None] = print,
    warmup: int = WARMUP,
) -> dict[str, Figures]:
    """Time ``runners`` in turn; one round more than is kept.

    Args:
        runners: what to compare; the first one's weights are what the others are held against.
        step: the name of the main step.
        size: of model and data.
        rounds: how many rounds to keep.
        steps: timed steps of a turn.
        start: makes `Here` or `Elsewhere`.
        told: called with a line for each round, and each runner without figures.
        warmup: steps at the beginning of a turn that are not timed.

    Raises:
        DigestError: weights differ.
    """
    figures = {runner.name: Figures(problem=runner.version * bool(runner.missing)) for runner in runners}
    sessions = {runner.name: start(runner, step, size) for runner in runners if not figures[runner.name].problem}
    running = list(sessions)

    def ask(name: str, request: Callable[[], Any]) -> Any:
        """Return the answer to a request; a runner that raises is out from then on."""
        try:
            return request()
        except RuntimeError as error:
            running.remove(name)
            figures[name] = Figures(problem=f"does not run: {str(error).strip().splitlines()[-1]}")

    try:
        for name in list(running):
            ask(name, sessions[name].wait)
        for number in range(rounds + 1):
            for name in list(running):
                turn = ask(name, lambda name=name: sessions[name].turn(steps, warmup))  # type: ignore[misc]
                if turn:
                    figures[name].digest = turn.digest
                    figures[name].rounds += [turn.seconds] * (number > 0)
            _check_digests({name: figures[name].digest for name in running}, number)
            told(f"{step}: round {number} of {rounds}")
        for name in list(running):
            figures[name].report = ask(name, sessions[name].close) or ""
    finally:
        for session in sessions.values():
            session.end()
    for name, found in figures.items():
        if found.problem:
            told(f"{name}: {found.problem}")
    return figures


def elsewhere(runner: Runner, step: str, size: Size) -> Elsewhere:
    """Start a runner in a process of its own."""
    return Elsewhere(runner.name, step, size)


def _check_digests(digests: dict[str, str], number: int) -> None:
    names = list(digests)
    different = [name for name in names if digests[name] != digests[names[0]]]
    if different:
        raise DigestError(
            f"after round {number} the weights of {', '.join(different)} are not those of {names[0]}: "
            + ", ".join(f"{name} {digests[name]}" for name in [names[0], *different])
        )
