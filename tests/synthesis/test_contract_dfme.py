"""DFME under the contract of all synthesis methods."""

from __future__ import annotations

from typing import Any

from contract import SynthesizerContract

SMALL: dict[str, Any] = {
    "epochs": 4, "ep_steps": 4, "kd_steps": 2, "g_steps": 1, "batch_size": 12, "nz": 8, "width": 4, "lr": 0.05,
    "lr_g": 0.01, "T": 4.0, "student": "convnet_d1_w8_bn",
}  # fmt: skip
ENGINE: dict[str, Any] = {**SMALL, "student": "lenet5_half_bn", "snapshots": 2}


class TestDFME(SynthesizerContract):
    name = "dfme"
    options = SMALL
    engine_options = ENGINE
    inner = {"student_step": (7, 5, 2), "generator_step": (2, 4, 2)}
    falling = ("kd",)
    longer = {"epochs": 6, "ep_steps": 20, "batch_size": 32}
