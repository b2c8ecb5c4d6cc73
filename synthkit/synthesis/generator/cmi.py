"""CMI: contrastive model inversion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from synthkit.errors import ConfigError
from synthkit.lazy import F, torch
from synthkit.synthesis.base import Requires, Task, load_optimizer_state, optimizer_state, seeded_init, widened
from synthkit.synthesis.generator.config import PoolConfig, at_least_one, not_negative, positive
from synthkit.synthesis.generator.features import FeatureBank, instance_means, tap_layers
from synthkit.synthesis.generator.inverting import Best, inversion_terms, latents, new_generator, targets
from synthkit.synthesis.generator.pool import PoolLoop

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

LOCAL_AREA = 0.25
"""Smallest area of a local view."""


@dataclass(frozen=True, kw_only=True)
class CMIConfig(PoolConfig):
    """CMI; the defaults are the published WRN-40-2 -> WRN-16-1 run on CIFAR-10 from scratch."""

    epochs: int = 200
    """Epochs of `ep_steps` student steps; the ramp and the learning rate move per epoch."""
    batch_size: int = 128
    """Images of the memory bank per student step."""
    adv: float = 0.5
    """Weight of the decision adversary; its start under a curriculum with a ramp."""
    adv_T: float = 1.0
    """Temperature of the adversary."""
    bn: float = 1.0
    """Weight of the BatchNorm-statistics term; off for teachers without BatchNorm."""
    oh: float = 1.0
    """Weight of the cross-entropy to the target class."""
    cr: float = 0.8
    """Weight of the contrastive term (0 leaves it out)."""
    cr_T: float = 0.1
    """Temperature of the contrastive term."""
    negatives: int = 4096
    """Rows of the feature bank that take part in an iteration."""
    bank_size: int = 40_960
    """Rows of the feature bank (two feature vectors each, float32, on the CPU; part of the state of a run)."""
    head_dim: int = 256
    """Width of the projection in which images are told apart."""
    taps: Literal["bn", "stages"] = "bn"
    """Features: spatial means of the inputs of every BatchNorm, or of every stage (published: stages for ResNet-34)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "negatives", "head_dim")
        positive(self, "cr_T")
        not_negative(self, "cr")
        if self.bank_size < self.synthesis_batch:
            raise ConfigError(
                "method.bank_size must hold the features of one call at least",
                got=self.bank_size,
                hint=f"use {self.synthesis_batch} (method.synthesis_batch) or more",
            )


