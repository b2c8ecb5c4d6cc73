"""LRA, learning to retain while acquiring: a meta step that keeps what a memory holds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from synthkit.lazy import torch
from synthkit.synthesis.base import widened
from synthkit.synthesis.generator.config import positive
from synthkit.synthesis.generator.mbdfkd import MBDFKD, MBDFKDConfig
from synthkit.synthesis.generator.student import Distilled

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LRAConfig(MBDFKDConfig):
    """LRA; the defaults are the published ResNet-34 -> ResNet-18 run on CIFAR-100 with the memory buffer."""

    batch_size: int = 512
    """Fresh images per student step, and images per generator step."""
    ep_steps: int = 720
    """Student steps per epoch (72 cycles)."""
    lr_inner: float = 0.9
    """Learning rate of the inner step on the fresh images."""
    released: bool = False
    """The published code's form: the inner step starts from detached weights, so retention sends no gradient."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "lr_inner")


class LRA(MBDFKD):
    """MB-DFKD whose student minimises, beside the KD loss, its loss on the memory after a step on the fresh images.

    Generator:  L_G of PRE-DFKD (`replay.replay_terms`).
    Student, x fresh images, m a memory entry:  L_S = l(theta; x and m) + l(theta'; m),
    theta' = theta - lr_inner (grad l(theta; x) + weight_decay theta), l = mean |s - t|, differentiated through the
    inner step (second order). While the memory is empty L_S = l(theta; x).
    `--curriculum easy2hard` raises the adversary's weight from `adv` by `grad_adv` per epoch and weighs every sample
    of the three losses by its self-paced weight; published: neither (auto).

    Shapes: latents (B, nz) -> images (B, C, H, W), H a multiple of 4; not clamped to [0, 1] (the bank's are).
    Source: Patel et al., "Learning to Retain while Acquiring: Combating Distribution-Shift in Adversarial Data-Free
        Knowledge Distillation" (CVPR 2023, arXiv 2302.14290); gaurav104/LRA@40a8941
        `src/agents/predfkd_meta_memory.py` (the variant with a memory buffer).
    Differs from source: in the released code the stepped copy starts from detached weights, so that l(theta'; m) is
        added to the reported loss but gives the student no gradient, and the update is that of MB-DFKD; here it is
        differentiated as the paper means it, `released` is the released form. BatchNorm statistics of the student move
        with the forward on x and m alone, as released. Otherwise as MB-DFKD (see there).
    Cost: beside MB-DFKD's student step a forward/backward on x whose graph is kept, a forward on m, and a second
        backward through both: about three times the passes of its student, two graphs of which are alive at once.
    """

    Config: ClassVar[type] = LRAConfig
    config: LRAConfig

    def distil(self, images: Tensor) -> Distilled:
        """The KD loss on fresh and recalled images, and the retention loss on the recalled ones (the rows after B)."""
        found = super().distil(images)
        fresh, recalled = images.tensor_split([self.config.batch_size])
        if not len(recalled):
            return found
        targets = found.teacher.tensor_split([self.config.batch_size])
        return replace(found, loss=found.loss + self.retention(fresh, targets[0], recalled, targets[1]))

    def retention(self, fresh: Tensor, fresh_target: Tensor, recalled: Tensor, recalled_target: Tensor) -> Tensor:
        """l(theta'; m): the loss on recalled images after the inner step on fresh ones."""
        c = self.config
        weights: dict[str, Tensor] = dict(self.student_view.module.named_parameters())
        if c.released:
            weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        inner = self._loss_at(weights, fresh, fresh_target)
        slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=not c.released)
        stepped = {
            name: weight - c.lr_inner * (slope + c.weight_decay * weight)
            for (name, weight), slope in zip(weights.items(), slopes, strict=True)
        }
        outer = self._loss_at(stepped, recalled, recalled_target)
        return outer.detach() if c.released else outer

    def _loss_at(self, weights: dict[str, Tensor], images: Tensor, target: Tensor) -> Tensor:
        """The student's loss with other weights; its BatchNorm statistics move on copies that are thrown away."""
        module = self.student_view.module
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        with self.task.runtime.autocast():
            seen = self.student_view.normalize(images)
            student = widened(torch.func.functional_call(module, {**weights, **buffers}, (seen,)))
        return self.student_loss(self.kd_per_sample(student, target))
