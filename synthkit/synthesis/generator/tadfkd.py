"""TA-DFKD: the teacher as a lenient expert who only picks the clean images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from synthkit.errors import ConfigError
from synthkit.lazy import F, torch
from synthkit.synthesis.base import widened
from synthkit.synthesis.generator.config import GeneratorConfig, not_negative
from synthkit.synthesis.generator.loop import GeneratorLoop
from synthkit.synthesis.losses import adversarial_js
from synthkit.synthesis.priors import l2_batch, tv_l2

if TYPE_CHECKING:
    from torch import Tensor

MAX_DRAWS = 50
"""Batches that one student step may draw before it takes what was kept so far."""
KMEANS_STEPS, EM_STEPS, EM_TOLERANCE, VARIANCE_FLOOR = 300, 10, 1e-2, 5e-4


@dataclass(frozen=True, kw_only=True)
class TADFKDConfig(GeneratorConfig):
    """TA-DFKD; the defaults are the released ResNet-34 -> ResNet-18 run on CIFAR."""

    epochs: int = 200
    """Epochs of `ep_steps` student steps; the ramp and the learning rate move per epoch."""
    ep_steps: int = 360
    """Student steps per epoch (36 cycles)."""
    batch_size: int = 32
    """Images per draw and per student step; a mixture is fitted to every draw."""
    lr: float = 0.01
    """Student learning rate."""
    weight_decay: float = 5e-4
    """Weight decay of the student."""
    loss: Literal["l1", "kl", "l2"] = "l1"
    """KD loss of the student, and the difficulty of an image: mean |s - t|, T^2 KL at T, or mean (s - t)^2."""
    betas_g: tuple[float, float] = (0.9, 0.999)
    """Generator Adam betas."""
    generator: str = "tadfkd"
    """Generator network (models.generators)."""
    nz: int = 1000
    """Latent dimension."""
    adv: float = 1.0
    """Weight of the adversary; its start under a curriculum with a ramp."""
    bn: float = 10.0
    """Weight of the BatchNorm-statistics term; off for teachers without BatchNorm."""
    tv: float = 1.5e-5
    """Weight of the total variation."""
    l2: float = 6e-3
    """Weight of the norm of the images."""
    selection: float = 0.5
    """Probability of being clean above which an image is kept."""
    augment: str = "crop_flip"
    """Augmentation of the images that student and adversary see (data.policies)."""

    def __post_init__(self) -> None:
        from synthkit.data.policies import POLICIES

        super().__post_init__()
        not_negative(self, "tv", "l2")
        if self.batch_size < 2:
            raise ConfigError("method.batch_size must be at least 2, for two clusters", got=self.batch_size)
        if not 0 <= self.selection < 1:
            raise ConfigError("method.selection must be in [0, 1)", got=self.selection)
        if self.augment not in POLICIES:
            raise ConfigError("method.augment: no such policy", got=self.augment, allowed=POLICIES)


class TADFKD(GeneratorLoop):
    """Train generator and student on the images of which the teacher is sure, without a class prior.

    Kept:       c_i = CE(t_i, argmax t_i) of the plain images, scaled to [0, 1] over the draw, is modelled by two
                Gaussians; image i is kept where the lower one has p(clean | c_i) > `selection`.
    Generator:  adv (1 - clamp(J, 0, 1)) + bn L_BN + tv TV(x) + l2 ||x||_2: J (a mean over classes too, at T = 3) and
                L_BN of the kept images, the priors of all; x augmented and normalised.
    Student:    mean_i |s_i - t_i| on augmented images, drawn until `batch_size` are kept.
    With easy2hard the adversary grows by `grad_adv` per epoch between `begin` and `end`, and the student's samples
    have self-paced weights; the selection stays.

    Shapes: latents (B, nz) -> images (B, C, H, W) in [0, 1]; logits (B, K); the student sees B images of several draws.
    Source: Shin and Choi, "Teacher as a lenient expert: teacher-agnostic data-free knowledge distillation" (AAAI 2024,
        arXiv 2402.12406); bigdata-inha/TA-DFKD-Official@5cb7f8a `TA-DFKD-main-CIFAR.py`, `Sample_Selection.py`.
    Differs from source: every image is cropped and flipped on its own (there a whole batch alike); the k-means before
        the mixture starts from the two halves of the losses (there from random centres, which may end in a neighbouring
        split; the fit is that of golden case tadfkd_selection); at least two images of a draw are kept, one draw may be
        enough (there two at least) and a step draws 50 at most; the learning rate starts at `lr` (there the schedule
        has moved once before the first epoch); teacher and, while the generator learns, student are frozen. As there,
        both networks stay in train mode and the student learns first in every cycle. The bank's images are not
        selected and come from a generator in eval mode.
    Cost: per student step about two generator and three teacher forwards more than without selection; per generator
        step one teacher forward more.
    """

    Config: ClassVar[type] = TADFKDConfig
    student_always_trains: ClassVar[bool] = True
    generator_always_trains: ClassVar[bool] = True
    config: TADFKDConfig

    def run_cycle(self, steps: int) -> None:
        """Student first, then generator."""
        self.set_modes(generating=False)
        for _ in range(steps):
            self.student_step()
            self.step += 1
        self.set_modes(generating=True)
        for _ in range(self.config.g_steps):
            self.generator_step()

    def select(self, images: Tensor) -> Tensor:
        """Which of the plain images (B, C, H, W) are clean: (B,) bool."""
        with torch.no_grad():
            logits = widened(self.teacher(images))
        return select_clean(F.cross_entropy(logits, logits.argmax(1), reduction="none"), self.config.selection)

    def _augmented(self, images: Tensor) -> Tensor:
        from synthkit.data.augment import augment

        return augment(images, self.config.augment, self.noise)

    def student_images(self) -> Tensor:
        """`batch_size` kept images, augmented."""
        kept: list[Tensor] = []
        wanted = self.config.batch_size
        for _ in range(MAX_DRAWS):
            plain = super().student_images()
            with self.task.runtime.autocast():
                chosen = self.select(plain)
            kept.append(self._augmented(plain)[chosen][:wanted])
            wanted -= len(kept[-1])
            if wanted == 0:
                break
        else:
            if self.task.warn:
                self.task.warn(
                    f"sample selection kept {self.config.batch_size - wanted} of {MAX_DRAWS * self.config.batch_size}"
                    " images for a student step; lower --method.selection"
                )
        return torch.cat(kept)

    def generator_terms(self, images: Tensor) -> dict[str, Tensor]:
        """The weighted terms of the generator loss."""
        chosen = self.select(images.detach())
        augmented = self._augmented(images)
        seen = self.look(augmented[chosen])
        student = widened(self.student_view(augmented[chosen]))
        adversary = adversarial_js(student, seen.logits, self.config.adv_T, mean="element")
        fake = widened(self.teacher.normalize(augmented))
        return tadfkd_terms(self.config, fake, seen.bn, adversary, self.adversarial_weight(self.epoch))


def tadfkd_terms(
    config: TADFKDConfig, fake: Tensor, bn_loss: Tensor | None, adversary: Tensor, weight: float
) -> dict[str, Tensor]:
    """Weighted terms from augmented normalised images (B, C, H, W) and the scalar BN loss and adversary."""
    terms = {"adversarial": weight * adversary, "tv": config.tv * tv_l2(fake), "l2": config.l2 * l2_batch(fake)}
    if bn_loss is not None:
        terms["bn"] = config.bn * bn_loss
    return terms


def select_clean(losses: Tensor, threshold: float) -> Tensor:
    """(B,) bool: probably clean by `clean_probability`, and the two lowest losses in any case (BatchNorm needs two)."""
    chosen = clean_probability(losses) > threshold
    chosen[losses.topk(2, largest=False).indices] = True
    return chosen


def clean_probability(losses: Tensor) -> Tensor:
    """p(lower Gaussian | loss) under a mixture of two fitted to losses (B,) scaled to [0, 1]; 1 where all are equal.

    EM from the clusters of k-means, at most 10 steps, until the mean log-likelihood moves by less than 0.01. Float64 on
    the CPU: the number of kept images is awaited in any case, and the many small steps are quicker there.
    """
    x = losses.detach().double().cpu()
    low, high = x.min(), x.max()
    if low == high:
        return torch.ones_like(losses)
    x = (x - low) / (high - low)
    mixture, bound = _maximise(x, _two_clusters(x)), torch.tensor(-math.inf)
    for _ in range(EM_STEPS):
        log_shares, likelihood = _expect(x, mixture)
        mixture = _maximise(x, log_shares.exp())
        if (likelihood - bound).abs() < EM_TOLERANCE:
            break
        bound = likelihood
    shares = _expect(x, mixture)[0].exp()
    return shares[:, mixture[1].argmin()].to(losses)


def _two_clusters(x: Tensor) -> Tensor:
    """One-hot (B, 2) of k-means with two centres, started from the lower and the upper half."""
    upper = torch.zeros_like(x).index_fill_(0, x.argsort()[len(x) // 2 :], 1.0)
    for _ in range(KMEANS_STEPS):
        centre = 0.5 * ((x * upper).sum() / upper.sum() + (x * (1 - upper)).sum() / (1 - upper).sum())
        moved = (x > centre).to(x.dtype)
        if moved.equal(upper):
            break
        upper = moved
    return torch.stack([1 - upper, upper], 1)


def _maximise(x: Tensor, shares: Tensor) -> Tensor:
    """Weights, means and variances, (3, 2), of responsibilities (B, 2)."""
    mass = shares.sum(0) + 10 * torch.finfo(x.dtype).eps
    mean = shares.mT @ x / mass
    variance = (shares * (x[:, None] - mean).square()).sum(0) / mass + VARIANCE_FLOOR
    return torch.stack([mass / mass.sum(), mean, variance])


def _expect(x: Tensor, mixture: Tensor) -> tuple[Tensor, Tensor]:
    """Log responsibilities (B, 2) and the mean log-likelihood."""
    weight, mean, variance = mixture
    joint = weight.log() - 0.5 * ((2 * math.pi * variance).log() + (x[:, None] - mean).square() / variance)
    likelihood = joint.logsumexp(1, keepdim=True)
    return joint - likelihood, likelihood.mean()
