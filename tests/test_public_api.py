"""What torchstage offers: the names, their documentation, and what importing it brings along."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import torchstage

PUBLIC = [
    "AUTOTUNE",
    "AutotuneAlgorithm",
    "Explanation",
    "Plan",
    "SmartStageOptions",
    "Staged",
    "StagedDataLoader",
    "StagedModel",
    "Stats",
    "add_stage_stream",
    "add_stage_thread_pool",
    "autotune",
    "close_stage_thread_pools",
    "errors",
    "explain",
    "make_prefetch_hook",
    "mark_target_node",
    "ops",
    "smart_stage",
    "staged",
    "unwrap",
]


def python(code: str) -> list[str]:
    """Run ``code`` in a fresh interpreter and return the lines it prints."""
    root = Path(__file__).parents[1]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_public_names_are_these() -> None:
    assert sorted(torchstage.__all__) == PUBLIC
    assert all(hasattr(torchstage, name) for name in PUBLIC)


def test_there_is_a_version() -> None:
    assert torchstage.__version__[0].isdigit()


def documented_things() -> list[tuple[str, Any]]:
    """Public objects, with the public members that their own classes and modules define."""
    found = []
    for name in PUBLIC:
        value = getattr(torchstage, name)
        found.append((name, value))
        if inspect.ismodule(value):
            own = [(k, v) for k, v in vars(value).items() if getattr(v, "__module__", "") == value.__name__]
            found += [(f"{name}.{k}", v) for k, v in own if not k.startswith("_") and callable(v)]
    for name, value in list(found):
        if inspect.isclass(value):
            members = [(k, v) for k, v in vars(value).items() if not k.startswith("_")]
            found += [(f"{name}.{k}", v) for k, v in members if isinstance(v, (property, classmethod)) or callable(v)]
    return found


@pytest.mark.parametrize(("name", "value"), documented_things(), ids=lambda v: v if isinstance(v, str) else "")
def test_a_public_object_says_what_it_is(name: str, value: Any) -> None:
    text = value.__func__.__doc__ if isinstance(value, classmethod) else value.__doc__
    assert text, f"{name} has no docstring"
    assert not text.startswith(f"{name.rpartition('.')[2]}("), f"{name} has only the docstring that Python makes"


def test_the_documented_things_include_methods_and_members_of_modules() -> None:
    names = {name for name, _ in documented_things()}
    assert {"Plan.why_empty", "errors.OptionError", "StagedDataLoader.close", "SmartStageOptions.of"} <= names
    assert any(name.startswith("ops.") for name in names)


def test_importing_it_imports_nothing_but_the_standard_library_torch_and_numpy() -> None:
    new = python(
        "import sys, torch, numpy.random\n"
        "before = {name.partition('.')[0] for name in sys.modules}\n"
        "import torchstage\n"
        "after = {name.partition('.')[0] for name in sys.modules}\n"
        "print(*sorted(after - before - set(sys.stdlib_module_names)), sep='\\n')\n"
    )
    # Python's own table of its build has a name that no list has.
    assert [name for name in new if not name.startswith("_sysconfigdata")] == ["torchstage"]


def test_importing_it_starts_no_thread_and_leaves_torch_as_it_was() -> None:
    changed = python(
        "import threading, warnings, torch, numpy\n"
        "def look():\n"
        "    return {'python threads': threading.enumerate(), 'intra-op threads': torch.get_num_threads(),\n"
        "            'dtype': torch.get_default_dtype(), 'random': torch.initial_seed(), 'filters': warnings.filters[:],\n"
        "            'module call': torch.nn.Module.__call__, 'setattr': torch.nn.Module.__setattr__}\n"
        "before = look()\n"
        "import torchstage\n"
        "after = look()\n"
        "print(*[key for key in before if before[key] != after[key]], sep='\\n')\n"
    )
    assert changed in ([], [""])
