"""Whole short runs under a loss, and one that is killed and resumed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

from synthkit import tables
from synthkit.config.schema import DistillConfig, RuntimeConfig
from synthkit.distillation import trainer
from synthkit.distillation.distill import distill


@pytest.fixture
def config(workshop, tmp_path) -> Callable[..., DistillConfig]:
    """A short run under the loss `expression`, with the options of its terms."""

    def make(expression: str, options: dict | None = None, **changes) -> DistillConfig:
        kind = tables.lookup("loss", expression)
        parts = {name: tables.lookup("loss", name).Config(**values) for name, values in (options or {}).items()}
        loss = kind.Config(**parts) if "+" in expression else parts.get(expression, kind.Config())
        values = {
            "bank": str(workshop.bank), "student": "lenet5_half_bn", "epochs": 6, "batch_size": 32,
            "optimizer": "adamw", "lr": 4e-3, "augment": "none", "loss_name": expression, "loss": loss,
            "out": str(tmp_path / "run"), "runtime": RuntimeConfig(device="cpu"),
        }  # fmt: skip
        return DistillConfig(**{**values, **changes})

    return make


@pytest.fixture
def killed_equals_whole(tmp_path, monkeypatch) -> Callable[..., None]:
    """Assert that a run that dies in step `at` (the ninth is in the second epoch) and is resumed gives the student of
    an uninterrupted one."""

    def check(make: Callable[..., DistillConfig], at: int = 9) -> None:
        whole = distill(make(out=str(tmp_path / "whole")))
        step, calls = trainer.Trainer._train_step, []

        def dies(self):
            calls.append(1)
            if len(calls) == at:
                raise KeyboardInterrupt
            return step(self)

        with monkeypatch.context() as patch:
            patch.setattr(trainer, "SAVE_SECONDS", 0.0)
            patch.setattr(trainer.Trainer, "_train_step", dies)
            with pytest.raises(KeyboardInterrupt):
                distill(make(out=str(tmp_path / "killed")))
        resumed = distill(make(out=str(tmp_path / "killed"), resume=True))
        first, second = (load_file(str(result.path / "student.safetensors")) for result in (whole, resumed))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)

    return check
