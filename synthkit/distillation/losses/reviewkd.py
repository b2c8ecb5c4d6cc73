"""ReviewKD: every stage of the teacher is learnt from the student's stages from there on, fused from the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from synthkit.distillation.contract import Batch, Loss, LossNeeds, Setup, Shapes, Taps
from synthkit.distillation.losses.common import reduce
from synthkit.distillation.losses.maps import mean_per_sample, widen
from synthkit.errors import ConfigError
from synthkit.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor, nn

POOLED = (4, 2, 1)  # side lengths at which maps are compared beside their own


def hcl_loss(student: Tensor, teacher: Tensor, *, reduction: Literal["none", "mean"] = "mean") -> Tensor:
    """Hierarchical context loss: the mean squared error at full size and average-pooled to 4, 2 and 1.

    `l_i = (sum_j w_j mse(pool_j(s_i), pool_j(t_i))) / sum_j w_j`; w is 1 at full size and halves with every pooled
    size that is used, which are those below the map's side.

    Shapes: `student`, `teacher` (B, C, h, w); returns (B,) for "none", a scalar for "mean".

    Source: Chen et al. 2021 (arXiv 2104.09044); megvii-research/mdistiller@a08d46f mdistiller/distillers/ReviewKD.py,
    whose numbers the tests check.
    Differs from source: per-sample values on request; the shorter side decides for maps of unequal sides.
    Cost: O(B C h w) time and memory.

    >>> import torch
    >>> float(hcl_loss(torch.ones(1, 2, 8, 8), torch.zeros(1, 2, 8, 8)))
    1.0
    """
    s, t = widen(student), widen(teacher)
    total, weight, weights = mean_per_sample((s - t).square()), 1.0, 1.0
    for size in POOLED:
        if size < min(s.shape[2:]):
            weight /= 2
            error = F.adaptive_avg_pool2d(s, size) - F.adaptive_avg_pool2d(t, size)
            total, weights = total + weight * mean_per_sample(error.square()), weights + weight
    return reduce(total / weights, reduction)


def fusion(student: int, middle: int, teacher: int, *, attends: bool) -> nn.ModuleDict:
    """One attention-based fusion: 1x1 to `middle` channels, the two attention maps, 3x3 to the teacher's channels."""
    n = torch.nn
    inner = n.Conv2d(student, middle, 1, bias=False)
    outer = n.Conv2d(middle, teacher, 3, padding=1, bias=False)
    for conv in (inner, outer):
        n.init.kaiming_uniform_(conv.weight, a=1)
    level = {
        "reduce": n.Sequential(inner, n.BatchNorm2d(middle)),
        "out": n.Sequential(outer, n.BatchNorm2d(teacher)),
    }
    if attends:
        level["attend"] = n.Sequential(n.Conv2d(2 * middle, 2, 1), n.Sigmoid())
    return n.ModuleDict(level)


def fuse(level: nn.ModuleDict, feature: Tensor, deeper: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
    """A student map (B, C, h, w) joined with what came from `deeper` (B, M, ., .): the map to compare with the
    teacher's (B, C_t, *size), and what is handed on (B, M, *size), which is taken before the 3x3 convolution."""
    x = level["reduce"](feature)
    if deeper is not None:
        y = F.interpolate(deeper, x.shape[2:], mode="nearest")
        weights = level["attend"](torch.cat([x, y], dim=1))
        x = x * weights[:, :1] + y * weights[:, 1:]
    if x.shape[2:] != size:
        x = F.interpolate(x, size, mode="nearest")
    return level["out"](x), x


class ReviewKD(Loss):
    """`hcl_loss` over the fused student maps and the teacher's maps before their ReLU, the pooled features included.

    `l = sum_k hcl(out(z_k), t_k)` from the pooled features (k = 1) back to the first stage; `x_k = conv1x1(s_k)`,
    `z_k = a_0 x_k + a_1 up(z_(k-1))`, `a = sigmoid(conv1x1([x_k, up(z_(k-1))]))`, `z_1 = x_1`.

    Shapes: maps of any sizes; pooled features count as 1x1 maps; one value per sample (B,).

    Source: as `hcl_loss`. Published with a cross-entropy of weight 1 and a warm-up over 20 epochs:
    `--loss "ce+reviewkd@ramp20"`.
    Differs from source: sizes and channels come from the networks instead of a file. `middle` is the file's
    MAX_MID_CHANNEL, which the code ignores (512, the default here). Where the numbers of stages differ they are
    paired from the end, which is what the code does (its stem falls out that way). STU_PREACT is not offered.
    Cost: per stage two convolutions with BatchNorm and an upsampling at the stage's size.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of ReviewKD."""

        middle: int = 512
        """Most channels of the fused maps; the width of the student's pooled features where that is less."""

        def __post_init__(self):
            if self.middle < 1:
                raise ConfigError("loss.middle must be at least 1", got=self.middle, hint="512 is usual")

    requires = LossNeeds(student=("pooled", "maps"), teacher=("pooled", "preact"))
    beta = 1.0

    def setup(self, setup: Setup) -> None:
        from synthkit.models.init import seeded

        student, teacher = _channels(setup.student, "maps"), _channels(setup.teacher, "preact")
        middle = min(self.config.middle, student[0])
        with seeded(setup.seed):
            self.aux = torch.nn.ModuleList(
                fusion(s, middle, t, attends=level > 0)
                for level, (s, t) in enumerate(zip(student, teacher, strict=False))
            )

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        assert self.aux is not None and student.maps and teacher.preact  # set up, and required above
        assert student.pooled is not None and teacher.pooled is not None
        features = [student.pooled[:, :, None, None], *reversed(student.maps)]
        targets = [teacher.pooled[:, :, None, None], *reversed(teacher.preact)]
        stages, deeper = [], None
        for level, feature, target in zip(self.aux.children(), features, targets, strict=False):
            out, deeper = fuse(level, feature, deeper, target.shape[2:])  # type: ignore[arg-type]  # a ModuleDict
            stages.append(hcl_loss(out, target, reduction="none"))
        return {"reviewkd": torch.stack(stages).sum(dim=0)}


def _channels(shapes: Shapes, maps: Literal["maps", "preact"]) -> list[int]:
    """Widths from the pooled features back to the first stage."""
    return [shapes.pooled, *(shape[0] for shape in reversed(getattr(shapes, maps)))]
