"""Decoupled knowledge distillation: the target class and the others, weighed apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from synthkit.distillation.contract import Batch, Loss, LossNeeds, Taps
from synthkit.distillation.losses.common import check_temperature, reduce
from synthkit.errors import ConfigError
from synthkit.lazy import torch
from synthkit.logits import kl_per_sample

if TYPE_CHECKING:
    from torch import Tensor


def others(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, K - 1): every row without its label's logit, in order."""
    columns = torch.arange(logits.shape[1] - 1, device=logits.device).expand(len(logits), -1)
    return logits.gather(1, columns + (columns >= labels[:, None]))


def dkd_parts(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 4.0) -> tuple[Tensor, Tensor]:
    """(TCKD, NCKD) of every sample, (B,) each, with the factor T^2; see `dkd_loss`."""
    pairs, rests = [], []
    for logits in (student, teacher):
        rest = others(logits, labels)
        # softmax of this pair is (p_y, 1 - p_y), and no logarithm of a sum of probabilities is taken
        target = logits.gather(1, labels[:, None]).squeeze(1) / temperature
        pairs.append(torch.stack([target, (rest / temperature).logsumexp(dim=1)], dim=1))
        rests.append(rest)
    return kl_per_sample(*pairs) * temperature**2, kl_per_sample(*rests, T=temperature)


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    reduction: Literal["none", "mean"] = "mean",
):
    """Target-class and non-target-class distillation, weighed by alpha and beta.

    `l_i = alpha TCKD_i + beta NCKD_i`; `TCKD = T^2 KL((p_y, 1 - p_y) || (q_y, 1 - q_y))`, `NCKD = T^2 KL(p' || q')`
    with p, q the softened probabilities of teacher and student, y the label, p', q' softmaxes over the classes but y.
    At T = 1, `KL(p || q) = TCKD + (1 - p_y) NCKD`: KD weighs the dark knowledge by the teacher's doubt, DKD does not.

    Shapes: `student`, `teacher` (B, K) logits, any range, K > 1; `labels` (B,) int64; (B,) or a scalar comes back.

    Source: Zhao et al. 2022 (arXiv 2203.08679), megvii-research/mdistiller@a08d46f (`dkd_loss`), whose numbers the
    tests check. CIFAR-100: `ce+dkd@ramp20`, T = 4, alpha 1, beta 8 (2 to 8 by pair); ImageNet T = 1, beta 0.5 or 2.
    Differs from source: the label's logit is taken out instead of lowered by 1000, and `log(1 - p_y)` is a logsumexp
    (the released log of a sum is -inf in half precision); the same numbers. The cross-entropy and the warm-up are
    terms of the sum; mdistiller counts epochs from 1 in the warm-up, `@ramp20` from 0.
    Cost: O(B K) time and memory.

    >>> import torch
    >>> x = torch.tensor([[1.0, 2.0, 4.0]])
    >>> float(dkd_loss(x, x + 1, torch.tensor([2])))
    0.0
    """
    tckd, nckd = dkd_parts(student, teacher, labels, temperature)
    return reduce(alpha * tckd + beta * nckd, reduction)


class DKD(Loss):
    """`dkd_loss` as a loss of the table (`--loss "ce+dkd@ramp20" --loss.dkd.beta 8`).

    On a bank the label is the teacher's argmax or the bank's own; off the real data the non-target part carries noise,
    so there a beta of at most 2 is advised.
    """

    requires = LossNeeds(labels=True)

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of DKD."""

        alpha: float = 1.0
        """Weight of the target-class part (TCKD)."""
        beta: float = 8.0
        """Weight of the non-target-class part (NCKD)."""
        temperature: float = 4.0
        """Softening temperature T of both networks."""

        def __post_init__(self):
            check_temperature(self.temperature)
            for name in ("alpha", "beta"):
                if not getattr(self, name) >= 0:
                    raise ConfigError(f"loss.{name} must not be negative", got=getattr(self, name))

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        assert batch.labels is not None  # `requires`
        tckd, nckd = dkd_parts(student.logits, teacher.logits, batch.labels, self.config.temperature)
        return {"dkd_tckd": self.config.alpha * tckd, "dkd_nckd": self.config.beta * nckd}
