"""Limits of control groups are found, in both versions, on a made-up tree."""

from __future__ import annotations

from pathlib import Path

import pytest

from synthkit.bank.reading import memory


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """`tree(cgroup text, {file: text})`: /proc/self/cgroup and /sys/fs/cgroup below a temporary folder."""

    class Moved(type(tmp_path)):
        def __new__(cls, *parts, **options):
            first = str(parts[0]) if parts else ""
            if first.startswith(("/proc/self/cgroup", "/sys/fs/cgroup")):
                parts = (str(tmp_path) + first, *parts[1:])
            return Path(*parts, **options)

    def make(text, files):
        for name, content in {"/proc/self/cgroup": text, **files}.items():
            path = tmp_path / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        monkeypatch.setattr(memory, "Path", Moved)

    return make


def test_version_2(tree):
    tree("0::/a/b\n", {
        "/sys/fs/cgroup/a/b/memory.max": "max\n", "/sys/fs/cgroup/a/memory.max": "3000000\n",
        "/sys/fs/cgroup/a/memory.current": "2000000\n", "/sys/fs/cgroup/a/memory.stat": "anon 500000\nfile 1500000\n",
    })  # fmt: skip
    assert memory.usable_memory() == 3_000_000 and memory.free_memory() == 2_500_000


def test_version_1(tree):
    tree("9:name=systemd:/\n4:cpu,memory:/x\n0::/\n", {
        "/sys/fs/cgroup/memory/x/memory.limit_in_bytes": "4000000",
        "/sys/fs/cgroup/memory/x/memory.usage_in_bytes": "1000",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
    })  # fmt: skip
    assert memory.usable_memory() == 4_000_000 and memory.free_memory() == 3_999_000


def test_without_groups(tree):
    tree("", {})
    assert 1 << 20 < memory.free_memory() <= memory.usable_memory() < 1 << 50
