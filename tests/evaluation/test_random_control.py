"""Sanity of the evaluator: random real MNIST images, one per class, against what the literature reports."""

from __future__ import annotations

from pathlib import Path

import pytest

import synthkit
from synthkit.evaluation.bank_protocol import evaluate_bank

MNIST = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.mark.slow
def test_one_random_digit_per_class(tmp_path):
    """Published 64.9 +- 3.5 at width 128 (DC, Table 1), and about 63 at width 32 (method card `matching` 7)."""
    bank = synthkit.synthesize(
        "random_real", data=f"mnist:{MNIST}", ipc=1, out=str(tmp_path / "b"), device="cpu", seed=1
    )
    result = evaluate_bank(bank, f"mnist:{MNIST}", protocol="dc", arch="convnet_w32", nets=3)
    found = result["results"]["convnet_w32"]
    assert found["epochs_run"] == 1001 and found["dc_ops"] == ["crop", "scale", "rotate"]
    assert 0.55 < found["control"]["mean"] < 0.72
    assert 0.50 < found["bank"]["mean"] < 0.75  # one draw of ten images, so it varies more
