"""ZSKD: zero-shot knowledge distillation by data impressions of Dirichlet soft targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from synthkit.errors import ConfigError
from synthkit.lazy import F, np, torch
from synthkit.synthesis.base import load_optimizer_state, optimizer_state
from synthkit.synthesis.generator.pixels import PixelConfig, PixelLoop

if TYPE_CHECKING:
    from torch import Tensor

FLOOR = 1e-4
"""Added to every concentration: a Dirichlet parameter must be positive."""


@dataclass(frozen=True, kw_only=True)
class ZSKDConfig(PixelConfig):
    """ZSKD; the defaults are the authors' data impressions (40,000 of them for CIFAR-10)."""

    form: Literal["original", "seed"] = "original"
    """Fresh pixels for every batch, or the form of ljrprocc/DataFree: one batch carried from class to class."""
    betas: tuple[float, ...] = (1.0, 0.1)
    """Scales of the Dirichlet concentration, in equal shares of the images (form original)."""
    synthesis_batch: int = 100
    """Images per synthesis call."""
    g_steps: int = 1500
    """Iterations per synthesis call (form seed: per class)."""
    lr_g: float = 1e-3
    """Adam's rate: in [0, 1] pixels (original), in normalised pixels (seed: 2 or 3)."""
    betas_g: tuple[float, float] = (0.9, 0.999)
    """Adam betas of the pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.betas or min(self.betas) <= 0:
            raise ConfigError("method.betas must be positive scales", got=self.betas)


class ZSKD(PixelLoop):
    """Optimise noise towards soft targets drawn from a Dirichlet around each class, then distil on the images.

    Concentration of class c: C = cosine similarity of the rows of the last linear layer, scaled to [0, 1] over all
    entries; original: alpha_c = beta (C_c - min C_c) / (max C_c - min C_c) + 1e-4, beta in {1, 0.1}; seed:
    alpha_c = C_c / 0.1 + 1e-4. Targets y ~ Dir(alpha_c).
    Pixels:   L = T^2 KL(y || softmax(t(x) / T)), Adam.  Student: mean_i v_i T^2 KL(softmax(t/T) || softmax(s/T)).
    --curriculum easy2hard weighs the student's samples (v); there is no adversary, so no ramp. `auto` is none.

    Shapes: pixels (S, C, H, W), targets (S, K). Labels are the teacher's argmax: the top of a target often is another
        class than the one that it was drawn around.
    Source: Nayak et al., "Zero-Shot Knowledge Distillation in Deep Networks" (ICML 2019, arXiv 1905.08114),
        vcl-iisc/ZSKD@54c855f `di_generation`; form seed: ljrprocc/DataFree@bf3096b `datafree/synthesis/zskd.py`.
    Differs from source: (original, the default) every batch starts from its own noise, as the paper's algorithm does;
        the authors' code goes on from the pixels and Adam moments of the batch before within each class. Their code
        scales rows to [0, 1] after the factor 0.1, which undoes it, so that beta is 1 throughout; here beta counts, as
        in the paper (`betas [1]` is the code). A batch holds all classes in turn instead of one, which changes nothing
        but the range that a batch is rescaled to. T^2 before the KL and its constant are the seed's; Adam does not see
        them. (seed) any last linear layer will do, not only one called `linear`; 8-bit bytes are stored, clamped to
        [0, 1], and normalised once (the seed normalises its pool twice).
    Cost: per iteration one forward and backward of the teacher, to its input.
    """

    Config: ClassVar[type] = ZSKDConfig
    config: ZSKDConfig

    def __init__(self, config: ZSKDConfig, task):
        super().__init__(config, task)
        similarity = class_similarity(self.teacher.classifier.weight.detach())
        self.concentration = seed_concentration(similarity) if config.form == "seed" else row_scaled(similarity)
        self.carried: Tensor | None = None
        self.optimizer_x: torch.optim.Optimizer | None = None

    def synthesise(self, call: int) -> tuple[Tensor, Tensor | None]:
        """A batch of data impressions."""
        return (self._impressions(call) if self.config.form == "original" else self._carry(call)), None

    def targets(self, call: int) -> Tensor:
        """Soft targets (S, K) of a call."""
        c, classes = self.config, self.teacher.num_classes
        if c.form == "seed":
            return self._dirichlet(self.concentration[[call % classes] * c.synthesis_batch], call)
        rows = torch.arange(call * c.synthesis_batch, (call + 1) * c.synthesis_batch)
        scales = torch.tensor(c.betas, dtype=torch.float64)[rows // classes % len(c.betas)]
        return self._dirichlet(self.concentration.double().cpu()[rows % classes] * scales[:, None] + FLOOR, call)

    def _dirichlet(self, alpha: Tensor, call: int) -> Tensor:
        """One draw per row: gamma variates over their sum, in float64, the same on every device."""
        drawn = self.task.numpy_rng("targets", call).standard_gamma(alpha.double().cpu().numpy())
        drawn = drawn / drawn.sum(1, keepdims=True)
        return torch.from_numpy(drawn.astype(np.float32)).to(self.device)

    def _impressions(self, call: int) -> Tensor:
        targets, pixels = self.targets(call), self.fresh(call, torch.rand)
        optimizer = self.adam(pixels)
        for _ in range(self.config.g_steps):
            rescale_(pixels)
            self._towards(targets, pixels, optimizer)
        return pixels.detach().clamp(0, 1)

    def _carry(self, call: int) -> Tensor:
        """The next class of the round: the pixels and the Adam of the class before are carried on."""
        targets = self.targets(call)
        first = call % self.teacher.num_classes == 0
        if first or self.carried is None or len(self.carried) != len(targets):
            self._start_from(self.fresh(call, torch.randn))
        pixels, optimizer = self.carried, self.optimizer_x
        assert pixels is not None and optimizer is not None  # started just now, or by an earlier call
        for iteration in range(self.config.g_steps):
            self._towards(targets, self.to_pixels(self.view(pixels, call, iteration)), optimizer)
        return self.to_pixels(pixels.detach()).clamp(0, 1)

    def _start_from(self, pixels: Tensor) -> torch.optim.Optimizer:
        self.carried, self.optimizer_x = pixels, self.adam(pixels)
        return self.optimizer_x

    def _towards(self, targets: Tensor, images: Tensor, optimizer: torch.optim.Optimizer) -> None:
        with self.task.runtime.autocast():
            logits = self.look(images).logits
        self.descend(optimizer, {"target": impression_loss(logits, targets, self.config.T)})

    def extra_state(self) -> dict[str, Any]:
        """The carried pixels and their Adam (form seed)."""
        if self.carried is None or self.optimizer_x is None:
            return {}
        return {"pixels": self.carried.detach(), "adam": optimizer_state(self.optimizer_x)}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Inverse of `extra_state`."""
        self.carried = self.optimizer_x = None
        if state:
            memory = torch.channels_last if self.task.runtime.channels_last else torch.contiguous_format
            pixels = state["pixels"].to(self.device, copy=True).contiguous(memory_format=memory)
            load_optimizer_state(self._start_from(pixels.requires_grad_()), state["adam"])