class CMI(PoolLoop):
    """Invert the teacher batch by batch; images must be told apart from each other and from those of earlier calls.

    Every call starts a new generator G and new latents z for sorted uniform targets y and descends, with one Adam over
    G and z, L = bn L_BN + oh CE(t(g), y) + a L_adv + cr L_cr. g is the global view of the image (shift and flip), l the
    local one (a part of at least a quarter of the area, flip); L_adv = -mean_i 1[argmax s_i = argmax t_i]
    KL(softmax t_i || softmax s_i) on g. With h(x) the spatial means of the tapped inputs, p a small MLP onto the unit
    sphere (its own Adam lives through all calls) and N' earlier pairs (l, g) from the feature bank,
    L_cr = mean_new(c) + mean_earlier(c), c_i = -log softmax_j(p(h(l_i)) . stopgrad p(h(g_j)) / cr_T)_i over all N + N'.
    The images with the lowest L of the call enter the memory, their features the bank. The student minimises
    T^2 KL(softmax(t/T) || softmax(s/T)) on crops and flips of the memory.
    `--curriculum easy2hard` ramps a and weighs the student's samples.

    Shapes: z (S, nz) -> images (S, C, H, W) in [0, 1]; h (S, D), D the sum of the tapped channels.
    Source: Fang et al., "Contrastive Model Inversion for Data-Free Knowledge Distillation" (IJCAI 2021, arXiv
        2105.08584); zju-vipa/CMI@9e79fa9 `datafree/synthesis/contrastive.py` (golden cases cmi_*).
    Differs from source: a bank that is exactly full offers all its rows (the released one offers none in that one call,
        whose loss is then NaN, so that the images of its first iteration are kept); a bank of any size wraps around
        (there it must be a multiple of the batch); the memory is drawn from with replacement; local views are cut and
        resampled as torchvision does it (there by kornia); the published start from
        50,000 images inverted without adversary is `warmup`. The code, and this file, taps inputs of layers, where its
        comments speak of outputs; a teacher without BatchNorm is tapped at the inputs of all convolutions and linear
        layers but the first (no published form).
    Cost: per iteration one forward/backward of generator, teacher (twice, to its input) and, while a > 0, student; the
        bank holds 2 D floats a row: 8 D `bank_size` bytes of CPU memory and of every stored state.
    """

    requires: ClassVar[Requires] = Requires(teacher=True)
    Config: ClassVar[type] = CMIConfig
    config: CMIConfig

    def __init__(self, config: CMIConfig, task: Task):
        super().__init__(config, task)
        self.taps = tap_layers(self.teacher, config.taps)
        with torch.no_grad(), instance_means(self.taps) as means:
            self.teacher(torch.zeros(1, *self.teacher.input_size, device=self.device))
            width = means().shape[1]
        head = seeded_init(lambda: contrast_head(width, config.head_dim), task.seed_of("head-init"))
        self.head = head.to(self.device)
        self.optimizer_head = torch.optim.Adam(self.head.parameters(), lr=config.lr_g, fused=self.fused)
        self.bank = FeatureBank(config.bank_size, 2 * width)

    def synthesise(self, call: int) -> tuple[Tensor, Tensor]:
        """The images with the lowest loss of a call from nothing, and their targets in ascending order."""
        config = self.config
        generator = new_generator(self, f"call-{call}-generator", normal=True)
        z, labels = latents(self, call, generator.latent_shape), targets(self, call).sort().values
        views, rows = self.views(call), self.task.rng(f"call-{call}-negatives", "cpu")
        optimizer = torch.optim.Adam(
            [*generator.parameters(), z], lr=config.lr_g, betas=config.betas_g, fused=self.fused
        )
        weight, best = self.adversarial_weight(self.epoch), Best()
        for _ in range(config.g_steps):
            with self.task.runtime.autocast():
                images = generator(z)
                terms, features = self.terms(*views(images), labels, weight)
            if features is not None:
                known = self.bank.draw(config.negatives, rows).to(self.device)
                terms["contrast"] = config.cr * contrastive_loss(self.head, *features, known, config.cr_T)
            loss = torch.stack(list(terms.values())).sum()
            best.offer(loss, images, *(features or ()))
            optimizer.zero_grad(set_to_none=True)
            self.optimizer_head.zero_grad(set_to_none=True)
            loss.backward()
            self._clip(generator)
            optimizer.step()
            self.optimizer_head.step()
            self.note_generator(terms, loss)
        images, *found = best.kept
        if found:
            self.bank.add(torch.cat(found, 1))
        return images, labels

    def views(self, call: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Function that draws a global and a local view of the same images (S, C, H, W), differentiable."""
        from synthkit.data.augment import augment
        from synthkit.synthesis.inversion.views import draw_views

        whole, part = self.task.rng(f"call-{call}-views"), self.task.numpy_rng("local-views", call)

        def draw(images: Tensor) -> tuple[Tensor, Tensor]:
            size = (images.shape[2], images.shape[3])
            local = draw_views(part, len(images), size, flip="flip" in self.config.views, smallest=LOCAL_AREA)
            return augment(images, self.config.views, whole), local(images)

        return draw

    def terms(
        self, whole: Tensor, part: Tensor, labels: Tensor, weight: float
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None]:
        """The inversion terms, all of the global view, and features (S, D) of the local and global one."""
        with instance_means(self.taps) as means:
            look = self.look(whole)
            features = None
            if self.config.cr:
                of_whole = means().detach()  # it is a key only: the contrast moves the local view
                self.teacher(part)
                features = means(), of_whole
        student = widened(self.student_view(whole)) if weight else None
        return inversion_terms(self.config, look.logits, labels, look.bn, student, weight), features

    def extra_state(self) -> dict[str, Any]:
        """Head, its optimiser and the feature bank; the generator lives for one call only."""
        return {
            "head": dict(self.head.state_dict()),
            "optimizer_head": optimizer_state(self.optimizer_head),
            "bank": self.bank.state(),
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Inverse of `extra_state`."""
        self.head.load_state_dict(state["head"])
        load_optimizer_state(self.optimizer_head, state["optimizer_head"])
        self.bank.load(state["bank"])

    def estimate(self) -> dict[str, float]:
        """As of every pool, with the feature bank where the run's memory is the CPU's."""
        found = super().estimate()
        if self.device.type == "cpu":
            found["memory_bytes"] += self.bank.rows.nbytes
        return found


def contrast_head(features: int, width: int) -> nn.Module:
    """Linear(D, D), ReLU, Linear(D, width)."""
    nn = torch.nn
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, width))


def contrastive_loss(head: nn.Module, local: Tensor, whole: Tensor, known: Tensor, T: float) -> Tensor:
    """L_cr of new features (N, D) of local and global views and of earlier rows (N', 2 D): local, then global.

    The means over the new and over the earlier images are added, so that the new ones' gradient does not shrink with
    the number of earlier ones. No gradient reaches the global features, nor the head through them.
    """
    known_local, known_whole = known.to(local.dtype).chunk(2, dim=1)
    queries = F.normalize(head(torch.cat([local, known_local])), dim=1)
    with torch.no_grad():
        keys = F.normalize(head(torch.cat([whole, known_whole])), dim=1)
    own = torch.arange(len(queries), device=queries.device)
    losses = F.cross_entropy(queries @ keys.T / T, own, reduction="none")
    return losses[: len(local)].mean() + (losses[len(local) :].mean() if len(known) else 0.0)
