"""The other process of ``stage_executor="process"``: it is sent a stage graph, and then batches to run it on.

Started by `torchstage.loaders._process` with three open files: a pipe for messages, and two
pieces of memory that both processes see, for the tensors that a stage takes and for those that it makes. It knows nothing of
the training script, and ends when the pipe does.
"""

import importlib
import mmap
import os
import pickle
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
import torch.fx

from torchstage._mode import Ambient
from torchstage._threads import set_intra_op_threads
from torchstage.loaders._packing import Packing, Slice, pack


class Program(NamedTuple):
    """A stage graph as it is sent: nothing is traced again.

    Attributes:
        source: the code of its function.
        names: the global names of that code; modules are sent by their names.
        objects: what it finds on ``self``.
    """

    source: str
    names: dict[str, Any]
    objects: dict[str, Any]

    @classmethod
    def of(cls, module: torch.fx.GraphModule) -> "Program":
        """Return the program of a graph."""
        code = module.graph.python_code("self")
        names = {name: _Module(o.__name__) if isinstance(o, type(sys)) else o for name, o in code.globals.items()}
        return cls(code.src, names, {name: getattr(module, name) for name in _targets(module)})

    def load(self) -> Any:
        """Return a function of the graph's inputs."""
        names: dict[str, Any] = {
            n: importlib.import_module(o.name) if isinstance(o, _Module) else o for n, o in self.names.items()
        }
        exec(compile(self.source, "<stage of torchstage>", "exec"), names)
        holder = torch.nn.Module()
        for name, value in self.objects.items():
            setattr(holder, name, value)
        forward: Any = names["forward"]
        return lambda *inputs: forward(holder, *inputs)


class _Module(NamedTuple):
    name: str


def _targets(module: torch.fx.GraphModule) -> list[str]:
    return list(dict.fromkeys(str(n.target) for n in module.graph.nodes if n.op in ("get_attr", "call_module")))


class Message(NamedTuple):
    """Values, whose dense tensors lie in the shared memory.

    Attributes:
        values: the values, with something that stands for each tensor there.
        slices: where these are.
        nbytes: bytes of the shared memory that are used.
    """

    values: Any
    slices: tuple[Slice, ...]
    nbytes: int


class Memory:
    """Memory that two processes see.

    Args:
        file: an open file, which is all of it and grows.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self._map: mmap.mmap | None = None
        self._tensor = torch.empty(0, dtype=torch.uint8)

    def write(self, values: Any) -> Message:
        """Put values there; what is there already is overwritten."""
        tensors: list[torch.Tensor] = []

        def place(value: Any) -> Any:
            if type(value) is not torch.Tensor or value.layout is not torch.strided or value.is_quantized:
                return value
            tensors.append(value.resolve_conj().resolve_neg())
            return _Packed(len(tensors) - 1)

        placed = torch.fx.node.map_aggregate(values, place)
        packing = pack(tensors)
        packing.write(self._of_size(packing.nbytes))
        return Message(placed, packing.slices, packing.nbytes)

    def read(self, message: Message, copy: bool) -> Any:
        """Return the values of a message: as copies, or as views of the memory that the next message overwrites."""
        memory = self._of_size(message.nbytes)[: message.nbytes]
        # A copy begins at the start of a storage of its own, which is where the slices count from.
        tensors = Packing((), message.slices, message.nbytes).read(memory.clone() if copy else memory)
        return torch.fx.node.map_aggregate(
            message.values, lambda value: tensors[value.number] if isinstance(value, _Packed) else value
        )

    def _of_size(self, nbytes: int) -> torch.Tensor:
        if nbytes > len(self._tensor):
            size = max(os.fstat(self._file).st_size, 1 << max(nbytes - 1, 4095).bit_length())
            os.ftruncate(self._file, size)
            if hasattr(os, "posix_fallocate"):  # an error where there is no room, instead of a signal at a write
                os.posix_fallocate(self._file, 0, size)
            self._map = mmap.mmap(self._file, size)
            self._tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        return self._tensor


class _Packed:
    """Stands for a tensor in the shared memory. No tuple, which would be looked into."""

    def __init__(self, number: int) -> None:
        self.number = number


def main(pipe: int, given: int, made: int) -> None:
    """Answer messages until the pipe ends.

    Each is a `Program`, answered with the settings of this process that a batch cannot change, or ``(Ambient, Message)``,
    answered with a `Message`. An exception is an answer too.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the training process, which ends the pipe
    connection, taken, results = Connection(pipe), Memory(given), Memory(made)
    stage: Any = None
    while True:
        try:
            message = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            answer: Any
            if isinstance(message, Program):
                stage, answer = message.load(), Ambient.now().kernels
            else:
                ambient, values = message
                set_intra_op_threads(ambient.threads)
                torch.set_default_dtype(ambient.dtype)
                with ambient.entered():
                    answer = results.write(stage(*taken.read(values, copy=False)))
        except Exception as error:  # noqa: BLE001 - it is raised where the batch is staged
            answer = error
        connection.send_bytes(_pickled(answer))
        del message, answer


def _pickled(answer: Any) -> bytes:
    try:
        data = pickle.dumps(answer)
        pickle.loads(data)
    except Exception:  # noqa: BLE001 - an exception with arguments of its own
        data = pickle.dumps(RuntimeError(f"{type(answer).__name__}: {answer}"))
    return data
