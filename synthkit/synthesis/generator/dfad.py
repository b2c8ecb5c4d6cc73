"""DFAD: data-free adversarial distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from synthkit.synthesis.base import Requires, widened
from synthkit.synthesis.generator.config import GeneratorConfig, positive
from synthkit.synthesis.generator.loop import GeneratorLoop
from synthkit.synthesis.losses import adversarial_l1

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DFADConfig(GeneratorConfig):
    """DFAD; the defaults are the released ResNet-34 -> ResNet-18 run on CIFAR-10."""

    epochs: int = 500
    """Epochs of `ep_steps` student steps (50 iterations of `kd_steps`)."""
    ep_steps: int = 250
    """Student steps per epoch."""
    kd_steps: int = 5
    """Student steps per cycle, before the generator's."""
    batch_size: int = 256
    """Images per student step and per generator step."""
    weight_decay: float = 5e-4
    """Weight decay of the student."""
    schedule: Literal["cosine", "step", "constant"] = "step"
    """Student learning rate: times `gamma` at `milestones`."""
    schedule_g: Literal["constant", "cosine", "step"] = "step"
    """Generator learning rate over the epochs, as `schedule`."""
    milestones: tuple[float, ...] = (0.2, 0.4)
    """Fractions of the epochs at which both learning rates fall."""
    loss: Literal["l1", "kl", "l2"] = "l1"
    """KD loss of the student."""
    generator: str = "dfad_a"
    """Generator network (models.generators)."""
    nz: int = 256
    """Latent dimension."""
    betas_g: tuple[float, float] = (0.9, 0.999)
    """Generator Adam betas."""
    adv: float = 1.0
    """Weight of the adversary, the only term."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "adv")


class DFAD(GeneratorLoop):
    """Train a generator to find where student and teacher differ most, and the student to close the gap.

    Student:    L_S = mean_i mean_k |s_ik - t_ik|, `kd_steps` steps on fresh images first.
    Generator:  L_G = -adv mean_i mean_k |s_ik - t_ik|, one step after them. Both networks stay in train mode, so each
    step moves the BatchNorm statistics of both.
    `--curriculum easy2hard` weighs each sample's loss by how far the student is. Its ramp scales the generator's only
    term, to which Adam is indifferent: here easy-to-hard acts through the weights alone.

    Shapes: latents (B, nz) -> images (B, C, H, W), centred on the teacher's normalised space (generator dfad_a) or in
        [0, 1]; logits (B, K).
    Source: Fang et al., "Data-free adversarial distillation" (2019, arXiv 1912.11006);
        VainF/Data-Free-Adversarial-Distillation@c161591 `DFAD_cifar.py`, `DFAD_mnist.py`.
    Differs from source: the released scheduler steps before the first epoch, so its falls come one epoch earlier. The
        arithmetic of an iteration is equal (golden case dfad_iteration). zju-vipa's benchmark form trains the
        generator first, against a student in eval mode (golden case generative_loss has its loss, which is the same).
    Cost: per cycle `kd_steps` forwards of generator and teacher and forward/backwards of the student, and one
        forward/backward of all three.
    """

    requires: ClassVar[Requires] = Requires(teacher=True)
    Config: ClassVar[type] = DFADConfig
    config: DFADConfig
    student_always_trains: ClassVar[bool] = True
    generator_always_trains: ClassVar[bool] = True

    def generator_terms(self, images: Tensor) -> dict[str, Tensor]:
        """The adversary alone."""
        teacher, student = widened(self.teacher(images)), widened(self.student_view(images))
        return {"adversarial": self.adversarial_weight(self.epoch) * adversarial_l1(student, teacher)}

    def run_cycle(self, steps: int) -> None:
        """`steps` student updates, then `g_steps` generator updates."""
        self.set_modes(generating=False)
        for _ in range(steps):
            self.student_step()
            self.step += 1
        self.set_modes(generating=True)
        for _ in range(self.config.g_steps):
            self.generator_step()
        self.set_modes(generating=False)  # a student that is handed out can be trained further
