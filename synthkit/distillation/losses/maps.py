"""What the losses on stage maps share: pairing, pooling to one size, the attention vector, the regressor of hints.

Shapes: a map is (B, C, h, w); everything keeps the dtype, but for half precisions, which `widen` turns into float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from synthkit.errors import ConfigError
from synthkit.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor, nn

MapShape = tuple[int, int, int]
"""(C, h, w) of one map."""


def widen(values: Tensor) -> Tensor:
    """Half precisions as float32, so that long sums are exact enough; float32 and float64 stay as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def full_precision(values: Tensor) -> torch.autocast:
    """A context in which products are not rounded to bf16: Gram matrices lose what they compare under autocast."""
    return torch.autocast(values.device.type, enabled=False)


def pairs(student: list, teacher: list) -> list[tuple]:
    """Stage by stage from the start, cut to the shorter list, as the reference code does. Where the numbers of stages
    differ, choose the tapped points so that the wanted stages meet."""
    return list(zip(student, teacher, strict=False))


def require_space(loss: str, stages: list[tuple[MapShape, MapShape]]) -> None:
    """Losses that normalise over positions are constant on maps of one position: no gradient, without a word.

    Raises:
        ConfigError: no pair of maps has more than one position in common.
    """
    if all(min(s[1], t[1]) * min(s[2], t[2]) == 1 for s, t in stages):
        raise ConfigError(
            f"loss {loss} compares positions, and every pair of maps has a single one",
            got=[(tuple(s), tuple(t)) for s, t in stages],
            hint="tap earlier stages, or use a loss of pooled features",
        )


def mean_per_sample(values: Tensor) -> Tensor:
    """(B, ...) to (B,)."""
    return values.flatten(1).mean(dim=1)


def pool_to_smaller(student: Tensor, teacher: Tensor, *, wide: bool = True) -> tuple[Tensor, Tensor]:
    """Both maps at the smaller height and the smaller width, by adaptive average pooling, in full precision; with
    `wide` off a map that needs no pooling stays in its own."""
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))

    def pooled(feature: Tensor) -> Tensor:
        if feature.shape[2:] != size:
            return F.adaptive_avg_pool2d(widen(feature), size)
        return widen(feature) if wide else feature

    return pooled(student), pooled(teacher)


def attention(feature: Tensor, power: float = 2.0) -> Tensor:
    """(B, h w): the mean over channels of `|f|^power`, flattened, with unit Euclidean norm."""
    from synthkit.distillation.energy import mean_square  # imports torch

    energy = mean_square(feature) if power == 2 else widen(feature).abs().pow(power).mean(dim=1)
    return F.normalize(energy.flatten(1), dim=1)


def regressor(student: MapShape, teacher: MapShape, *, relu: bool = True) -> nn.Sequential:
    """Convolution with bias, BatchNorm and (with `relu`) ReLU that bring a student map to the teacher's channels.

    By size: twice the teacher's, 3x3 with stride 2; half of it, transposed 4x4 with stride 2; else not smaller, an
    unpadded kernel that leaves the teacher's size (1x1 where equal); else 3x3 at the student's size, after which the
    caller pools the teacher (the last is SimKD's addition; RepDistiller refuses such pairs).
    """
    (s_channels, s_h, s_w), (t_channels, t_h, t_w) = student, teacher
    if (s_h, s_w) == (2 * t_h, 2 * t_w):
        conv = torch.nn.Conv2d(s_channels, t_channels, 3, stride=2, padding=1)
    elif (2 * s_h, 2 * s_w) == (t_h, t_w):
        conv = torch.nn.ConvTranspose2d(s_channels, t_channels, 4, stride=2, padding=1)
    elif s_h >= t_h and s_w >= t_w:
        conv = torch.nn.Conv2d(s_channels, t_channels, (1 + s_h - t_h, 1 + s_w - t_w))
    else:
        conv = torch.nn.Conv2d(s_channels, t_channels, 3, padding=1)
    layers: list[nn.Module] = [conv, torch.nn.BatchNorm2d(t_channels)]
    return torch.nn.Sequential(*layers, *([torch.nn.ReLU()] if relu else []))
