"""DAFL: data-free learning of student networks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from synthkit.errors import ConfigError
from synthkit.synthesis.base import Requires, Task, widened
from synthkit.synthesis.generator.config import GeneratorConfig
from synthkit.synthesis.generator.loop import GeneratorLoop
from synthkit.synthesis.generator.student import Distilled
from synthkit.synthesis.losses import activation_loss, class_entropy, masked_adversarial_kl, one_hot_loss

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DAFLConfig(GeneratorConfig):
    """DAFL; the defaults are the released ResNet-34 -> ResNet-18 run on CIFAR-10."""

    form: Literal["original", "benchmark"] = "original"
    """original: generator and student learn from one and the same batch, balance in log10 (the paper's own code);
    benchmark: separate steps on fresh images, natural logarithm (zju-vipa)."""
    epochs: int = 2000
    """Epochs of `ep_steps` student steps."""
    ep_steps: int = 120
    """Student steps per epoch."""
    kd_steps: int = 1
    """Student steps per cycle (1 in the original form)."""
    batch_size: int = 1024
    """Images per step; the original needs large batches."""
    weight_decay: float = 5e-4
    """Weight decay of the student."""
    schedule: Literal["cosine", "step", "constant"] = "step"
    """Student learning rate: times `gamma` at `milestones`; the generator's stays."""
    loss: Literal["l1", "kl", "l2"] = "kl"
    """KD loss of the student."""
    T: float = 1.0
    """KD temperature."""
    grad_adv: float = 0.05
    """Growth per epoch of CuDFKD's adversary, which DAFL has only under a curriculum with a ramp."""
    generator: str = "dafl"
    """Generator network (models.generators)."""
    nz: int = 1000
    """Latent dimension."""
    lr_g: float = 0.02
    """Generator learning rate."""
    betas_g: tuple[float, float] = (0.9, 0.999)
    """Generator Adam betas."""
    oh: float = 0.05
    """Weight of the one-hot term."""
    balance: float = 5.0
    """Weight of the class-balance term (the code's `ie`)."""
    act: float = 0.01
    """Weight of the activation term (the code's `a`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form == "original" and (self.kd_steps, self.g_steps) != (1, 1):
            raise ConfigError(
                "method.form original is one step of generator and student on one batch: kd_steps and g_steps are 1",
                got=(self.kd_steps, self.g_steps),
                hint="use --method.form benchmark for steps of their own",
            )


class DAFL(GeneratorLoop):
    """Train a generator whose images the teacher takes for real ones, and a student on them, without data.

    Generator:  L_G = oh CE(t, argmax t) + balance sum_k p_k log10 p_k - act mean|f|, p = mean_i softmax(t_i), f the
    teacher's penultimate features.
    Student:    L_S = mean_i KL(softmax(t_i) || softmax(s_i)) on the same images, before the generator's update.
    `--curriculum easy2hard` makes a new method of it: the student weighs each sample's KD loss by how far it is, and
    the generator gets CuDFKD's adversary (masked KL at adv_T) whose weight grows from `adv` = 0 between `begin` and
    `end`.

    Shapes: latents (B, nz) -> images (B, C, H, W), centred on the teacher's normalised space (generator dafl) or in
        [0, 1]; logits (B, K).
    Source: Chen et al., "Data-free learning of student networks" (ICCV 2019, arXiv 1904.01186);
        huawei-noah/Efficient-Computing@225ddd2 `Data-Efficient-Model-Compression/DAFL/DAFL-train.py`.
    Differs from source: `form benchmark` is zju-vipa/CMI@9e79fa9 `datafree/synthesis/generative.py`: a step of the
        generator, then steps of the student on fresh images of the generator in eval mode, natural logarithm. The
        paper writes the entropy without a base; the released code takes log10, the default here. f is the input of
        the last linear layer; for LeNet-5 the released code takes the 120 convolutional features, two layers earlier.
        The CIFAR-100 constants are those of its teacher (the released code normalises it like CIFAR-10). The remaining
        arithmetic is equal (golden cases dafl_losses, dafl_update, generative_loss).
    Cost: per iteration one forward/backward of generator, teacher (to its input) and student; in the original form the
        teacher's forward serves both.
    """

    requires: ClassVar[Requires] = Requires(teacher=True)
    Config: ClassVar[type] = DAFLConfig
    config: DAFLConfig

    def __init__(self, config: DAFLConfig, task: Task):
        super().__init__(config, task)
        self._shared: tuple[Tensor, Tensor] | None = None  # (images, teacher logits) of the running iteration

    def generator_terms(self, images: Tensor) -> dict[str, Tensor]:
        """The weighted terms of L_G."""
        seen = self.look(images, features=self.config.act != 0)
        weight = self.adversarial_weight(self.epoch)
        student = widened(self.student_view(images)) if weight != 0 else None
        self._shared = images.detach(), seen.logits.detach()
        return dafl_terms(self.config, seen.logits, student, seen.features, weight)

    def run_cycle(self, steps: int) -> None:
        """As in the base; what the two steps of the original form share ends with it."""
        super().run_cycle(steps)
        self._shared = None

    def student_images(self) -> Tensor:
        """The generator's own batch in the original form, fresh images in the other."""
        if self.config.form == "original" and self._shared is not None:
            return self._shared[0]
        return super().student_images()

    def distil(self, images: Tensor) -> Distilled:
        """In the original form the teacher has seen the batch already."""
        if self._shared is None or images is not self._shared[0]:
            return super().distil(images)
        teacher = self._shared[1]
        with self.task.runtime.autocast():
            student = widened(self.student_view(images))
        per_sample = self.kd_per_sample(student, teacher)
        return Distilled(teacher, student, per_sample, self.student_loss(per_sample))


def dafl_terms(
    config: DAFLConfig, teacher: Tensor, student: Tensor | None, features: Tensor | None, adversarial: float
) -> dict[str, Tensor]:
    """Weighted terms of the DAFL generator loss from logits (B, K) and penultimate features (B, D)."""
    base = math.log(10) if config.form == "original" else 1.0
    terms = {
        "one_hot": config.oh * one_hot_loss(teacher),
        "balance": -config.balance / base * class_entropy(teacher),
    }
    if features is not None and config.act != 0:
        terms["activation"] = config.act * activation_loss(features)
    if student is not None and adversarial != 0:
        terms["adversarial"] = adversarial * masked_adversarial_kl(student, teacher, config.adv_T)
    return terms
