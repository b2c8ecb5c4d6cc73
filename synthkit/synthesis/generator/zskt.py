"""ZSKT: zero-shot knowledge transfer through adversarial belief matching."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from synthkit.lazy import F, torch
from synthkit.synthesis.base import Requires, Task, widened
from synthkit.synthesis.generator.config import GeneratorConfig, not_negative, positive
from synthkit.synthesis.generator.loop import GeneratorLoop
from synthkit.synthesis.generator.student import Distilled
from synthkit.synthesis.losses import adversarial_kl

if TYPE_CHECKING:
    from torch import Tensor

    from synthkit.models.view import ModelView

Maps = dict[tuple[int, ...], "Tensor"]


@dataclass(frozen=True, kw_only=True)
class ZSKTConfig(GeneratorConfig):
    """ZSKT; the defaults are the released CIFAR-10 runs of wide residual networks (80,000 cycles)."""

    epochs: int = 800
    """Epochs of `ep_steps` student steps (for the log and a ramp; the learning rates move per cycle)."""
    ep_steps: int = 1000
    """Student steps per epoch."""
    batch_size: int = 128
    """Images per cycle."""
    optimizer: Literal["sgd", "adam"] = "adam"
    """Optimiser of the student."""
    lr: float = 2e-3
    """Student learning rate."""
    weight_decay: float = 0.0
    """Weight decay of the student."""
    schedule_g: Literal["constant", "cosine", "step"] = "cosine"
    """Generator learning rate, as `schedule`."""
    clip: float = 5.0
    """Largest gradient norm of student and generator (0: not clipped)."""
    loss: Literal["l1", "kl", "l2"] = "kl"
    """KD loss of the student."""
    T: float = 1.0
    """KD temperature."""
    adv: float = 1.0
    """Weight of the adversary, the generator's only term."""
    adv_T: float = 1.0
    """Temperature of the adversary."""
    generator: str = "zskt"
    """Generator network (models.generators)."""
    nz: int = 100
    """Latent dimension."""
    betas_g: tuple[float, float] = (0.9, 0.999)
    """Generator Adam betas."""
    attention: float = 250.0
    """Weight beta of the attention term (worth about 2 points, says the source)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "adv")
        not_negative(self, "attention")


class ZSKT(GeneratorLoop):
    """Train a generator where teacher and student disagree, and the student on the same latents until they agree.

    With D = mean_i KL(softmax(t_i) || softmax(s_i)) / K:
    Generator:  L_G = -adv D, one step.
    Student:    L_S = D + beta sum_l mean (A_l(s) - A_l(t))^2, `kd_steps` steps, where A_l is the flattened mean over
    the channels of the squared activations of stage l, normalised to length 1.
    One cycle has one batch of latents. Each call makes the images anew with the generator in train mode (after its
    update), while teacher logits and maps are those of the first student call. Both networks stay in train mode.
    `--curriculum easy2hard` weighs each sample's KL by how far the student is (the attention term stays a mean). Its
    ramp scales the generator's only term, to which Adam is indifferent: easy-to-hard acts through the weights alone.

    Shapes: latents (B, nz) -> images (B, C, H, W), centred on the teacher's normalised space (generator zskt) or in
        [0, 1]; logits (B, K); maps (B, C, h, w).
    Source: Micaelli & Storkey, "Zero-shot knowledge transfer via adversarial belief matching" (NeurIPS 2019, arXiv
        1905.09768); polo5/ZeroShotKnowledgeTransfer@e24915d `solver.py`, `utils/loaders.py`.
    Differs from source: the source reads the three groups of a wide residual network; here any two networks are
        compared at the last stage of every spatial size that both have (for these the same three; LeNet-5 has two).
        The source lets the student's gradients run into the generator and drops them; here they are not taken. Away
        from T = 1 the KL carries T^2. The arithmetic of a cycle is equal (golden cases zskt_losses, zskt_cycle). The
        benchmark form of zju-vipa/CMI (KL batchmean, SGD, no attention, fresh latents) is `dfq` with bn, oh and
        balance 0.
    Cost: per cycle one forward/backward of generator, teacher and student, one forward of the teacher, and `kd_steps`
        forwards of the generator and forward/backwards of the student.
    """

    requires: ClassVar[Requires] = Requires(teacher=True)
    Config: ClassVar[type] = ZSKTConfig
    config: ZSKTConfig
    student_always_trains: ClassVar[bool] = True
    generator_always_trains: ClassVar[bool] = True

    def __init__(self, config: ZSKTConfig, task: Task):
        super().__init__(config, task)
        self._z: Tensor | None = None  # latents of the running cycle
        self._taught: tuple[Tensor, Maps] | None = None  # what the teacher said in it
        self.attention = config.attention
        if self.attention and not self._common_stages():
            self.attention = 0.0
            if task.warn:
                task.warn("teacher and student have no feature maps of equal size: the attention term is off")

    def _common_stages(self) -> set[tuple[int, ...]]:
        student = self.student_view.module
        student.eval()
        with torch.no_grad():
            blank = torch.zeros(1, *self.teacher.input_size, device=self.device)
            found = [set(stage_maps(view, blank)[1]) for view in (self.teacher, self.student_view)]
        student.train()
        return found[0] & found[1]

    def rate(self, kind: str, start: float, epoch: int, lowest: float = 0.0) -> float:
        """The cosine moves with every cycle, not with the epochs."""
        if kind != "cosine":
            return super().rate(kind, start, epoch, lowest)
        return lowest + 0.5 * (start - lowest) * (1 + math.cos(math.pi * self.step / self.total_steps))

    def latents(self, n: int, rng: torch.Generator) -> Tensor:
        """Those of the cycle for generator and student, fresh ones for the bank."""
        return self._z if self._z is not None and rng is self.noise else super().latents(n, rng)

    def run_cycle(self, steps: int) -> None:
        """The order of the base on one batch of latents."""
        self._z = self.latents(self.config.batch_size, self.noise)
        super().run_cycle(steps)
        self._z = self._taught = None

    def generator_terms(self, images: Tensor) -> dict[str, Tensor]:
        """The adversary alone: -D."""
        teacher, student = widened(self.teacher(images)), widened(self.student_view(images))
        weight = self.adversarial_weight(self.epoch) / teacher.shape[1]
        return {"adversarial": weight * adversarial_kl(student, teacher, self.config.adv_T)}

    def distil(self, images: Tensor) -> Distilled:
        """D of the cycle's first teacher logits, and the attention term."""
        with self.task.runtime.autocast():
            teacher, goal = self._taught or self._teach(images)
            student, maps = stage_maps(self.student_view, images) if self.attention else (self.student_view(images), {})
        student = widened(student)
        per_sample = self.kd_per_sample(student, teacher)
        loss = self.student_loss(per_sample) / teacher.shape[1]
        for size in (size for size in maps if size in goal):
            loss = loss + self.attention * attention_gap(maps[size], goal[size])
        return Distilled(teacher, student, per_sample, loss)

    def _teach(self, images: Tensor) -> tuple[Tensor, Maps]:
        with torch.no_grad():
            teacher, goal = stage_maps(self.teacher, images) if self.attention else (self.teacher(images), {})
        if self._z is not None:
            self._taught = widened(teacher), goal
        return widened(teacher), goal


def attention_gap(student: Tensor, teacher: Tensor) -> Tensor:
    """mean (A(s) - A(t))^2 over samples and places; maps (B, C, h, w) of equal B, h, w, any two numbers of channels."""
    ours, goal = (F.normalize(widened(m).square().mean(1).flatten(1), dim=1) for m in (student, teacher))
    return F.mse_loss(ours, goal)


def stage_maps(view: ModelView, images: Tensor) -> tuple[Tensor, Maps]:
    """Logits (B, K) of images (B, C, H, W), and the last stage output (B, C, h, w) of every spatial size above 1x1.

    Stages are the network's `tap_points`; a network without them is watched at all its modules.
    """
    network, maps = view.module, {}
    points: Any = getattr(network, "tap_points", None)
    stages = [network.get_submodule(name) for name in points] if points else [*network.modules()][1:]

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.ndim == 4 and output.shape[2:].numel() > 1:
            maps[tuple(output.shape[2:])] = output  # a later stage of this size takes the place of an earlier one

    handles = [stage.register_forward_hook(keep) for stage in stages]
    try:
        return view(images), maps
    finally:
        for handle in handles:
            handle.remove()
