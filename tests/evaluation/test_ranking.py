"""DD-Ranking's scores and losses against numbers of the original (tests/reference/ddranking_*.npz)."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from synthkit import logits
from synthkit.errors import ConfigError
from synthkit.evaluation import ranking

REFERENCE = Path(__file__).parents[1] / "reference"


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(REFERENCE / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def test_scores():
    case = golden("ddranking_scores")
    assert len(case["hlr"]) == 8
    for i in range(8):
        row = {name: float(values[i]) for name, values in case.items()}
        hlr = ranking.hard_label_recovery(row["full_hard"], row["syn_hard"])
        assert hlr == pytest.approx(row["hlr"], abs=1e-12)
        for kind in ("soft", "hard"):
            ior = ranking.improvement_over_random(row[f"syn_{kind}"], row[f"rand_{kind}"])
            assert ior == pytest.approx(row[f"ior_{kind}"], abs=1e-12)
            assert ranking.label_robust_score(hlr, ior) == pytest.approx(row[f"lrs_{kind}"], abs=1e-9)
        ars = ranking.augmentation_robust_score(row["syn_aug"], row["rand_aug"], row["syn_noaug"], row["rand_noaug"])
        assert ars == pytest.approx(row["ars"], abs=1e-9)


def test_landmarks():
    """a = 0 is 0.269; the ends of the scale are 0 and 1."""
    assert ranking.label_robust_score(0.2, 0.2) == pytest.approx((1 - math.exp(-1)) / (math.e - math.exp(-1)))
    assert round(ranking.label_robust_score(0.0, 0.0), 3) == 0.269
    assert ranking.label_robust_score(0.0, 1.0, weight=1.0) == pytest.approx(1.0)
    assert ranking.label_robust_score(1.0, 0.0, weight=0.0) == pytest.approx(0.0)


def test_percents_are_refused():
    with pytest.raises(ConfigError, match="divide percents"):
        ranking.hard_label_recovery(84.8, 0.5)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("kl_T20", lambda s, t, y: logits.kl_per_sample(s, t, 20.0).mean() / 400),
        ("kl_T4_scaled", lambda s, t, y: logits.kl_per_sample(s, t, 4.0).mean()),
        ("sce_T1.2", lambda s, t, y: logits.soft_ce_per_sample(s, t, 1.2).mean() / 1.44),
        (
            "mse_gt",
            lambda s, t, y: logits.l2_per_sample(s, t).mean() + 0.025 * logits.ce_per_sample(s, y).mean(),
        ),
    ],
)
def test_losses_are_ours_up_to_their_scale(name, loss):
    case = {key: torch.as_tensor(value) for key, value in golden("ddranking_losses").items()}
    student = case["student"].requires_grad_()
    found = loss(student, case["teacher"], case["labels"])
    torch.testing.assert_close(found, case[name], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found, student)[0], case[f"d_{name}"], rtol=1e-9, atol=1e-12)
