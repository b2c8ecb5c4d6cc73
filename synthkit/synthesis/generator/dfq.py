"""DFQ: adversarial data-free distillation with BatchNorm statistics, in its full-precision form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from synthkit.synthesis.base import Requires, widened
from synthkit.synthesis.generator.config import GeneratorConfig
from synthkit.synthesis.generator.loop import GeneratorLoop
from synthkit.synthesis.losses import adversarial_kl, class_entropy, one_hot_loss

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DFQConfig(GeneratorConfig):
    """DFQ; the defaults are the benchmark's ResNet-34 -> ResNet-18 run on CIFAR-10."""

    epochs: int = 200
    """Epochs of `ep_steps` student steps."""
    batch_size: int = 256
    """Images per student step and per generator step."""
    loss: Literal["l1", "kl", "l2"] = "kl"
    """KD loss of the student."""
    T: float = 1.0
    """KD temperature."""
    generator: str = "large"
    """Generator network (models.generators)."""
    nz: int = 256
    """Latent dimension."""
    betas_g: tuple[float, float] = (0.5, 0.999)
    """Generator Adam betas (ljrprocc/DataFree: 0.9, 0.99)."""
    adv: float = 1.0
    """Weight of the adversary; its start under a curriculum with a ramp."""
    adv_T: float = 1.0
    """Temperature of the adversary."""
    bn: float = 1.0
    """Weight of the BatchNorm-statistics term; off for teachers without BatchNorm."""
    oh: float = 1.0
    """Weight of the one-hot term."""
    balance: float = 20.0
    """Weight of the class-balance term (negative entropy of the mean prediction)."""


class DFQ(GeneratorLoop):
    """Train a generator against teacher and student, kept near the teacher's data by its BatchNorm statistics.

    Generator:  L_G = a KL_adv + bn L_BN + oh CE(t, argmax t) + balance sum_k p_k log p_k, with
    KL_adv = -mean_i KL(softmax(t_i) || softmax(s_i)) (every sample, no mask) and p = mean_i softmax(t_i).
    Student:    L_S = mean_i KL(softmax(t_i) || softmax(s_i)) on fresh images.
    `--curriculum easy2hard` lets a grow from `adv` by `grad_adv` an epoch between `begin` and `end` and weighs each
    sample's KD loss by how far the student is; with a masked adversary and the entropy at temperature T this would be
    CuDFKD.

    Shapes: latents (B, nz) -> images (B, C, H, W) in [0, 1]; logits (B, K).
    Source: Choi et al., "Data-free network quantization with adversarial knowledge distillation" (CVPR workshops 2020,
        arXiv 2005.04136), as zju-vipa/CMI@9e79fa9 `datafree/synthesis/generative.py` implements it (the authors'
        repository was not to be had).
    Differs from source: nothing is quantised (nor is it in the benchmark), and the benchmark's networks and rates are
        used, not the paper's; the benchmark's `--T 20` never reaches its criterion, so T is 1 here; the teacher is
        frozen and BN statistics are taken in generator steps only. The arithmetic is equal (golden cases
        generative_loss, generative_update). With bn, oh and balance 0 it is the benchmark's form of ZSKT.
    Cost: per generator step one forward/backward of generator, teacher (to its input) and student.
    """

    requires: ClassVar[Requires] = Requires(teacher=True)
    Config: ClassVar[type] = DFQConfig
    config: DFQConfig

    def generator_terms(self, images: Tensor) -> dict[str, Tensor]:
        """The weighted terms of L_G."""
        seen = self.look(images)
        weight = self.adversarial_weight(self.epoch)
        student = widened(self.student_view(images)) if weight != 0 else None
        return dfq_terms(self.config, seen.logits, student, seen.bn, weight)


def dfq_terms(
    config: DFQConfig, teacher: Tensor, student: Tensor | None, bn_loss: Tensor | None, adversarial: float
) -> dict[str, Tensor]:
    """Weighted terms of the DFQ generator loss from logits (B, K) and the scalar BN loss."""
    terms = {
        "one_hot": config.oh * one_hot_loss(teacher),
        "balance": -config.balance * class_entropy(teacher),
    }
    if student is not None and adversarial != 0:
        terms["adversarial"] = adversarial * adversarial_kl(student, teacher, config.adv_T)
    if bn_loss is not None and config.bn != 0:
        terms["bn"] = config.bn * bn_loss
    return terms
