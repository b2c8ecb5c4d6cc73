"""CuDFKD: data-free distillation with a curriculum of pseudo samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from synthkit.errors import ConfigError
from synthkit.synthesis.base import Requires, widened
from synthkit.synthesis.curriculum import adversarial_weight, age_at, self_paced_weights
from synthkit.synthesis.generator.config import GeneratorConfig
from synthkit.synthesis.generator.loop import GeneratorLoop
from synthkit.synthesis.losses import (
    activation_loss,
    adversarial_js,
    class_entropy,
    masked_adversarial_kl,
    one_hot_loss,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CuDFKDConfig(GeneratorConfig):
    """CuDFKD; the defaults are the published ResNet-34 -> ResNet-18 run on CIFAR-10."""

    lambda_ent: float = -20.0
    """Weight of the entropy of the mean prediction (negative: balance is sought)."""
    oh: float = 1.0
    """Weight of the one-hot term."""
    bn: float = 1.0
    """Weight of the BatchNorm-statistics term; off for teachers without BatchNorm."""
    act: float = 0.0
    """Weight of the activation term."""
    adv: float = 0.0
    """Adversarial weight a_0 of the first, easy epochs."""
    grad_adv: float = 0.5
    """Growth of the adversarial weight per epoch between `begin` and `end`."""
    begin: float = 0.25
    """Fraction of the epochs at which the ramp begins."""
    end: float = 0.75
    """Fraction of the epochs at which the ramp ends."""
    adv_type: Literal["kl", "js"] = "kl"
    """Adversary: decision-masked KL, or ADI's Jensen-Shannon form."""
    adv_T: float = 3.0
    """Temperature of the adversary."""
    lambda_0: float = 2.0
    """Age parameter of the self-paced weights at the first step."""
    alpha: float = 1e-4
    """Growth of the age per student step (published: 1e-4 for CIFAR-10, 2e-5 elsewhere)."""
    granularity: Literal["sample", "batch"] = "sample"
    """Self-paced weight per sample (as the paper says) or one per batch (as the published code does)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.begin <= self.end <= 1:
            raise ConfigError(
                "method.begin and method.end must satisfy 0 <= begin <= end <= 1", got=(self.begin, self.end)
            )
        if self.lambda_0 <= 0:
            raise ConfigError("method.lambda_0 must be positive", got=self.lambda_0)


class CuDFKD(GeneratorLoop):
    """Train a generator and a student together, from easy samples to hard ones, without data.

    Generator:  L_G = lambda_ent H(mean_i softmax(t_i/T)) + a(e) L_adv + oh CE(t, argmax t) - act mean|f| + bn L_BN,
    with L_adv = -mean_i 1[argmax s_i = argmax t_i] 9 KL(softmax(t_i/3) || softmax(s_i/3)) (or 1 - JS).
    Student:    L_S = mean_i v(l_i, lambda_k) l_i, l_i the KD loss of sample i, v the self-paced weight,
    lambda_k = lambda_0 + alpha k. The adversary's weight a(e) ramps up between `begin` and `end`.

    Shapes: latents (B, nz) -> images (B, C, H, W) in [0, 1]; logits (B, K).
    Source: Li et al., "Dynamic data-free knowledge distillation by easy-to-hard learning strategy" (Information
        Sciences 2023, arXiv 2208.13648); ljrprocc/DataFree@bf3096b `datafree/synthesis/cudfkd.py`.
    Differs from source: v is per sample (the released code reduces over the batch first; `granularity batch` is that);
        the teacher is frozen and BN statistics are taken during generator steps only; the remaining arithmetic is
        equal (golden cases cudfkd_*).
    Cost: per generator step one forward/backward of generator, teacher (to its input) and, while a > 0, student.
    """

    requires: ClassVar[Requires] = Requires(teacher=True)
    Config: ClassVar[type] = CuDFKDConfig
    config: CuDFKDConfig

    def __init__(self, config: CuDFKDConfig, task):
        super().__init__(config, task)
        self.use_bn = config.bn != 0 and self.teacher.has_batchnorm
        if config.bn != 0 and not self.use_bn and task.warn:
            task.warn(f"{self.teacher.name} has no BatchNorm layer: the BN-statistics term is off")

    def adversarial_weight(self, epoch: int) -> float:
        """a(e) of the ramp."""
        c = self.config
        growth = c.grad_adv if self.task.curriculum.ramp else 0.0
        return adversarial_weight(epoch, c.epochs, c.adv, growth, c.begin, c.end)

    @property
    def age(self) -> float:
        """lambda of the current student step."""
        return age_at(self.step, self.config.lambda_0, self.config.alpha)

    def schedule_figures(self, epoch: int) -> dict[str, float]:
        """The adversary's weight in `epoch` and the age at its end."""
        return {"adv_weight": self.adversarial_weight(epoch), "age": self.age}

    def generator_terms(self, images: Tensor) -> dict[str, Tensor]:
        """The weighted terms of L_G."""
        features = statistics = None
        if self.use_bn:
            with self.teacher.bn_statistics() as statistics:
                teacher, features = self._teacher(images)
        else:
            teacher, features = self._teacher(images)
        weight = self.adversarial_weight(self.epoch)
        student = widened(self.student_view(images)) if weight != 0 else None
        return cudfkd_terms(
            self.config,
            widened(teacher),
            student,
            features,
            statistics.loss() if statistics else None,
            weight,
        )

    def _teacher(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.teacher.features(images) if self.config.act != 0 else (self.teacher(images), None)

    def student_loss(self, per_sample: Tensor) -> Tensor:
        """mean_i v(l_i) l_i, or v(mean l) mean l for the published code's granularity."""
        form = self.task.curriculum.weights
        losses = per_sample.mean() if self.config.granularity == "batch" else per_sample
        return (self_paced_weights(losses, self.age, form) * losses).mean()


def cudfkd_terms(
    config: CuDFKDConfig,
    teacher: Tensor,
    student: Tensor | None,
    features: Tensor | None,
    bn_loss: Tensor | None,
    adversarial: float,
) -> dict[str, Tensor]:
    """Weighted terms of the CuDFKD generator loss from logits (B, K), features (B, D) and the scalar BN loss."""
    terms = {
        "entropy": config.lambda_ent * class_entropy(teacher, config.T),
        "one_hot": config.oh * one_hot_loss(teacher),
    }
    if student is not None and adversarial != 0:
        adversary = masked_adversarial_kl if config.adv_type == "kl" else adversarial_js
        terms["adversarial"] = adversarial * adversary(student, teacher, config.adv_T)
    if features is not None and config.act != 0:
        terms["activation"] = config.act * activation_loss(features)
    if bn_loss is not None and config.bn != 0:
        terms["bn"] = config.bn * bn_loss
    return terms
