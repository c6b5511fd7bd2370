"""The stage in another process, for a step that Python's lock slows down more than the stage is worth.

Contract (tests/test_process.py has a test per number).

 1. Same numbers. The process runs the stage's own graph, under the settings of the training thread.
 2. Threads. A worker that stages waits for its process without holding Python's lock. There are as many processes as batches
    were staged at once.
 3. Tensors go through memory that both see, which is written again for the next batch; text and everything else is pickled.
    What comes back is copied out, so that a batch may wait as long as it likes.
 4. State. What the graph reads of the model is sent again when it has changed.
 5. Errors arrive with their own type, as those of a thread do. A process that dies is an error that says so, and the next
    batch gets a new one.
 6. Not every graph can be sent: one with functions of the training script itself, say. Then threads run it, and a warning
    says why.
 7. Everything stops. The processes end with `close`, with the loader, with the training process however it ends.
"""

import os
import pickle
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable
from multiprocessing import Pipe
from typing import Any

import torch
import torch.fx

from torchstage._memory import is_in, state_of
from torchstage._mode import Ambient
from torchstage._stage_process import Memory, Message, Program
from torchstage.errors import StageProcessError, TorchstageWarning
from torchstage.stats import Recorder

Run = Callable[..., list[Any]]


class ProcessStage:
    """Runs a stage graph in other processes; see the module's contract. Any thread may call it.

    Attributes:
        recorder: where a warning goes.

    Args:
        module: the graph.
        run: runs it in the calling thread.
        ambient: the settings of the training thread.
        recorder: where a warning goes.
    """

    def __init__(self, module: torch.fx.GraphModule, run: Run, ambient: Ambient, recorder: Recorder) -> None:
        self._module = module
        self._run = run
        self._ambient = ambient._replace(device=None)
        self.recorder = recorder
        self._lock = threading.Lock()
        self._idle: list[_Process] = []
        self._all: list[_Process] = []
        self._states: list[tuple[torch.Tensor, Any]] = []
        self._program = b""
        self._version = 0
        self._refused = ""
        weakref.finalize(self, _end_all, self._all)
        _live.add(self)

    def __call__(self, *inputs: Any) -> list[Any]:
        """Return what the graph gives for ``inputs``.

        Raises:
            StageProcessError: the process died.
            Exception: whatever an operation raises.
        """
        if self._refused:
            return self._run(*inputs)
        with self._lock:
            process = self._idle.pop() if self._idle else None
        try:
            process, answer = self._ask(process, inputs)
        except _CannotRun as why:
            self._refused = str(why)
            told = f"the stage runs in threads, not in a process of its own: {why}"
            self.recorder.warn_once("process", TorchstageWarning, told)
            return self._run(*inputs)
        try:
            if isinstance(answer, Exception):
                raise answer
            return list(process.made.read(answer, copy=True))
        finally:
            with self._lock:
                if process in self._all:  # it was not ended meanwhile
                    self._idle.append(process)  # only now: its next batch is written over what was just copied

    def close(self) -> None:
        """End the processes. The next call starts new ones."""
        with self._lock:
            self._idle.clear()
        _end_all(self._all)

    def _ask(self, process: "_Process | None", inputs: tuple[Any, ...]) -> "tuple[_Process, Any]":
        program, version = self._current_program()
        if process is None:
            process = _Process()
            self._all.append(process)
        try:
            if process.version != version:
                kernels = process.ask(program)
                if isinstance(kernels, Exception):
                    raise _CannotRun(f"it could not be loaded there ({type(kernels).__name__}: {kernels})")
                if kernels != self._ambient.kernels:
                    raise _CannotRun("this process chooses kernels in another way than a new one does")
                process.version = version
            return process, process.ask(pickle.dumps((self._ambient, self._given(process, inputs))))
        except BaseException:
            process.end()
            if process in self._all:
                self._all.remove(process)
            raise

    def _given(self, process: "_Process", inputs: tuple[Any, ...]) -> Message:
        try:
            return process.given.write(inputs)
        except OSError as error:
            raise _CannotRun(f"there is no shared memory left for a batch ({error})") from error

    def _current_program(self) -> tuple[bytes, int]:
        """Return the graph as it is sent, with the state that it reads, and which version of it this is."""
        with self._lock:
            if not self._program or not all(is_in(tensor, state) for tensor, state in self._states):
                held = [*self._module.parameters(), *self._module.buffers()]
                self._states = [(tensor, state_of(tensor)) for tensor in held]
                try:
                    self._program = pickle.dumps(Program.of(self._module))
                except Exception as error:
                    raise _CannotRun(f"it cannot be pickled ({type(error).__name__}: {error})") from error
                if b"__main__" in self._program:
                    raise _CannotRun("it calls functions of the script itself; put them in a module of their own")
                self._version += 1
            return self._program, self._version


def close_processes(recorder: Recorder) -> None:
    """End the processes of the loader with this recorder."""
    for stage in [stage for stage in _live if stage.recorder is recorder]:
        stage.close()


class _CannotRun(Exception):
    """Why a graph is left to threads."""


class _Process:
    """One process, for one thread at a time.

    Attributes:
        version: of the program that it has.
        given: the memory that takes go through.
        made: the memory that results come through.
    """

    def __init__(self) -> None:
        self.version = 0
        files = [tempfile.TemporaryFile(dir=_MEMORY), tempfile.TemporaryFile(dir=_MEMORY)]  # noqa: SIM115 - kept below
        self._files = files
        self.given, self.made = (Memory(file.fileno()) for file in files)
        self._pipe, theirs = Pipe()
        passed = [theirs.fileno(), *[file.fileno() for file in files]]
        # A new interpreter and no fork, which would copy locks that other threads hold; and not the script once more.
        start = "from torchstage._stage_process import main; main({}, {}, {})"
        command = [sys.executable, "-c", start.format(*passed)]
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        environment = {**os.environ, "PYTHONPATH": path}
        self._process = subprocess.Popen(command, pass_fds=passed, env=environment, stdin=subprocess.DEVNULL)
        theirs.close()

    def ask(self, message: bytes) -> Any:
        """Send a message and wait for the answer.

        Raises:
            StageProcessError: the process died.
        """
        try:
            self._pipe.send_bytes(message)
            return pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError) as error:
            code = self._process.wait()
            why = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise StageProcessError(
                f"the process that runs the stage {why}. Its memory may not have sufficed, or somebody ended it; what it "
                'printed says more. stage_executor="thread" runs the stage in this process.'
            ) from error

    def end(self) -> None:
        """End the process, and wait for that."""
        self._pipe.close()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for file in self._files:
            file.close()


def _end_all(processes: list[_Process]) -> None:
    while processes:
        processes.pop().end()


_live: "weakref.WeakSet[ProcessStage]" = weakref.WeakSet()
_PATIENCE = 2.0  # seconds for a process that is at work on a batch
_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
