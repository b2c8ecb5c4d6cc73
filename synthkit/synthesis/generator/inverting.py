"""What methods share that invert a teacher batch by batch through a generator with learnable latents (CMI, FastDFKD).

Source: zju-vipa/CMI@9e79fa9 `datafree/synthesis/contrastive.py`, zju-vipa/Fast-Datafree@0dcecbc
`datafree/synthesis/fast_meta.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from synthkit.lazy import torch
from synthkit.synthesis.losses import masked_adversarial_kl, one_hot_loss

if TYPE_CHECKING:
    from torch import Tensor

    from synthkit.models.generators import Generator
    from synthkit.synthesis.generator.pool import PoolLoop


class Best:
    """What came with the lowest loss so far: copies, chosen on the device so that no iteration waits for it."""

    def __init__(self) -> None:
        self.loss: Tensor | None = None
        self.kept: tuple[Tensor, ...] = ()

    def offer(self, loss: Tensor, *tensors: Tensor) -> None:
        """Keep `tensors` where `loss` is lower than every one before (the first offer is always kept)."""
        loss = loss.detach()
        if self.loss is None:
            self.loss, self.kept = loss.clone(), tuple(t.detach().clone() for t in tensors)
            return
        better = loss < self.loss
        self.loss = torch.where(better, loss, self.loss)
        self.kept = tuple(torch.where(better, new.detach(), old) for new, old in zip(tensors, self.kept, strict=True))


def new_generator(loop: PoolLoop, stream: str, *, normal: bool = False) -> Generator:
    """The configured generator in train mode on the run's device, its weights drawn from the stream called `stream`.

    Args:
        normal: all weights from N(0, 0.02) (BN: N(1, 0.02), biases 0) instead of the generator's own initialisation.
    """
    from synthkit.models.generators import build_generator

    config, teacher, seed = loop.config, loop.teacher, loop.task.seed_of(stream)
    channels, side, _ = teacher.input_size
    generator = build_generator(
        config.generator,
        latent_dim=config.nz,
        image_size=side,
        channels=channels,
        width=config.width,
        mean=teacher.mean,
        std=teacher.std,
        seed=seed,
    )
    if normal:
        generator.reset(seed=seed)
    if loop.task.runtime.channels_last:
        generator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stub lacks the keyword
    return generator.to(loop.device).train()


def latents(loop: PoolLoop, call: int, shape: tuple[int, ...]) -> Tensor:
    """Learnable z ~ N(0, I) of one call, (S, *shape)."""
    draw = loop.task.rng(f"call-{call}-latents")
    return torch.randn(loop.config.synthesis_batch, *shape, generator=draw, device=loop.device).requires_grad_()


def targets(loop: PoolLoop, call: int) -> Tensor:
    """Uniform classes of one call, (S,) int64."""
    draw = loop.task.rng(f"call-{call}-targets")
    size = (loop.config.synthesis_batch,)
    return torch.randint(0, loop.teacher.num_classes, size, generator=draw, device=loop.device)


def inversion_terms(
    config: Any, logits: Tensor, labels: Tensor, bn: Tensor | None, student: Tensor | None, adversarial: float
) -> dict[str, Tensor]:
    """Weighted terms oh CE(t, y) + bn L_BN - a mean_i 1[argmax s_i = argmax t_i] KL(softmax t_i || softmax s_i).

    Args:
        config: weights `oh` and `bn`, temperature `adv_T` (published: 1).
        logits: (S, K) of the teacher.
        labels: (S,) targets.
        bn: scalar BN-statistics loss, or none.
        student: (S, K) logits of the same images; none leaves the adversary out.
        adversarial: its weight a.
    """
    terms = {"one_hot": config.oh * one_hot_loss(logits, labels)}
    if bn is not None:
        terms["bn"] = config.bn * bn
    if student is not None:
        terms["adversarial"] = adversarial * masked_adversarial_kl(student, logits, config.adv_T)
    return terms
