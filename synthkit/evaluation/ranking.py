"""The scores of DD-Ranking: what the images contribute, apart from soft labels and augmentation.

Source: NUS-HPC-AI-Lab/DD-Ranking@b8b0966 ddranking/metrics (method card `matching` 4).
Differs from source: accuracies are shares in [0, 1], for which the formulas are meant; that code feeds them percents.
"""

from __future__ import annotations

import math

from synthkit.errors import ConfigError


def hard_label_recovery(full_hard: float, distilled_hard: float) -> float:
    """HLR = accuracy of the full data - accuracy of the distilled set, both with hard labels. Lower is better."""
    return _share(full_hard) - _share(distilled_hard)


def improvement_over_random(distilled: float, random: float) -> float:
    """IOR = accuracy of the distilled set - accuracy of a random subset of its size, both under its own protocol."""
    return _share(distilled) - _share(random)


def label_robust_score(hlr: float, ior: float, weight: float = 0.5) -> float:
    """LRS = (e^a - e^-1) / (e - e^-1) with a = w IOR - (1 - w) HLR; in [0, 1] for w = 1/2."""
    return _normalised(weight * ior - (1 - weight) * hlr)


def augmentation_robust_score(
    distilled_augmented: float,
    random_augmented: float,
    distilled_plain: float,
    random_plain: float,
    weight: float = 0.5,
) -> float:
    """ARS = (e^b - e^-1) / (e - e^-1), b = g (distilled - random, augmented) + (1 - g) (the same, not augmented)."""
    augmented = _share(distilled_augmented) - _share(random_augmented)
    plain = _share(distilled_plain) - _share(random_plain)
    return _normalised(weight * augmented + (1 - weight) * plain)


def _normalised(value: float) -> float:
    return (math.exp(value) - math.exp(-1)) / (math.e - math.exp(-1))


def _share(accuracy: float) -> float:
    if not 0 <= accuracy <= 1:
        raise ConfigError("ranking: an accuracy is a share from 0 to 1", got=accuracy, hint="divide percents by 100")
    return accuracy
