"""How much memory this process may use: the machine's memory, or less where a container says so."""

from __future__ import annotations

from pathlib import Path


def usable_memory() -> int:
    """Bytes that this process may use at most: the smaller of the machine's memory and its control groups' limits.

    It is the same for every run on one machine, so what is decided by it (the order of an epoch) does not depend on
    what else is running.
    """
    import psutil

    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _groups())])


def free_memory() -> int:
    """Bytes that are free for this process now; the page cache counts as free."""
    import psutil

    return max(0, min([int(psutil.virtual_memory().available), *(limit - used for limit, used in _groups())]))


def _groups() -> list[tuple[int, int]]:
    """(limit, bytes in use without page cache) of this process's control group and of all above it (v2 and v1)."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []  # no Linux: no such limits
    found = []
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            roots, names = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            roots, names = (Path("/sys/fs/cgroup/memory"),), ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        for root in roots:
            group = root / place.lstrip("/")
            for folder in (group, *group.parents):
                limit = _number(folder / names[0]) if folder.is_relative_to(root) else None
                if limit is not None:
                    used = _number(folder / names[1]) or 0
                    found.append((limit, max(0, used - _file_pages(folder))))
    return found


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None  # the root group has no such file
    return int(text) if text.isdigit() else None  # "max": no limit


def _file_pages(group: Path) -> int:
    """Bytes of page cache of a group; they make room when memory is asked for."""
    try:
        words = [line.split() for line in (group / "memory.stat").read_text().splitlines()]
    except OSError:
        return 0
    stat = {word[0]: int(word[1]) for word in words if len(word) == 2 and word[1].isdigit()}
    return stat.get("total_cache", stat.get("file", stat.get("cache", 0)))
