"""dsa: the tests of every method."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from contract import SynthesizerContract

from .test_contract_random_real import save_npz
from .tiny_real import patterned


class TestDSA(SynthesizerContract):
    name = "dsa"
    options: ClassVar[dict[str, Any]] = {
        "arch": "convnet_d2_w8",
        "iterations": 3,
        "batch_real": 6,
        "outer": 2,
        "inner": 1,
    }
    engine_options: ClassVar[dict[str, Any]] = {**options, "arch": "convnet_w4"}
    falling = ("matching_loss",)
    longer: ClassVar[dict[str, Any]] = {
        "iterations": 12,
        "outer": 1,
        "lr_img": 1.0,
        "init": "noise",
        "strategy": "flip",
    }
    of_task: ClassVar[dict[str, Any]] = {"data": patterned()}
    inner: ClassVar[dict[str, tuple[int, ...]]] = {"iteration": (2, 2)}

    @pytest.fixture(autouse=True)
    def data_on_disk(self, tmp_path_factory, monkeypatch):
        monkeypatch.setattr(type(self), "of_config", {"data": save_npz(tmp_path_factory.mktemp("data"))})
