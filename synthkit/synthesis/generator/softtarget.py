"""Soft-target: a transfer set for soft targets that a normal model of the teacher's features predicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from synthkit.errors import RequirementError
from synthkit.lazy import F, torch
from synthkit.synthesis.base import widened
from synthkit.synthesis.generator.pixels import PixelConfig, PixelLoop
from synthkit.synthesis.losses import activation_loss

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class SoftTargetConfig(PixelConfig):
    """Soft-target; the defaults are the seed's ResNet-34 -> ResNet-18 run on CIFAR-10."""

    a: float = 1.0
    """Weight of the activation term."""
    layer: Literal["auto", "conv", "classifier"] = "auto"
    """Whose weight columns give the features' correlation: the last convolution that is as wide as the classifier's
    input, or the classifier itself; auto is the convolution where there is one."""
    resample: bool = False
    """Draw new soft targets in every iteration, as the seed does, instead of one per image."""
    clamp: bool = True
    """Clamp the pixels to black and white after every iteration (the seed's earlier commit does, its last does not)."""
    g_steps: int = 1000
    """Iterations per synthesis call."""
    lr_g: float = 0.1
    """Adam's rate, in normalised pixels."""
    betas_g: tuple[float, float] = (0.5, 0.99)
    """Adam betas of the pixels."""


class SoftTarget(PixelLoop):
    """Optimise noise until the teacher's softened outputs are soft targets of modelled features, then distil on it.

    Features: f ~ N(0, R), R_ij the cosine of columns i and j of a weight; y = W f + b with the teacher's last layer.
    Pixels:   L = (1/K) KL(softmax(t(x)/T) || softmax(y/T)) - a mean |f_T(x)|, Adam.
    Student:  mean_i v_i T^2 KL(softmax(t/T) || softmax(s/T)).
    --curriculum easy2hard weighs the student's samples (v); there is no adversary, so no ramp. `auto` is none.

    Shapes: pixels (S, C, H, W), features (S, D), y (S, K). Labels are the teacher's argmax.
    Source: Wang, "Data-Free Knowledge Distillation with Soft Targeted Transfer Set Synthesis" (AAAI 2021; not read
        here), as written in ljrprocc/DataFree@bf3096b `datafree/synthesis/softtarget.py`.
    Differs from source: the seed rebinds the name of its pixels to their rolled copy, so Adam moves a tensor that
        nothing reads and the pool is the initial noise, rolled; here the pixels are optimised. One soft target per
        image is drawn at its start (`resample` is the seed's new one in each iteration, which no image can follow).
        Pixels start as N(0, 1) in normalised space and are clamped (the seed's earlier commit); its last commit takes
        them for [0, 1] pixels and leaves them unbounded. R comes from any last convolution that fits (mean over its
        kernel), not of two named networks only; where none does (LeNet-5) from the classifier. f is drawn as A^T e,
        e ~ N(0, I), R = A^T A, which needs no Cholesky factor of a singular matrix.
    Cost: per iteration one forward and backward of the teacher, to its input.
    """

    Config: ClassVar[type] = SoftTargetConfig
    config: SoftTargetConfig

    def __init__(self, config: SoftTargetConfig, task):
        super().__init__(config, task)
        self.factor = correlation_factor(self._weight())

    def _weight(self) -> Tensor:
        """The weight (rows, D) whose columns stand for the D features."""
        classifier, choice = self.teacher.classifier, self.config.layer
        convolution = None if choice == "classifier" else last_convolution(self.teacher.module, classifier.in_features)
        if convolution is not None:
            return convolution.weight.detach().mean((2, 3))
        if choice == "conv":
            raise RequirementError(
                f"{self.teacher.name} has no convolution whose input is as wide as the classifier's",
                got=f"{classifier.in_features} features",
                hint="--method.layer classifier takes the classifier's own columns",
            )
        if choice == "auto" and self.task.warn:
            self.task.warn(
                f"{self.teacher.name} has no convolution of {classifier.in_features} input channels:"
                " the features' correlation comes from the classifier's columns"
            )
        return classifier.weight.detach()

    def soft_targets(self, rng: torch.Generator) -> Tensor:
        """Logits y (S, K) of drawn features."""
        size = (self.config.synthesis_batch, self.factor.shape[0])
        noise = torch.randn(size, generator=rng, device=self.device, dtype=self.factor.dtype)
        with torch.no_grad():
            return self.teacher.classifier(noise @ self.factor)

    def synthesise(self, call: int) -> tuple[Tensor, Tensor | None]:
        """A batch of images for soft targets."""
        c, draw = self.config, self.task.rng(f"call-{call}-features")
        pixels, targets = self.fresh(call, torch.randn), self.soft_targets(draw)
        optimizer = self.adam(pixels)
        for iteration in range(c.g_steps):
            if c.resample and iteration:
                targets = self.soft_targets(draw)
            with self.task.runtime.autocast():
                seen = self.look(self.to_pixels(self.view(pixels, call, iteration)), features=c.a != 0)
            terms = {"soft": soft_target_loss(seen.logits, targets, c.T)}
            if seen.features is not None:
                terms["activation"] = c.a * activation_loss(widened(seen.features))
            self.descend(optimizer, terms)
            if c.clamp:
                self.clip_(pixels)
        return self.to_pixels(pixels.detach()).clamp(0, 1), None


def last_convolution(network: nn.Module, width: int) -> nn.Conv2d | None:
    """The last ungrouped convolution with `width` input channels, or none."""
    found = [
        m for m in network.modules() if isinstance(m, torch.nn.Conv2d) and m.groups == 1 and m.in_channels == width
    ]
    return found[-1] if found else None


def correlation_factor(weight: Tensor) -> Tensor:
    """A (rows, D) with unit columns: A^T A is the cosine matrix R of the columns of `weight` (rows, D)."""
    return F.normalize(weight, dim=0)


def soft_target_loss(logits: Tensor, soft: Tensor, T: float) -> Tensor:
    """KL(softmax(t / T) || softmax(y / T)), averaged over all B K entries; no T^2, as published."""
    return F.kl_div(F.log_softmax(soft / T, dim=1), F.softmax(logits / T, dim=1), reduction="none").mean()
