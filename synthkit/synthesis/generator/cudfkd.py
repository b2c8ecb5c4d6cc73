"""CuDFKD: data-free distillation with a curriculum of pseudo samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from synthkit.synthesis.base import widened
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
    adv_type: Literal["kl", "js"] = "kl"
    """Adversary: decision-masked KL, or ADI's Jensen-Shannon form."""


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

    Config: ClassVar[type] = CuDFKDConfig
    default_curriculum: ClassVar[str] = "easy2hard"
    config: CuDFKDConfig

    def generator_terms(self, images: Tensor) -> dict[str, Tensor]:
        """The weighted terms of L_G."""
        seen = self.look(images, features=self.config.act != 0)
        weight = self.adversarial_weight(self.epoch)
        student = widened(self.student_view(images)) if weight != 0 else None
        return cudfkd_terms(self.config, seen.logits, student, seen.features, seen.bn, weight)


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
