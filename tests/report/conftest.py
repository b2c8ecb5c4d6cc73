from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dozens of small banks are made here; that they survive a power cut is tested elsewhere."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
