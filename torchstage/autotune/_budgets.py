"""How many processors and how much memory a process may use (section 10.7)."""

import math
import os
from pathlib import Path

RAM_BUDGET_SHARE = 0.5


def default_cpu_budget() -> int:
    """Return how many processors this process may use: by its affinity, and by the quota of its control group."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def default_ram_budget(share: float = RAM_BUDGET_SHARE) -> int:
    """Return ``share`` of the bytes that are free now, for the machine and for the process's control group."""
    return int(share * free_memory())


def free_memory() -> int:
    """Return the bytes of memory that are free now, for the machine and for the process's control group."""
    group = _free_in_group()
    machine = _free_in_machine()
    return machine if group is None else min(machine, group)


def _free_in_machine() -> int:
    for line in (_read("/proc/meminfo") or "").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        return 2**32  # a system that does not say: as a small machine has


def _free_in_group() -> int | None:
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        most, now = (_read(f"/sys/fs/cgroup/{name}") for name in (limit, used))
        if most and now and most.strip().isdigit():
            return max(int(most) - int(now), 0)
    return None


def _quota() -> float | None:
    """Return the processors that the control group may keep busy; None without a limit."""
    text = _read("/sys/fs/cgroup/cpu.max")
    if text:
        quota, _, period = text.strip().partition(" ")
    else:
        quota, period = (_read(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us") or "" for name in ("quota", "period"))
    try:
        return int(quota) / int(period) if int(quota) > 0 else None
    except (ValueError, ZeroDivisionError):
        return None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
