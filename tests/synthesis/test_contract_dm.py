"""dm: the tests of every method."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from contract import SynthesizerContract

from .test_contract_random_real import save_npz
from .tiny_real import patterned


class TestDM(SynthesizerContract):
    name = "dm"
    options: ClassVar[dict[str, Any]] = {"arch": "convnet_d2_w8", "iterations": 5, "batch_real": 6}
    engine_options: ClassVar[dict[str, Any]] = {**options, "arch": "convnet_w4"}
    falling = ("matching_loss",)
    longer: ClassVar[dict[str, Any]] = {"iterations": 12, "init": "noise", "lr_img": 10.0, "strategy": "none"}
    of_task: ClassVar[dict[str, Any]] = {"data": patterned()}
    inner: ClassVar[dict[str, tuple[int, ...]]] = {"iteration": (3, 2)}

    @pytest.fixture(autouse=True)
    def data_on_disk(self, tmp_path_factory, monkeypatch):
        monkeypatch.setattr(type(self), "of_config", {"data": save_npz(tmp_path_factory.mktemp("data"))})
