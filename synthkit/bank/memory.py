"""How much memory this process may use: the machine's free memory, or less where a container says so."""

from __future__ import annotations

from pathlib import Path


def usable_memory() -> int:
    """Bytes that this process may use: the smallest of the free memory and the limits of its control groups."""
    import psutil

    return max(0, min([int(psutil.virtual_memory().available), *_group_limits()]))


def _group_limits() -> list[int]:
    """Memory limits (Linux control groups, v2 and v1) of this process's group and of all groups above it."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []  # no Linux: no such limits
    limits = []
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            roots, name = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")), "memory.max"
        elif "memory" in controllers.split(","):
            roots, name = (Path("/sys/fs/cgroup/memory"),), "memory.limit_in_bytes"
        else:
            continue
        for root in roots:
            group = root / place.lstrip("/")
            limits += [_number(folder / name) for folder in (group, *group.parents) if folder.is_relative_to(root)]
    return [limit for limit in limits if limit is not None]


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None  # the root group has no such file
    return int(text) if text.isdigit() else None  # "max": no limit
