"""Diffusion: images of intended classes from a diffusion model, bent by a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from synthkit.errors import ConfigError, RequirementError
from synthkit.lazy import torch
from synthkit.synthesis.base import Requires, Task, widened
from synthkit.synthesis.curriculum import rising
from synthkit.synthesis.diffusion.config import DiffusionConfig
from synthkit.synthesis.diffusion.guidance import adversarial_energy, class_energy, diversity_energy
from synthkit.synthesis.diffusion.loop import DiffusionLoop, Energy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GuidedConfig(DiffusionConfig):
    """Sampling of a diffusion model under teacher guidance; without a teacher it is sampled as it is."""

    guidance: float = 0.03
    """g: how far the teacher bends a step, relative to its length (0 switches it off). Too much pleases the
    teacher with patterns that other networks do not take for the class."""
    ce: float = 1.0
    """Weight of the cross-entropy to the intended class."""
    bn: float = 0.0
    """Weight of the BatchNorm-statistics term (DeepInversion), per image."""
    adv: float = 0.0
    """Weight of the adversarial term against `student`: images that the teacher knows and the student does not."""
    adv_T: float = 3.0
    """Temperature of the adversarial term."""
    student: str | None = None
    """Model spec of a fixed student, for the adversarial term."""
    diversity: float = 0.0
    """Weight of the repulsion from the most similar image of the same class in the batch."""
    hard_guidance: float = 0.5
    """easy2hard: share of `guidance` that is left at the last image of the bank."""
    normalise: bool = True
    """Give every image's gradient the length of its noise; without it the gradient explodes where signal is low."""
    abar_min: float = 0.01
    """Share of signal below which a step is not guided."""
    through: bool = False
    """Differentiate through the diffusion network too (twice the cost and more), not only through the classifier: the
    network turns what pleases the teacher into what looks like its training images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("guidance", "ce", "bn", "adv", "diversity"):
            if getattr(self, name) < 0:
                raise ConfigError(f"method.{name} must not be negative", got=getattr(self, name))
        if not 0 <= self.hard_guidance <= 1 or not 0 <= self.abar_min < 1:
            raise ConfigError(
                "method.hard_guidance must be in [0, 1], abar_min in [0, 1)", got=(self.hard_guidance, self.abar_min)
            )
        if self.adv_T <= 0:
            raise ConfigError("method.adv_T must be positive", got=self.adv_T)


class Diffusion(DiffusionLoop):
    """Sample a diffusion model class by class, every step bent towards what a teacher knows.

    Step: eps = eps_net (eps_null + s (eps_y - eps_null) with classifier-free guidance), x0 = (x_t - sqrt(1 - a) eps) /
    sqrt(a) with a = abar_t, and, where a > `abar_min`, eps' = eps + g_r sqrt(1 - a) G / ||G|| ||eps||, G = dE/dx_t of
    E = sum_i ce CE(f(x0_i), y_i) + bn R_BN + adv_r A_i + diversity max_j cos(x0_i, x0_j), which is minimised:
    A_i = -1[argmax s_i = argmax f_i] T^2 KL(f_i || s_i) for a fixed student s, j over the batch's images of class y_i,
    R_BN as DeepInversion's. Then x <- sampler(x_t, eps').
    Curriculum: with p = r / (N - 1) of row r of N, easy2hard lowers g_r from `guidance` to `hard_guidance` of it (less
    typical images) and raises adv_r from 0 to `adv`; both depend on the row alone. Off, they are constant.

    Shapes: states (B, c, h, w), images (B, C, H, W) in [0, 1]; another size than the bank's is scaled to it
        (antialiased bilinear). Labels are the intended classes r mod K, logits the teacher's, difficulty its CE.
    Source: classifier guidance, Dhariwal & Nichol (2021, arXiv 2105.05233); energies of DiffDFKD (ICME 2025),
        xhqi0109/DiffDFKD@0f6e50a; repulsion of MinimaxDiffusion (arXiv 2311.15529), vimar-gu/MinimaxDiffusion; the
        normalised form as measured in methods/largescale.md 5.
    Differs from source: the teacher is a clean-image classifier that sees the predicted x0 (no noisy classifier);
        gradients are normalised per image, and g is smaller than the card's 0.1: from there on the teacher is sure of
        more and more images that a network that took no part is not (assets/results/diffusion_mnist.json, scales);
        DiffDFKD's x0 carries no gradient as published, here it does; the memory of the repulsion is the batch, so
        shards stay independent.
    Cost: per image `steps` forward passes of the network (twice with cfg) and, guided, a forward and backward pass of
        the teacher each (with `through` a backward pass of the network too); O(batch) memory.
    """

    requires: ClassVar[Requires] = Requires(teacher=False, shardable=True, networks=("student",))
    Config: ClassVar[type] = GuidedConfig
    config: GuidedConfig

    def __init__(self, config: GuidedConfig, task: Task):
        super().__init__(config, task)
        self.guided = bool(task.teachers) and config.guidance > 0
        if config.adv and "student" not in task.networks:
            raise RequirementError("diffusion: adv needs a student", hint="--method.student NAME@FILE, or adv 0")
        if self.guided and self.sampler.abar is None:
            raise RequirementError(
                "a consistency model jumps to the image at once, so there is no step to guide",
                hint="--method.guidance 0 (the teacher still labels), or another model",
            )
        if self.painter.conditions is None and not self.guided:
            raise RequirementError(
                f"{self.layout.folder}: the model knows no classes, so only a teacher can make some",
                hint="give --teacher and a --method.guidance above 0",
            )

    @classmethod
    def requires_for(cls, config: GuidedConfig) -> Requires:
        """BatchNorm only where its term is on; a teacher where a term needs one."""
        return Requires(teacher=False, batchnorm=config.bn > 0, shardable=True, networks=("student",))

    def _progress(self, start: int, count: int) -> list[float]:
        last = max(1, self.task.images - 1)
        return [row / last for row in range(start, start + count)]

    def guidance_scale(self, start: int, count: int) -> Tensor:
        """g_r (count,)."""
        if not self.task.curriculum.ramp:
            return torch.full((count,), self.config.guidance)
        shares = [rising(p, 1.0, self.config.hard_guidance) for p in self._progress(start, count)]
        return self.config.guidance * torch.tensor(shares)

    def adversarial_weight(self, start: int, count: int) -> Tensor:
        """adv_r (count,)."""
        if not self.task.curriculum.ramp:
            return torch.full((count,), self.config.adv)
        return self.config.adv * torch.tensor([rising(p, 0.0, 1.0) for p in self._progress(start, count)])

    def energy(self, labels: Tensor, start: int) -> Energy | None:
        """E of the docstring, or None where nothing is guided."""
        if not self.guided:
            return None
        c, teacher = self.config, self.task.teacher
        adversarial = self.adversarial_weight(start, len(labels)).to(self.device)

        def total(images: Tensor) -> Tensor:
            parts, statistics = [], None
            with self.task.runtime.autocast():
                if c.bn:
                    with teacher.bn_statistics() as statistics:
                        logits = widened(teacher(images))
                else:
                    logits = widened(teacher(images))
                student = widened(self.task.networks["student"](images)) if c.adv else None
            parts.append(c.ce * class_energy(logits, labels).sum())
            if statistics is not None:
                parts.append(c.bn * len(images) * statistics.loss())
            if student is not None:
                parts.append((adversarial * adversarial_energy(student, logits, c.adv_T)).sum())
            if c.diversity:
                parts.append(c.diversity * diversity_energy(images, labels).sum())
            return torch.stack(parts).sum()

        return total
