"""A simulated accelerator, ``torch.device("sim:0")``, for machines without one. See device.cpp for what it is like.

Its streams are lazy: a copy from the host that is queued with ``non_blocking=True`` on any stream but the default one is made
when that stream, or an event that was recorded on it afterwards, is waited for, and not before.
"""

import contextlib
import functools
import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

DEVICE = "sim:0"
_NAME = "torchstage_simulated"


class Transfer(NamedTuple):
    """A copy between host and device, or a number read.

    Attributes:
        direction: "in" to the device, "out" from it, "item" for a number that Python asked for, "wait" for an operation that
            waits for the values themselves, as `torch.unique` does for the size of its result.
        nbytes: bytes of it.
        thread: a number of the thread, see `this_thread`.
        stream: the stream it was queued on, 0 for the default one.
    """

    direction: str
    nbytes: int
    thread: int
    stream: int


@functools.cache
def build() -> pathlib.Path | str:
    """Compile the device, once for each version of it, of torch and of Python; return the library, or why there is none."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return "the simulated accelerator needs a C++ compiler"
    source = pathlib.Path(__file__).with_name("device.cpp")
    key = hashlib.sha256(f"{source.read_text()} {torch.__version__} {sys.version}".encode()).hexdigest()[:16]
    library = pathlib.Path(tempfile.gettempdir()) / f"torchstage-{os.getuid()}" / f"{_NAME}_{key}.so"
    if not library.exists():
        library.parent.mkdir(mode=0o700, exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")
        # Not by torch.utils.cpp_extension, whose import changes what setuptools does for the rest of the process.
        home = pathlib.Path(torch.__file__).parent
        folders = [home / "include", home / "include/torch/csrc/api/include", sysconfig.get_paths()["include"]]
        command = [
            compiler,
            "-std=c++20",
            "-O0",
            "-shared",
            "-fPIC",
            f"-DTORCH_EXTENSION_NAME={_NAME}",
            *(f"-I{f}" for f in folders),
        ]
        links = [f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
        done = subprocess.run(
            [*command, str(source), "-o", str(made), *links], capture_output=True, text=True, check=False
        )
        if done.returncode:
            return f"the simulated accelerator cannot be compiled here: {done.stderr[-500:]}"
        made.replace(library)  # at once: other test runs may be building it too
    return library


@functools.cache
def load() -> str | None:
    """Register the device in this process, once; say why that is not possible, or None."""
    library = build()
    if isinstance(library, str):
        return library
    specification = importlib.util.spec_from_file_location(_NAME, library)
    assert specification is not None
    assert specification.loader is not None
    extension: Any = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(extension)
    torch.utils.rename_privateuse1_backend("sim")
    extension.register_hooks()
    torch.utils.generate_methods_for_privateuse1_backend()
    torch._register_device_module("sim", _module(extension))
    return None


class Run:
    """The tests on the device, beside the other tests: a run of pytest in a process of its own."""

    def __init__(self) -> None:
        library = build()
        self.missing = library if isinstance(library, str) else ""
        self._printed = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `end`
        command = [sys.executable, "-m", "pytest", "--simulated", "-q", "-p", "no:cacheprovider"]
        root = pathlib.Path(__file__).parents[2]
        self._process = None
        if not self.missing:
            self._process = subprocess.Popen(command, cwd=root, stdout=self._printed, stderr=subprocess.STDOUT)

    def wait(self, seconds: float) -> tuple[int, str]:
        """Return the exit code and what was printed."""
        assert self._process is not None
        code = self._process.wait(seconds)
        self._printed.seek(0)
        return code, self._printed.read()

    def end(self) -> None:
        """End it, if it runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._printed.close()


def transfers() -> list[Transfer]:
    """Return what was transferred since the last call."""
    return [Transfer(*each) for each in _extension().transfers()]


def this_thread() -> int:
    """Return the number of the calling thread."""
    return int(_extension().this_thread())


def lent() -> int:
    """Return how often `Tensor.record_stream` was called."""
    return int(_extension().lent())


def races() -> list[str]:
    """Return what was done since the last call to memory of another stream without waiting for that one."""
    return list(_extension().races())


def _extension() -> Any:
    return sys.modules["torch.sim"]._extension


def _module(extension: Any) -> Any:
    """Return the device's module, with the names that ``torch.cuda`` has."""
    module: Any = types.ModuleType("torch.sim")
    module._extension = extension
    generator, default = torch.Generator(), torch.Stream(stream_id=0, device_index=0, device_type=_device_type())
    lock = threading.Lock()

    def current_stream(device: Any = None) -> torch.Stream:
        return torch.accelerator.current_stream(torch.device(DEVICE))

    @contextlib.contextmanager
    def stream(entered: torch.Stream) -> Iterator[None]:
        before = current_stream()
        torch.accelerator.set_stream(entered)
        try:
            yield
        finally:
            torch.accelerator.set_stream(before)

    def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
        with lock:
            generator.set_state(state)

    module.Stream = lambda device=None, priority=0: torch.Stream(DEVICE, priority=priority)
    module.Event = lambda **options: torch.Event(DEVICE, **options)
    module.current_stream = current_stream
    module.default_stream = lambda device=None: default
    module.stream = stream
    module.set_rng_state = set_rng_state
    module.get_rng_state = lambda device=None: generator.get_state()
    module.synchronize = lambda device=None: torch.accelerator.synchronize(DEVICE)
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = generator.manual_seed
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    return module


def _device_type() -> int:
    return 20  # PrivateUse1 among c10's device types
