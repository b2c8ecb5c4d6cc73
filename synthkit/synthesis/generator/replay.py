"""What the replay methods (PRE-DFKD, MB-DFKD, LRA) share: their published settings and the loss of their generator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from synthkit.errors import ConfigError
from synthkit.synthesis.base import widened
from synthkit.synthesis.generator.config import GeneratorConfig
from synthkit.synthesis.losses import activation_loss, adversarial_js, class_entropy, one_hot_loss

if TYPE_CHECKING:
    from torch import Tensor

    from synthkit.synthesis.generator.loop import GeneratorLoop


@dataclass(frozen=True, kw_only=True)
class ReplayConfig(GeneratorConfig):
    """Methods that rehearse earlier images; the defaults are the published ResNet-34 -> ResNet-18 run on CIFAR-100."""

    epochs: int = 400
    """Epochs of `ep_steps` student steps."""
    ep_steps: int = 360
    """Student steps per epoch (36 cycles)."""
    batch_size: int = 1024
    """Fresh images per student step, and images per generator step."""
    weight_decay: float = 5e-4
    """Weight decay of the student."""
    lr_g: float = 0.02
    """Generator learning rate (one persistent Adam)."""
    betas_g: tuple[float, float] = (0.9, 0.999)
    """Generator Adam betas."""
    generator: str = "dafl_sn"
    """Generator network (models.generators)."""
    nz: int = 1000
    """Latent dimension."""
    oh: float = 1.0
    """Weight of the one-hot term."""
    ie: float = 5.0
    """Weight of the class balance, whose logarithm has base 10."""
    act: float = 0.1
    """Weight of the activation term."""
    adv: float = 1.0
    """Weight of the adversary; its start under a curriculum with a ramp."""
    grad_adv: float = 0.05
    """Growth of the adversarial weight per epoch under a ramp (1 to 11 over 400 epochs, ADI's scale at 10 classes)."""
    memory_share: float = 0.125
    """Rehearsed images per fresh image of a student step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 4:
            raise ConfigError(
                "method.batch_size must be at least 4 (part of a batch is rehearsed)", got=self.batch_size
            )
        if not 0 < self.memory_share <= 1:
            raise ConfigError("method.memory_share must be in (0, 1]", got=self.memory_share)

    @property
    def rehearsed(self) -> int:
        """Rehearsed images of one student step; at least 2, since their variance is taken."""
        return max(2, round(self.memory_share * self.batch_size))


def novel_terms(loop: GeneratorLoop, images: Tensor) -> dict[str, Tensor]:
    """`replay_terms` of a loop whose config is a `ReplayConfig`."""
    seen = loop.look(images, features=loop.config.act != 0)
    weight = loop.adversarial_weight(loop.epoch)
    student = widened(loop.student_view(images)) if weight != 0 else None
    features = None if seen.features is None else widened(seen.features)
    return replay_terms(loop.config, seen.logits, student, features, weight)


def replay_terms(
    config: ReplayConfig, teacher: Tensor, student: Tensor | None, features: Tensor | None, adversarial: float
) -> dict[str, Tensor]:
    """Weighted terms of L_G of the replay methods from logits (B, K) and penultimate features (B, D)."""
    terms = {
        "one_hot": config.oh * one_hot_loss(teacher),
        "entropy": -config.ie / math.log(10) * class_entropy(teacher),
    }
    if features is not None and config.act != 0:
        terms["activation"] = config.act * activation_loss(features)
    if student is not None and adversarial != 0:
        terms["adversarial"] = adversarial * adversarial_js(student, teacher.detach(), config.adv_T, mean="element")
    return terms