def class_similarity(weight: Tensor) -> Tensor:
    """C (K, K): cosine similarity of the rows of a classifier weight (K, D), scaled to [0, 1] over all entries."""
    rows = F.normalize(weight, dim=1)
    return _unit(rows @ rows.T)


def row_scaled(similarity: Tensor) -> Tensor:
    """Every row of C scaled to [0, 1]: the concentrations of beta 1."""
    low, high = similarity.amin(1, keepdim=True), similarity.amax(1, keepdim=True)
    return (similarity - low) / (high - low)


def seed_concentration(similarity: Tensor) -> Tensor:
    """C / 0.1 + 1e-4, the concentrations of the seed."""
    return similarity / 0.1 + FLOOR


def impression_loss(logits: Tensor, targets: Tensor, T: float) -> Tensor:
    """T^2 KL(y || softmax(t / T)), the mean over the batch; logits and targets (B, K)."""
    return F.kl_div(F.log_softmax(logits / T, dim=1), targets, reduction="batchmean") * T * T


def rescale_(pixels: Tensor) -> None:
    """Stretch a batch of pixels to exactly [0, 1], in place."""
    with torch.no_grad():
        low, high = pixels.aminmax()
        pixels.sub_(low).div_(high - low)


def _unit(values: Tensor) -> Tensor:
    return (values - values.min()) / (values.max() - values.min())
