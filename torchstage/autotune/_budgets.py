"""How many processors and how much memory this process may use (section 10.7).

A control group may allow less than the machine has. It is looked up in both versions of the kernel's interface, and with
its ancestors, since the tightest of their limits holds; inside a container the group's own path is often not visible
and its limits are at the top.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

RAM_BUDGET_SHARE = 0.5
SMALL_MACHINE_BYTES = 4 * 2**30
"""Taken for the free memory where the system does not tell."""


def default_cpu_budget() -> int:
    """Return how many processors this process may use, at least 1: by its affinity and by its group's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(count, processor_quota())))


def default_ram_budget(share: float = RAM_BUDGET_SHARE) -> int:
    """Return ``share`` of the bytes that are free now.

    Raises:
        ValueError: ``share`` is negative.
    """
    if not share >= 0:
        raise ValueError(f"share must be >= 0: a part of the free memory. Found: {share!r}.")
    return int(share * free_memory())


def free_memory(system: Path = Path("/")) -> int:
    """Return the bytes that this process can still take, on the machine and within its control group.

    Args:
        system: where ``proc`` and ``sys`` are.
    """
    return int(min([_free_on_machine(system), *_free_in_groups(system)]))


def processor_quota(system: Path = Path("/")) -> float:
    """Return how many processors the control group may keep busy; infinity without a limit."""
    quotas = [_number(place, "cpu.max", 0) / _number(place, "cpu.max", 1) for place in _groups(system, "")]
    for place in _groups(system, "cpu"):
        quota = _number(place, "cpu.cfs_quota_us")
        quotas.append(quota / _number(place, "cpu.cfs_period_us") if quota > 0 else math.inf)
    return min((quota for quota in quotas if quota > 0), default=math.inf)


def _free_on_machine(system: Path) -> float:
    for line in _text(system / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    except (AttributeError, ValueError, OSError):
        return SMALL_MACHINE_BYTES


def _free_in_groups(system: Path) -> Iterator[float]:
    for place in _groups(system, ""):
        yield _free(place, "memory.max", "memory.current", "inactive_file")
    for place in _groups(system, "memory"):
        yield _free(place, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _free(place: Path, limit: str, used: str, reclaimable: str) -> float:
    """Return what is left of a group's limit; pages of files that nobody uses any more count as free."""
    most, now = _number(place, limit), _number(place, used)
    if math.isinf(most) or math.isinf(now):
        return math.inf
    counts = dict(line.split(maxsplit=1) for line in _text(place / "memory.stat").splitlines())
    return max(most - max(now - int(counts.get(reclaimable, 0)), 0), 0)


def _groups(system: Path, controller: str) -> Iterator[Path]:
    """Return the directories of this process's control group and its ancestors.

    Args:
        system: where ``proc`` and ``sys`` are.
        controller: of the first version; "" for the second, which has one tree for all.
    """
    mounted = system / "sys/fs/cgroup" / controller
    for line in _text(system / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            group = PurePosixPath(path.lstrip("/"))
            yield from (mounted / ancestor for ancestor in (group, *group.parents))


def _number(place: Path, name: str, word: int = 0) -> float:
    """Return a word of a file as a number; infinity for "max", and without the file."""
    words = _text(place / name).split()
    try:
        return int(words[word])
    except (IndexError, ValueError):
        return math.inf


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
