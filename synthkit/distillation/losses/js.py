"""Jensen-Shannon divergence between the softened outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from synthkit.distillation.contract import Batch, Loss, Taps
from synthkit.distillation.losses.common import check_temperature, reduce
from synthkit.logits import js_per_sample

if TYPE_CHECKING:
    from torch import Tensor


def js_loss(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, reduction: Literal["none", "mean"] = "mean"):
    """Jensen-Shannon divergence: symmetric and bounded.

    `l_i = T^2 * (KL(p_i || m_i) + KL(q_i || m_i)) / 2`, `m = (p + q) / 2`, `p = softmax(t / T)`, `q = softmax(s / T)`;
    between 0 and `T^2 ln 2`.

    Shapes: `student`, `teacher` (B, K) logits, any range; returns (B,) for "none", a scalar for "mean".

    Source: Lin 1991, "Divergence measures based on the Shannon entropy"; as a student loss in PaddleClas' SSLD.
    Differs from source: probabilities are not clamped (DeepInversion clamps them to [0.01, 0.99] for its image loss);
    the mixture is formed in log space; the factor T^2 as in KD.
    Cost: O(B K) time and memory.

    >>> import torch
    >>> float(js_loss(torch.zeros(2, 3), torch.zeros(2, 3)).abs() < 1e-6)
    1.0
    """
    return reduce(js_per_sample(student, teacher, temperature), reduction)


class JS(Loss):
    """`js_loss` as a loss of the table (`--loss js --loss.temperature 1`)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of JS."""

        temperature: float = 1.0
        """Softening temperature T of both networks."""

        def __post_init__(self):
            check_temperature(self.temperature)

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        return {"js": js_loss(student.logits, teacher.logits, temperature=self.config.temperature, reduction="none")}
