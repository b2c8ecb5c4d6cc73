"""mtt: the tests of every method."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from contract import SynthesizerContract

from .test_contract_random_real import save_npz
from .tiny_real import patterned


class TestMTT(SynthesizerContract):
    name = "mtt"
    options: ClassVar[dict[str, Any]] = {
        "arch": "convnet_d2_w4",
        "iterations": 3,
        "syn_steps": 2,
        "expert_epochs": 1,
        "max_start_epoch": 2,
        "expert_count": 2,
        "expert_batch": 64,
        "lr_img": 100.0,
        "expert_lr": 0.1,
    }
    engine_options: ClassVar[dict[str, Any]] = {**options, "arch": "convnet_w4"}
    of_task: ClassVar[dict[str, Any]] = {"data": patterned()}
    inner: ClassVar[dict[str, tuple[int, ...]]] = {"iteration": (2, 2)}

    @pytest.fixture(autouse=True)
    def folders(self, tmp_path_factory, monkeypatch):
        monkeypatch.setenv("SYNTHKIT_HOME", str(tmp_path_factory.mktemp("home")))
        monkeypatch.setattr(type(self), "of_config", {"data": save_npz(tmp_path_factory.mktemp("data"))})
