"""What all inversion methods share: the problem that a batch of pixels is optimised for (`job.py` does the steps).

`Inverter` knows what is minimised (`terms`), the stages, the views and the classifiers. Pixels live in the first
teacher's normalised space, as in the published codes; [0, 1] is met only at the borders (start and end). A method
overrides `terms` or `plan`, or only the defaults of its config.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from synthkit.errors import ConfigError, NonFiniteError, RequirementError
from synthkit.lazy import F, torch
from synthkit.logits import ce_per_sample, kl_per_sample
from synthkit.synthesis.base import (
    ImageBatch,
    Makes,
    Requires,
    Task,
    to_uint8,
    widened,
)
from synthkit.synthesis.curriculum import crop_lower_bound
from synthkit.synthesis.inversion.config import InversionConfig
from synthkit.synthesis.inversion.job import Job, learning_rate
from synthkit.synthesis.inversion.start import RealStart, noise_start
from synthkit.synthesis.inversion.views import Views, draw_views
from synthkit.synthesis.losses import adi_divergence, adversarial_js
from synthkit.synthesis.memory import SavedBytes
from synthkit.synthesis.priors import l2_batch, l2_mean, tv_l1, tv_l2

if TYPE_CHECKING:
    from torch import Tensor

    from synthkit.models.bn_stats import BatchNormStatistics
    from synthkit.models.view import ModelView, TeacherView


@dataclass(frozen=True)
class Stage:
    """A stretch of iterations at one resolution, with an optimiser of its own."""

    first: int
    """Iteration at which it begins."""
    iterations: int
    pool: int
    """The pixels are average-pooled by it before the view is taken."""


class Inverter:
    """What is minimised over pixels x: sum_k w_k (ce CE_k + bn R_k) + priors + competition."""

    def __init__(self, config: Any, task: Task, competitor: ModelView | None = None):
        self.config, self.task, self.competitor = config, task, competitor
        self.device = task.runtime.device
        self.teachers = task.teachers
        self.weights = list(config.teacher_weights or [1 / len(self.teachers)] * len(self.teachers))
        if len(self.weights) != len(self.teachers):
            raise ConfigError(
                "method.teacher_weights: one weight per teacher",
                got=self.weights,
                hint=f"give {len(self.teachers)}, in the order of --teacher",
            )
        _, height, width = task.image_spec.shape
        self._constants: dict[Any, tuple[Tensor, Tensor]] = {}
        tiles = config.mosaic if config.init == "mosaic" else None
        self.real = None if config.init == "noise" else RealStart(task, tiles)
        self.stages = self.plan()
        if any(height % stage.pool or width % stage.pool for stage in self.stages):
            raise ConfigError("method.coarse must divide the sides of the images", got=config.coarse)
        self._check_sizes()
        self.bn_weights = [self._layer_weights(teacher) for teacher in self.teachers] if config.bn else []

    # ---- plan ------------------------------------------------------------------------------------------------

    def plan(self) -> list[Stage]:
        """The stages of a batch: coarse first, where it is asked for."""
        c = self.config
        coarse = [Stage(0, c.coarse_iterations, c.coarse)] if c.coarse_iterations else []
        return [*coarse, Stage(c.coarse_iterations, c.iterations, 1)]

    @property
    def iterations(self) -> int:
        """Iterations of a batch."""
        return sum(stage.iterations for stage in self.stages)

    def stage_of(self, t: int) -> Stage:
        """The stage that iteration `t` belongs to."""
        return next(stage for stage in reversed(self.stages) if t >= stage.first)

    def learning_rate(self, t: int) -> float:
        """Adam's rate in iteration `t`: linear warm-up, then constant or half a cosine, anew in every stage."""
        stage = self.stage_of(t)
        return learning_rate(t - stage.first, stage.iterations, self.config)

    def optimizer(self, pixels: Tensor) -> torch.optim.Optimizer:
        """A fresh optimiser of the pixels."""
        return torch.optim.Adam([pixels], lr=self.config.lr, betas=tuple(self.config.betas), fused=True)

    def views(self, start: int, count: int, t: int, size: tuple[int, int]) -> Views:
        """The draws of iteration `t` for the batch that begins at row `start`: a pure function of (seed, start, t)."""
        c = self.config
        smallest = c.crop
        if smallest is not None and self.task.curriculum.ramp:
            smallest = crop_lower_bound(t / self.iterations, c.crop_form, c.crop_milestone, c.crop)
        return draw_views(
            self.task.numpy_rng("views", start, t),
            count if c.per_image else 1,
            size,
            jitter=c.jitter // self.stage_of(t).pool,
            flip=c.flip,
            smallest=smallest,
        )

    # ---- borders ---------------------------------------------------------------------------------------------

    def constants(self, view: ModelView, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (1, C, 1, 1) of a network's normalisation."""
        key = tuple(view.mean), tuple(view.std), dtype
        if key not in self._constants:
            mean, std = (torch.tensor(v, dtype=dtype, device=self.device).view(1, -1, 1, 1) for v in key[:2])
            self._constants[key] = mean, std
        return self._constants[key]

    def bounds(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Normalised black and white, (1, C, 1, 1)."""
        mean, std = self.constants(self.teachers[0], dtype)
        return -mean / std, (1 - mean) / std

    def labels(self, start: int, count: int) -> Tensor:
        """Intended classes of the rows from `start` on: 0 to K-1 again and again, so every stretch is balanced."""
        return torch.arange(start, start + count, device=self.device) % self.task.image_spec.num_classes

    def start(self, start: int, labels: Tensor) -> Tensor:
        """First pixels (B, C, H, W) of the rows from `start` on, normalised."""
        if self.real is not None:
            mean, std = self.constants(self.teachers[0], torch.float32)
            return (self.real(start, labels).to(self.device) - mean) / std
        return noise_start(self.task, start, labels, self.config.noise).to(self.device)

    def images(self, pixels: Tensor) -> Tensor:
        """The uint8 images that normalised pixels show."""
        mean, std = self.constants(self.teachers[0], pixels.dtype)
        return to_uint8(pixels.detach() * std + mean)

    def logits(self, images: Tensor) -> Tensor:
        """Weighted teacher logits (B, K) of stored images, float32."""
        with torch.no_grad():
            parts = [w * teacher(images) for w, teacher in zip(self.shares(), self.teachers, strict=True)]
        return torch.stack(parts).sum(0).float()

    def shares(self) -> list[float]:
        """Teacher weights that sum to 1, for logits."""
        total = sum(self.weights)
        return [w / total for w in self.weights] if total > 0 else [1 / len(self.weights)] * len(self.weights)

    def finish(self, job: Job) -> ImageBatch:
        """The bank's columns of a finished batch: its last iterate, intended classes, teacher logits, difficulty.

        Difficulty is the teacher's cross-entropy, or with a competitor how far its logits are from the teacher's (KL).
        """
        if not bool(torch.isfinite(job.pixels).all()):
            raise NonFiniteError(
                f"inversion diverged: pixels of the rows from {job.start} on became NaN or infinite",
                hint="lower --method.lr, or the weight of the BatchNorm term (--method.bn)",
            )
        images = self.images(job.pixels)
        logits = self.logits(images)
        if self.competitor is not None:
            with torch.no_grad():
                difficulty = kl_per_sample(self.competitor(images).float(), logits, self.config.competition_T)
        else:
            difficulty = ce_per_sample(logits, job.labels)
        meta = {"teacher_top1": _share(logits, job.labels)}
        if "verifier" in self.task.networks:
            with torch.no_grad():
                meta["verifier_top1"] = _share(self.task.networks["verifier"](images), job.labels)
        if self.task.log:
            self.task.log({**job.record, **meta})
        return ImageBatch(
            images=images.cpu(), labels=job.labels.cpu(), logits=logits.cpu(), difficulty=difficulty.clamp(min=0).cpu(),
            step=job.start + len(images), meta=meta,
        )  # fmt: skip

    # ---- what is minimised -----------------------------------------------------------------------------------

    def terms(self, job: Job, view: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        """Weighted scalar terms whose sum is minimised.

        Args:
            view: (B, C, H, W) what the classifiers see, normalised, with gradient to the job's pixels.
            pixels: the same before the view was taken.
        """
        c = self.config
        logits, terms = self.teacher_terms(job, view)
        seen = view if c.priors_of == "view" else pixels
        for name, prior in (("tv_l2", tv_l2), ("tv_l1", tv_l1), ("l2", l2_mean), ("l2_batch", l2_batch)):
            if getattr(c, name):
                terms[name] = getattr(c, name) * prior(seen)
        if self.competitor is not None and c.competition:
            student = self.look(self.competitor, view)
            if c.competition_form == "clamped":
                terms["competition"] = c.competition * adversarial_js(student, logits, c.competition_T)
            else:
                terms["competition"] = -c.competition * adi_divergence(student, logits, c.competition_T)
        return terms

    def teacher_terms(self, job: Job, view: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(logits, {"ce", "bn"}) of the committee: its weighted sum, or the one teacher whose turn it is."""
        c = self.config
        if c.committee == "cycle":
            turn = [(1.0, 1.0, job.t % len(self.teachers))]
        else:
            turn = [(w, s, k) for k, (w, s) in enumerate(zip(self.weights, self.shares(), strict=True))]
        logits, terms = [], {"ce": [], "bn": []}
        for weight, share, k in turn:
            teacher = self.teachers[k]
            if c.bn:
                with teacher.bn_statistics() as statistics:
                    found = self.look(teacher, view)
                terms["bn"].append(c.bn * weight * bn_penalty(statistics, self.bn_weights[k], c.bn_variance))
            else:
                found = self.look(teacher, view)
            terms["ce"].append(c.ce * weight * F.cross_entropy(found, job.labels))
            logits.append(share * found if share != 1 else found)
        return _sum(logits), {name: _sum(parts) for name, parts in terms.items() if parts}

    def look(self, network: ModelView, view: Tensor) -> Tensor:
        """Logits of normalised pixels; a network with other constants than the first teacher's gets them in its own."""
        first, own = self.constants(self.teachers[0], view.dtype), self.constants(network, view.dtype)
        if own is not first:
            view = (view * first[1] + (first[0] - own[0])) / own[1]
        with self.task.runtime.autocast():
            return widened(network.module(view))

    def _check_sizes(self) -> None:
        """Refuse a coarse stage for networks that take images of one size only."""
        channels, height, width = self.task.image_spec.shape
        for pool in {stage.pool for stage in self.stages} - {1}:
            for network in [*self.teachers, *([self.competitor] if self.competitor else [])]:
                like = next(network.module.parameters())
                try:
                    with torch.no_grad():
                        network.module(like.new_zeros(1, channels, height // pool, width // pool))
                except RuntimeError as error:
                    raise RequirementError(
                        f"{network.name} cannot look at images of {height // pool} x {width // pool}",
                        hint="switch the coarse stage off: --method.coarse_iterations 0",
                    ) from error

    def _layer_weights(self, teacher: TeacherView) -> Tensor:
        count = len(teacher.batchnorms())
        if not count:
            raise RequirementError(
                f"{teacher.name} has no BatchNorm layer", hint="switch the BN term off: --method.bn 0"
            )
        weights = list(self.config.bn_layers or [1.0] * count)
        if len(weights) != count:
            raise ConfigError(
                f"method.bn_layers: {teacher.name} has {count} BatchNorm layers", got=f"{len(weights)} factors"
            )
        return torch.tensor([weights[0] * self.config.bn_first, *weights[1:]], device=self.device)

    # ---- cost ------------------------------------------------------------------------------------------------

    def estimate(self) -> dict[str, float]:
        """{"seconds", "memory_bytes"} of all images, from two iterations of a small batch per stage."""
        rows = min(self.config.batch_size, self.task.images)
        small = min(rows, 32) if self.device.type == "cpu" else rows
        seconds, saved = 0.0, 0
        for stage in self.stages:
            job = Job(self, 0, self.labels(0, small), torch.zeros(small, *self.task.image_spec.shape), t=stage.first)
            job.step()
            with SavedBytes() as counter:
                begun = time.perf_counter()
                job.step()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                spent = time.perf_counter() - begun
            seconds += spent * stage.iterations * self.task.images / small
            saved = max(saved, counter.bytes)
        weights = sum(p.numel() * p.element_size() for t in self.teachers for p in t.module.parameters())
        return {"seconds": max(seconds, 1e-6), "memory_bytes": saved * rows / small * 1.5 + weights}


def bn_penalty(statistics: BatchNormStatistics, weights: Tensor, variance: float = 1.0) -> Tensor:
    """sum_l w_l (variance ||v_l - running_var_l||_2 + ||m_l - running_mean_l||_2), a scalar in fp32 at least."""
    means, variances = zip(*statistics.batch, strict=True)
    running_means, running_variances = zip(*statistics.running, strict=True)
    norm = torch.linalg.vector_norm
    of_means = torch.stack([norm(a - b) for a, b in zip(means, running_means, strict=True)])
    of_variances = torch.stack([norm(a - b) for a, b in zip(variances, running_variances, strict=True)])
    return ((of_means + variance * of_variances) * weights.to(of_means.dtype)).sum()


def requires_of(config: InversionConfig, *, shardable: bool, networks: tuple[str, ...]) -> Requires:
    """What an inversion needs with `config`."""
    return Requires(
        batchnorm=config.bn != 0,
        real_data=config.init != "noise",
        max_teachers=16,
        networks=networks,
        shardable=shardable,
        curriculum=config.crop is not None,
    )


def makes_of_config(config: InversionConfig) -> Makes:
    """What kind of bank an inversion makes with `config`."""
    return Makes(label_kind="target", contains_real=config.init != "noise")


def _share(logits: Tensor, labels: Tensor) -> float:
    return round(float((logits.argmax(1) == labels).float().mean()), 6)


def _sum(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
