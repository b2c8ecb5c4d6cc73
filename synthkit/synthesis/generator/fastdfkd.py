"""FastDFKD: a generator that learns to be adapted in a few steps."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from synthkit.errors import ConfigError
from synthkit.lazy import torch
from synthkit.synthesis.base import Requires, Task, load_optimizer_state, optimizer_state, widened
from synthkit.synthesis.generator.config import PoolConfig, not_negative, positive
from synthkit.synthesis.generator.inverting import Best, inversion_terms, latents, new_generator, targets
from synthkit.synthesis.generator.pool import PoolLoop

if TYPE_CHECKING:
    from torch import Tensor

    from synthkit.models.generators import Generator

REPTILE_SCALE = 67.0
"""Factor of the Reptile meta-gradient in the released code."""
RESET_STD = 0.02
"""Standard deviation of the weights that `reset_l0` draws anew."""


@dataclass(frozen=True, kw_only=True)
class FastDFKDConfig(PoolConfig):
    """FastDFKD; the defaults are the published Fast-10 run of ResNet-34 -> ResNet-18 on CIFAR-10 and CIFAR-100."""

    epochs: int = 200
    """Epochs of `ep_steps` student steps after the warm-up; the ramp and the learning rate move per epoch."""
    lr: float = 0.2
    """Student learning rate."""
    lr_min: float = 2e-4
    """Student learning rate at the end of the cosine."""
    g_steps: int = 10
    """Iterations per synthesis call: the k of "Fast-k"."""
    warmup: float = 0.0909
    """Share of the synthesis calls that are made before the student starts; the adversary starts at their last one."""
    lr_g: float = 2e-3
    """Learning rate of the adapted generator (Adam); the meta-generator's is `g_steps` times as high."""
    lr_z: float = 0.01
    """Learning rate of the latents."""
    meta: Literal["fomaml", "reptile"] = "fomaml"
    """Meta-gradient: sum of the gradients on the way, or 67 times the way back from the adapted weights."""
    adv: float = 1.33
    """Weight of the decision adversary; its start under a curriculum with a ramp."""
    adv_T: float = 1.0
    """Temperature of the adversary."""
    bn: float = 10.0
    """Weight of the BatchNorm-statistics term; off for teachers without BatchNorm."""
    bn_momentum: float = 0.9
    """Share of the statistics of earlier calls in that term."""
    oh: float = 0.5
    """Weight of the cross-entropy to the target class."""
    reset_l0: int = 140
    """Call (counted from 1) before which the first linear layer and BatchNorm are drawn anew, for diversity; 0: never.
    Published: 120 calls after the warm-up of 20, of 220."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "lr_z")
        not_negative(self, "reset_l0")
        if not 0 <= self.bn_momentum < 1:
            raise ConfigError("method.bn_momentum must be in [0, 1)", got=self.bn_momentum)


class FastDFKD(PoolLoop):
    """Adapt a meta-generator to fresh latents and targets in k steps per call, and let it learn from the way there.

    A call copies the meta-generator theta to phi_0 = theta, draws z ~ N(0, I) and uniform targets y, and makes k Adam
    steps over phi (`lr_g`) and z (`lr_z`) on L = bn L_BN + oh CE(t(x), y) + a L_adv, x = shift and flip of G(z; phi);
    L_adv = -mean_i 1[argmax s_i = argmax t_i] KL(softmax t_i || softmax s_i), off during the warm-up. In L_BN a layer's
    batch statistics m are b m_ema + (1 - b) m, where m_ema takes the last batch of every call in. Then one Adam step of
    theta (k `lr_g`) along sum_i dL/dphi_i (FOMAML) or 67 (theta - phi_k) (Reptile). The images with the lowest L enter
    the memory. The student minimises T^2 KL(softmax(t/T) || softmax(s/T)) on crops and flips of the memory.
    `--curriculum easy2hard` ramps a and weighs the student's samples.

    Shapes: z (S, nz) -> images (S, C, H, W) in [0, 1]; logits (S, K).
    Source: Fang et al., "Up to 100x Faster Data-free Knowledge Distillation" (AAAI 2022, arXiv 2112.06253);
        zju-vipa/Fast-Datafree@0dcecbc `datafree/synthesis/fast_meta.py` (golden case fastdfkd_meta).
    Differs from source: the memory is drawn from with replacement. As there: theta is never run forward, so its
        BatchNorm running statistics stay at their start (no snapshot is kept of it); `reset_l0` draws the first
        BatchNorm's weight from N(0, 0.02), not N(1, 0.02) (an earlier commit crashes at that call, issue 2); the
        adversary starts at the last call of the warm-up. The ImageNet form (spatial latents that are meta-learned too)
        is not built.
    Cost: per iteration one forward/backward of generator, teacher (to its input) and, while a > 0, student.
    """

    requires: ClassVar[Requires] = Requires(teacher=True)
    Config: ClassVar[type] = FastDFKDConfig
    config: FastDFKDConfig

    def __init__(self, config: FastDFKDConfig, task: Task):
        from synthkit.models.bn_stats import StatisticsEMA

        super().__init__(config, task)
        self.generator = new_generator(self, "generator-init")
        self.optimizer_meta = torch.optim.Adam(
            self.generator.parameters(), lr=config.lr_g * config.g_steps, betas=config.betas_g, fused=self.fused
        )
        self.ema = StatisticsEMA(config.bn_momentum)

    @property
    def warming(self) -> bool:
        """Whether the adversary is still off: up to the last call before the student starts, as published."""
        return self.called + 1 < self.warm_calls

    def synthesise(self, call: int) -> tuple[Tensor, Tensor]:
        """The images with the lowest loss of a call, and their targets; the meta-generator has learnt from it."""
        from synthkit.data.augment import augment

        config = self.config
        if call + 1 == config.reset_l0:
            reset_first_layers(self.generator, self.task.rng("reset-l0", "cpu"))
        fast = copy.deepcopy(self.generator)
        z, labels = latents(self, call, fast.latent_shape), targets(self, call)
        views = self.task.rng(f"call-{call}-views")
        optimizer = torch.optim.Adam(
            [{"params": list(fast.parameters())}, {"params": [z], "lr": config.lr_z}],
            lr=config.lr_g,
            betas=config.betas_g,
            fused=self.fused,
        )
        sums = [torch.zeros_like(p) for p in fast.parameters()]
        weight, best, statistics = self.adversarial_weight(self.epoch), Best(), None
        for _ in range(config.g_steps):
            with self.task.runtime.autocast():
                images = fast(z)
                terms, statistics = self.terms(augment(images, config.views, views), labels, weight)
            loss = torch.stack(list(terms.values())).sum()
            best.offer(loss, images)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._clip(fast)
            gradients = [p.grad for p in fast.parameters() if p.grad is not None]
            sums = [total + gradient for total, gradient in zip(sums, gradients, strict=True)]
            optimizer.step()
            self.note_generator(terms, loss)
        self.learn_to_adapt(sums, fast)
        if statistics:
            self.ema.update(statistics)
        return best.kept[0], labels

    def terms(
        self, view: Tensor, labels: Tensor, weight: float
    ) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]] | None]:
        """The inversion terms of a view (S, C, H, W), and the batch's (mean, variance) at every BatchNorm."""
        look = self.look(view, ema=self.ema)
        student = widened(self.student_view(view)) if weight else None
        return inversion_terms(self.config, look.logits, labels, look.bn, student, weight), look.statistics

    def learn_to_adapt(self, sums: list[Tensor], fast: Generator) -> None:
        """One step of the meta-generator, from the gradients (or the weights) of its adapted copy."""
        pairs = list(zip(self.generator.parameters(), fast.parameters(), strict=True))
        if self.config.meta == "reptile":
            sums = [REPTILE_SCALE * (slow.detach() - quick.detach()) for slow, quick in pairs]
        for (parameter, _), gradient in zip(pairs, sums, strict=True):
            parameter.grad = gradient
        self.optimizer_meta.step()
        self.optimizer_meta.zero_grad(set_to_none=True)

    def extra_state(self) -> dict[str, Any]:
        """Meta-generator, its optimiser and the remembered BN statistics."""
        return {
            "generator": dict(self.generator.state_dict()),
            "optimizer_meta": optimizer_state(self.optimizer_meta),
            "ema": self.ema.state(),
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Inverse of `extra_state`."""
        self.generator.load_state_dict(state["generator"])
        load_optimizer_state(self.optimizer_meta, state["optimizer_meta"])
        self.ema.load(state.get("ema", {}), self.device)


def reset_first_layers(generator: Generator, rng: torch.Generator) -> None:
    """Draw weights of the first linear layer and of the first BatchNorm from N(0, 0.02) and zero their biases."""
    nn = torch.nn
    for kind in (nn.Linear, nn.BatchNorm2d):
        layer = next((m for m in generator.modules() if isinstance(m, kind)), None)
        if layer is None:  # a generator of spatial noise has no linear layer
            continue
        with torch.no_grad():
            layer.weight.copy_(RESET_STD * torch.randn(layer.weight.shape, generator=rng))
            layer.bias.zero_()
