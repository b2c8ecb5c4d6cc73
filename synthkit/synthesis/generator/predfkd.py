"""PRE-DFKD: data-free distillation that rehearses earlier images, re-made by a VAE instead of stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from synthkit.lazy import F, torch
from synthkit.synthesis.base import load_optimizer_state, optimizer_state, seeded_init, widened
from synthkit.synthesis.generator.config import not_negative, positive
from synthkit.synthesis.generator.loop import GeneratorLoop
from synthkit.synthesis.generator.replay import ReplayConfig, novel_terms
from synthkit.synthesis.losses import class_entropy, one_hot_loss

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PREDFKDConfig(ReplayConfig):
    """PRE-DFKD."""

    lr_memory: float = 5e-4
    """Adam learning rate of the VAE (published: lr_g / 40)."""
    lr_z: float = 0.02
    """Step of the memory's latents (published: lr_g)."""
    vae_steps: int = 4
    """Student steps of a cycle after which the VAE learns: the first so many."""
    kld: float = 1e-5
    """Weight of the VAE's KL divergence to N(0, I)."""
    leak: bool = False
    """The published code's leak: the latents' loss also moves the memory generator in the VAE step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "lr_memory", "lr_z")
        not_negative(self, "vae_steps", "kld")


class PREDFKD(GeneratorLoop):
    """Train generator and student in turn; a VAE re-makes images of earlier generators for the student to rehearse.

    Generator:  L_G = oh CE(t, argmax t) + ie sum_k p_k log10 p_k - act mean|f| + a(e) (1 - clamp(J, 0, 1)), p the mean
    of softmax(t_i), J the Jensen-Shannon divergence of ADI as a mean over elements (1/K of ADI's), t without gradient.
    Student:    L_S = mean |s - t| over fresh and rehearsed images.
    Rehearsed images M(z'): z ~ N(0, I), z' = z after one Adam step on
    L_z = oh CE(t, argmax t) + ie sum_k p_k log10 p_k + mean_d (var(z)_d - 1)^2 + mean_d mean(z)_d^2.
    VAE, on images x of half the fresh batch and of its own memory: M(mu + eps e^(lv/2)) = y with mu, lv = E(x):
    L_V = mean|y - x| + mean|t(y) - t(x)| + kld mean_i KL(N(mu_i, e^lv_i) || N(0, I)), y and x as the teacher sees them.
    `--curriculum easy2hard` raises a(e) from `adv` by `grad_adv` per epoch and weighs every sample of L_S, rehearsed
    ones included, by its self-paced weight; published: neither (auto).

    Shapes: latents (B, nz) -> images (B, C, H, W), H a multiple of 8; not clamped to [0, 1] (the bank's are).
    Source: Binici et al., "Robust and Resource-Efficient Data-Free Knowledge Distillation by Generative Pseudo Replay"
        (AAAI 2022, arXiv 2201.03019); kuluhan/PRE-DFKD@604010d `distillation.py`, `main.py`.
    Differs from source: in the released VAE step the gradient of L_z stays in the memory generator and is added to
        that of L_V (about as large as it); here it is left out, `leak` is the released form. The rest is as released:
        student and generator always in train mode, the VAE trained after the first 4 of 10 student steps, on fresh
        images alone in the first cycle, unbiased var(z). The student's images are cut from the generator's graph,
        which changes no number (the released code throws that gradient away), only cost. The spectral norms start from
        15 power iterations instead of random vectors.
    Cost: per student step a forward/backward of the memory generator and the teacher (to the latents) on B/8 images
        more than plain distillation; per VAE step two of each on 5B/8 images, and the encoder.
    """

    Config: ClassVar[type] = PREDFKDConfig
    student_always_trains: ClassVar[bool] = True
    generator_always_trains: ClassVar[bool] = True
    config: PREDFKDConfig

    def __init__(self, config: PREDFKDConfig, task):
        from synthkit.models.encoders import VAEEncoder
        from synthkit.models.generators import build_generator
        from synthkit.models.init import uniform_init

        super().__init__(config, task)
        channels, side, _ = self.teacher.input_size

        def build() -> Any:
            network = build_generator(**{**self.generator_spec, "name": "dafl"})
            uniform_init(network, 0.08)
            return network

        memory = seeded_init(build, task.seed_of("memory-init"))
        encoder = VAEEncoder(
            latent_dim=config.nz,
            image_size=side,
            channels=channels,
            width=config.width,
            seed=task.seed_of("encoder-init"),
        )
        self.memory, self.encoder = memory.to(self.device), encoder.to(self.device)
        if task.runtime.channels_last:
            for network in (self.memory, self.encoder):
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stub lacks the keyword
        self.optimizer_v = torch.optim.Adam(
            [*self.memory.parameters(), *self.encoder.parameters()], lr=config.lr_memory
        )

    def generator_terms(self, images: Tensor) -> dict[str, Tensor]:
        """The weighted terms of L_G."""
        return novel_terms(self, images)

    def student_step(self) -> Tensor:
        """One student update on fresh and rehearsed images; early in a cycle the VAE learns after it."""
        fresh = self.student_images()
        self.memory.eval()
        rehearsed, _ = self.rehearse()
        loss = self.learn(torch.cat([fresh, rehearsed]))
        if self.step % self.config.ep_steps % self.config.kd_steps < self.config.vae_steps:
            self.vae_step(fresh)
        return loss

    def rehearse(self, leak: bool = False) -> tuple[Tensor, Tensor]:
        """Images of the memory at latents improved by one step, without gradient, and L_z before it."""
        c = self.config
        z = self.latents(c.rehearsed, self.noise).requires_grad_()
        with self.task.runtime.autocast():
            logits = widened(self.teacher(self.memory(z)))
        loss = latent_loss(z, logits, c.oh, c.ie)
        slope = torch.autograd.grad(loss, z, retain_graph=leak)[0]
        if leak:
            loss.backward(inputs=list(self.memory.parameters()))
        with torch.no_grad(), self.task.runtime.autocast():
            # a fresh Adam's first step: the moments, freed of their bias, are the gradient and its square
            images = self.memory(z - c.lr_z * slope / (slope.abs() + 1e-8))
        return images, loss.detach()

    def vae_step(self, fresh: Tensor) -> Tensor:
        """One update of encoder and memory generator; returns L_V."""
        self.memory.train()
        self.optimizer_v.zero_grad(set_to_none=True)
        images = fresh[: self.config.batch_size // 2]
        if self.step >= self.config.kd_steps:  # in the first cycle the memory has nothing of its own to keep
            images = torch.cat([images, self.rehearse(self.config.leak)[0]])
        view = self.teacher
        with self.task.runtime.autocast():
            seen = view.normalize(images)
            with torch.no_grad():
                target = widened(view(images))
            mu, log_var = map(widened, self.encoder(seen))
            made = self.memory(mu + self.latents(len(mu), self.noise) * (0.5 * log_var).exp())
            pixels, logits = widened(view.normalize(made)), widened(view(made))
        loss = vae_loss(pixels, seen, logits, target, mu, log_var, self.config.kld)
        loss.backward()
        self.optimizer_v.step()
        return loss.detach()

    def extra_state(self) -> dict[str, Any]:
        """The VAE and its Adam."""
        return {
            "memory": dict(self.memory.state_dict()),
            "encoder": dict(self.encoder.state_dict()),
            "optimizer_v": optimizer_state(self.optimizer_v),
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Inverse of `extra_state`."""
        self.memory.load_state_dict(state["memory"])
        self.encoder.load_state_dict(state["encoder"])
        load_optimizer_state(self.optimizer_v, state["optimizer_v"])


def latent_loss(z: Tensor, teacher: Tensor, oh: float, ie: float) -> Tensor:
    """L_z of latents z (n, nz) whose images have teacher logits (n, K): sure, balanced, and like N(0, I) in total."""
    match = oh * one_hot_loss(teacher) - ie / math.log(10) * class_entropy(teacher)
    return match + (z.var(dim=0) - 1).square().mean() + z.mean(dim=0).square().mean()


def vae_loss(
    made: Tensor, seen: Tensor, logits: Tensor, target: Tensor, mu: Tensor, log_var: Tensor, kld: float
) -> Tensor:
    """L_V of images (B, C, H, W) made from `seen`, their teacher logits and targets (B, K), and (B, nz) parameters."""
    divergence = -0.5 * (1 + log_var - mu.square() - log_var.exp()).sum(1).mean()
    return F.l1_loss(made, seen) + F.l1_loss(logits, target) + kld * divergence
