"""OFA: one distillation for all pairs of architectures, through logits of every student stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from synthkit.distillation.contract import Batch, Loss, LossNeeds, Setup, Taps
from synthkit.distillation.losses.common import check_temperature, reduce
from synthkit.errors import ConfigError
from synthkit.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor, nn

Projector = Literal["auto", "conv", "tokens"]


def ofa_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    gamma: float = 1.0,
    temperature: float = 1.0,
    reduction: Literal["none", "mean"] = "mean",
):
    """Cross-entropy with the teacher's probabilities, in which an exponent lifts the label's class.

    `l_i = -sum_c [(p_ic + 1[c = y_i])^gamma - 1[c = y_i]] log q_ic`, `p = softmax(t / T)`, `q = softmax(s / T)`;
    `gamma = 1` is soft cross-entropy. There is no factor T^2.

    Shapes: `student`, `teacher` (B, K) logits, `labels` (B,) int64; returns (B,) for "none", a scalar for "mean".

    Source: Hao et al. 2023, "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation"
    (arXiv 2310.19444); Hao840/OFAKD@f7bb896 distillers/ofa.py:ofa_loss.
    Differs from source: log-softmax instead of the log of a softmax, which is -inf at a probability of 0.
    Cost: O(B K) time and memory.

    >>> import torch
    >>> round(float(ofa_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))), 4)
    0.6931
    """
    target = F.one_hot(labels, student.shape[1]).to(student.dtype)
    lifted = (F.softmax(teacher / temperature, dim=1) + target) ** gamma - target
    return reduce(-(lifted * F.log_softmax(student / temperature, dim=1)).sum(dim=1), reduction)


def conv_projector(channels: int, halvings: int, width: int, num_classes: int) -> nn.Sequential:
    """From a map (B, channels, h, w) to logits (B, num_classes): `halvings` blocks of two separable convolutions, of
    which the first halves the map; channels double with every block and end at `width`; with no block a 1x1
    convolution leads to `width`. Then average pooling and a linear layer."""
    nn = torch.nn
    layers: list[nn.Module] = [] if halvings else [nn.Conv2d(channels, width, 1)]
    for block in range(halvings):
        out = width if block == halvings - 1 else 2 * channels
        layers.append(nn.Sequential(*_separable(channels, channels, 2), *_separable(channels, out, 1)))
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


def _separable(channels: int, out: int, stride: int) -> list[nn.Module]:
    nn = torch.nn
    depthwise = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
    return [depthwise, nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]


def init_projectors(module: nn.Module) -> None:
    """In place: convolutions kaiming normal by fan-out, linear weights a truncated N(0, 0.02), linear biases 0."""
    nn = torch.nn
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class OFA(Loss):
    """`ofa_loss` at the student's logits and at the logits of a projector on each chosen stage.

    `L_i = l(s_i; gamma_last) + sum_k l(P_k(map_k)_i; gamma_k)`; the published total adds a cross-entropy with label
    smoothing 0.1 at weight 1, which is a term of its own (`ce+ofa`).

    Shapes: student logits (B, K), maps (B, C, h, w); teacher logits (B, K); both values are (B,).

    Source: as `ofa_loss`; class OFA, distillers/utils.py:SepConv, PatchMerging.
    Differs from source: stages are the tapped maps, counted from 1, and stage k of n gets n - k blocks (the source has
    4 stages). Maps carry no class token, so the token projector takes the mean over tokens (the source does so only
    for networks without such a token), on a 7x7 grid at the least. Token networks are told by maps of one shape
    (`projector: auto`); name `tokens` for a Swin student. Without a teacher at hand its width counts as 0.
    Cost: one small projector per stage and step; discarded after training.
    """

    requires = LossNeeds(labels=True, student=("pooled", "maps"))

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of OFA."""

        gamma: tuple[float, ...] = (1.0,)
        """Exponent: one for all, or one per stage in order and the last for the final logits (CIFAR 1, ImageNet 1.5
        by the authors' README)."""
        temperature: float = 1.0
        """Softening temperature T of all logits."""
        stages: tuple[int, ...] = ()
        """Stages with a projector, from 1; none given: all."""
        projector: Projector = "auto"
        """Convolutions or attention blocks over tokens; auto: tokens where all maps have one shape."""

        def __post_init__(self):
            check_temperature(self.temperature)
            if not self.gamma or not all(g > 0 for g in self.gamma):
                raise ConfigError("loss.gamma must hold positive numbers", got=self.gamma, hint="1 is soft CE")
            if self.projector not in ("auto", "conv", "tokens"):
                raise ConfigError("loss.projector: not known", got=self.projector, allowed=["auto", "conv", "tokens"])

    @property
    def stands_alone(self) -> bool:
        """The final logits learn too."""
        return True

    def setup(self, setup: Setup) -> None:
        """Build the projectors of the chosen stages."""
        from synthkit.distillation.heads.token_projector import TokenProjector
        from synthkit.models.init import seeded

        maps = setup.student.maps
        stages = self.config.stages or tuple(range(1, len(maps) + 1))
        if not maps or any(not 1 <= k <= len(maps) for k in stages) or len(set(stages)) < len(stages):
            raise ConfigError(f"loss.stages: the student has the stages 1 to {len(maps)}, each once", got=list(stages))
        if len(self.config.gamma) not in (1, len(stages) + 1):
            raise ConfigError(
                f"loss.gamma needs 1 value, or {len(stages) + 1} for {len(stages)} stages and the final logits",
                got=list(self.config.gamma),
            )
        tokens = self.config.projector == "tokens"
        if self.config.projector == "auto":
            tokens = len(maps) > 1 and len(set(maps)) == 1
        teacher = setup.teacher_classifier.in_features if setup.teacher_classifier is not None else 0
        width = max(setup.student.pooled, setup.teacher.pooled, teacher)
        self.aux = torch.nn.ModuleDict()
        with seeded(setup.seed):
            for k in stages:
                channels, side, _ = maps[k - 1]
                left = len(maps) - k
                if tokens:
                    head = TokenProjector(channels, side, setup.student.pooled, max(left, 1), setup.num_classes)
                else:
                    head = conv_projector(channels, left, width, setup.num_classes)
                init_projectors(head)
                self.aux[str(k)] = head

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        assert batch.labels is not None and student.maps is not None and isinstance(self.aux, torch.nn.ModuleDict)
        gammas = self.config.gamma * (len(self.aux) + 1) if len(self.config.gamma) == 1 else self.config.gamma
        values = []
        logits = [head(student.maps[int(k) - 1]).float() for k, head in self.aux.items()] + [student.logits]
        for given, gamma in zip(logits, gammas, strict=True):
            value = ofa_loss(
                given,
                teacher.logits,
                batch.labels,
                gamma=gamma,
                temperature=self.config.temperature,
                reduction="none",
            )
            values.append(value)
        return {"ofa": values[-1], "ofa_stages": torch.stack(values[:-1]).sum(dim=0)}
