"""The loop that all diffusion methods share: noise, a sampler, guidance by energies, an image of an intended class.

Row r is an image of class r mod K, whatever the shard. A method says which energies bend the way (`energy`) and how
strongly (`guidance_scale`); this file owns the checkpoint, the noise, the order of steps, sizes, labels and cost.

Source of the step: classifier guidance (Dhariwal & Nichol 2021, arXiv 2105.05233) on the predicted clean image
(methods/largescale.md 5), classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598). No code was taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from synthkit.errors import NonFiniteError, RequirementError
from synthkit.lazy import F, torch
from synthkit.synthesis.base import BankFacts, ImageBatch, ImageSpec, Makes, Requires, Task, to_uint8
from synthkit.synthesis.diffusion.checkpoints import find, identity
from synthkit.synthesis.diffusion.config import DiffusionConfig
from synthkit.synthesis.diffusion.guidance import guided_noise
from synthkit.synthesis.diffusion.painter import Painter, fitted
from synthkit.synthesis.diffusion.samplers import Sampler, noise_of, prediction_of
from synthkit.synthesis.independent import IndependentLoop
from synthkit.synthesis.memory import SavedBytes

if TYPE_CHECKING:
    from torch import Tensor

ABAR_MIN = 1e-6  # below it x_0 is not to be had from a prediction of the noise

Energy = Callable[["Tensor"], "Tensor"]
"""[0, 1] images (B, C, H, W) in the size of the bank -> one scalar, which is minimised."""


class DiffusionLoop(IndependentLoop):
    """Base of the diffusion family (see the module text)."""

    requires: ClassVar[Requires] = Requires(teacher=False, shardable=True)
    makes: ClassVar[Makes] = Makes(label_kind="target")
    places: ClassVar[tuple[str, ...]] = ("model",)
    Config: ClassVar[type] = DiffusionConfig

    def __init__(self, config: Any, task: Task):
        super().__init__(config, task)
        self.layout = find(config.model, offline=config.offline)
        self.sampler = Sampler(config, self.layout.scheduler, consistency=self.layout.kind == "consistency")
        self.spec = task.image_spec
        names = self.spec.class_names or [str(number) for number in range(self.spec.num_classes)]
        self.painter = Painter(self.layout, config, names, task.runtime)
        if self.painter.warning and task.warn:
            task.warn(self.painter.warning)
        fitted(torch.zeros(1, *self.layout.image_shape), self.spec.shape)  # refuses other channels before any work
        self.device = task.runtime.device

    @classmethod
    def image_spec_for(cls, config: Any) -> ImageSpec:
        """Size and classes of what the checkpoint paints, for a bank without a teacher.

        Raises:
            RequirementError: the checkpoint knows no classes.
        """
        layout = find(config.model, offline=config.offline)
        if layout.num_classes is None:
            raise RequirementError(
                f"{layout.folder}: the model knows no classes of its own",
                hint="give a teacher, or --data for its classes",
            )
        chosen = list(config.classes or range(layout.num_classes))
        names = layout.names if layout.names and len(layout.names) == layout.num_classes else None
        half = [0.5] * layout.image_shape[0]
        return ImageSpec(
            shape=layout.image_shape,
            num_classes=len(chosen),
            mean=list(layout.card.mean) if layout.card else half,
            std=list(layout.card.std) if layout.card else half,
            class_names=[names[c] for c in chosen if 0 <= c < len(names)] if names else None,
        )

    def facts(self) -> BankFacts:
        """The checkpoint's hash is part of the bank; it was trained on real images, so the bank is not data-free."""
        about = {"kind": self.layout.kind, "network": self.layout.network["_class_name"], "sampler": self.sampler.name,
                 "first_time": float(self.sampler.times[0]), "model": self.config.model}  # fmt: skip
        if self.layout.card:
            about |= {"source": self.layout.card.source}
        note = "painted by a diffusion model that was trained on real images; it may repeat some of them"
        return BankFacts(
            identity={"checkpoint": identity(self.layout)},
            real_data_used=True,
            extra={"diffusion": about, "provenance": note},
        )

    # ---- what a method defines -------------------------------------------------------------------------------

    def energy(self, labels: Tensor, start: int) -> Energy | None:
        """What the images of the rows from `start` on, of classes `labels` (B,), are guided by; None is nothing."""
        return None

    def guidance_scale(self, start: int, count: int) -> Tensor:
        """g of every row (count,): how far a step is bent, relative to its length."""
        return torch.zeros(count)

    # ---- the loop --------------------------------------------------------------------------------------------

    @property
    def work_per_image(self) -> int:
        """Network calls."""
        return self.sampler.steps

    def make_batch(self, start: int, count: int) -> ImageBatch:
        """The rows `start` to `start + count`: sampled, quantised, and looked at by the teacher (if there is one)."""
        labels = torch.arange(start, start + count) % self.spec.num_classes
        images = to_uint8(self.sample(labels.to(self.device), start, lambda: self.advance(count)))
        logits = difficulty = None
        if self.task.teachers:
            with torch.no_grad(), self.task.runtime.autocast():
                logits = self.task.teacher(images).float()
            difficulty = F.cross_entropy(logits, labels.to(self.device), reduction="none").cpu()
            logits = logits.cpu()
        return ImageBatch(
            images=images.cpu(), labels=labels, logits=logits, difficulty=difficulty, step=start + count
        )  # fmt: skip

    def sample(self, labels: Tensor, start: int, tick: Callable[[], None] | None = None) -> Tensor:
        """Images (B, C, H, W) of classes `labels` (B,): [0, 1] up to small excursions, in the size of the bank.

        Args:
            start: the first row, which decides noise and guidance.
            tick: called after every step.

        Raises:
            NonFiniteError: an image became NaN or infinite.
        """
        seed = int(self.task.numpy_rng("noise", start).integers(2**63))
        draw = torch.Generator().manual_seed(seed)  # on the CPU, so that every device starts from the same noise
        self.sampler.restart()
        state = self.sampler.start(torch.randn(len(labels), *self.layout.state_shape, generator=draw)).to(self.device)
        times, condition = self.sampler.times.to(self.device), self.painter.condition(labels)
        energy, scale = self.energy(labels, start), self.guidance_scale(start, len(labels)).to(self.device)
        for step in range(len(times)):
            output = self.predict(state, step, times[step], condition, energy, scale)
            state = self.sampler.update(output, step, state, draw)
            if tick:
                tick()
        with torch.no_grad():
            images = fitted(self.painter.decode(state), self.spec.shape)
        if not bool(torch.isfinite(images).all()):
            raise NonFiniteError(
                f"images from row {start} on became NaN or infinite",
                hint="lower --method.guidance or --method.cfg, or use --method.spacing leading",
            )
        return images

    def predict(
        self, state: Tensor, step: int, now: Tensor, condition: Any, energy: Energy | None, scale: Tensor
    ) -> Tensor:
        """The network's prediction at step `step`, bent by the energy where there is enough signal to see by."""
        abar = self.sampler.abar[step] if self.sampler.abar else 0.0
        guide = energy is not None and abar > max(self.config.abar_min, ABAR_MIN)
        through = guide and self.config.through
        state = state.detach().requires_grad_(guide)
        with torch.set_grad_enabled(through):
            output = self.painter(self.sampler.scaled(state, step), now, condition)
        if not guide or energy is None:
            return output.detach()
        prediction = self.sampler.prediction
        with torch.enable_grad():
            noise = noise_of(output, state, abar, prediction)
            bent = guided_noise(
                state, noise if through else noise.detach(), abar, lambda clean: energy(self._seen(clean)), scale,
                normalise=self.config.normalise,
            )  # fmt: skip
        return prediction_of(bent, state.detach(), abar, prediction)

    def _seen(self, clean: Tensor) -> Tensor:
        """The predicted clean state as classifiers see it: [0, 1] images in the size of the bank."""
        return fitted(self.painter.decode(clean).clamp(0, 1), self.spec.shape)

    def estimate(self) -> dict[str, float]:
        """{"seconds", "memory_bytes"} of the whole run, from a guided step and the last look at a few images."""
        count = min(self.config.batch_size, self.task.images, 16 if self.device.type == "cpu" else 10**9)
        labels = torch.arange(count, device=self.device) % self.spec.num_classes
        last = self.sampler.steps - 1  # has the most signal, so it is guided if any is
        energy, scale = self.energy(labels, 0), self.guidance_scale(0, count).to(self.device)
        state = torch.zeros(count, *self.layout.state_shape, device=self.device)
        now, condition = self.sampler.times[last].to(self.device), self.painter.condition(labels)

        def seconds_of(work: Callable[[], Any]) -> float:
            begun = time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - begun

        self.sampler.restart()
        step = min(seconds_of(lambda: self.predict(state, last, now, condition, energy, scale)) for _ in range(2))
        with torch.no_grad():
            look = seconds_of(lambda: self.painter.decode(state))
        with SavedBytes() as counter:
            self.painter(self.sampler.scaled(state.requires_grad_(), last), now, condition)
        kept = counter.bytes * self.config.batch_size / count  # all activations; without a graph few live at a time
        weights = sum(p.numel() * p.element_size() for p in self.painter.network.parameters())
        return {
            "seconds": (step * self.sampler.steps + look) * self.task.images / count,
            "memory_bytes": weights + (kept if self.config.through and energy is not None else kept / 4),
        }
