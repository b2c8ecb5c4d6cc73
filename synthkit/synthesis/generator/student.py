"""The co-trained student, its curriculum, its figures and its health: what both loops of the family share.

`GeneratorLoop` (loop.py) trains a generator and the student in turn; `PoolLoop` (pool.py) synthesises batches into a
memory bank from which the student learns. A method may change the student's loss (`distil`) and add state of its own
(`extra_state`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from synthkit.errors import NonFiniteError, RequirementError
from synthkit.lazy import torch
from synthkit.logits import kl_per_sample, l1_per_sample, l2_per_sample
from synthkit.synthesis.base import (
    ImageBatch,
    Requires,
    Task,
    load_optimizer_state,
    optimizer_state,
    seeded_init,
    to_uint8,
    widened,
)
from synthkit.synthesis.curriculum import adversarial_weight, age_at, self_paced_weights
from synthkit.synthesis.generator.config import STUDENTS

if TYPE_CHECKING:
    from torch import Tensor

    from synthkit.models.bn_stats import StatisticsEMA
    from synthkit.models.view import ModelView


@dataclass(frozen=True)
class Distilled:
    """One student step before its update."""

    teacher: Tensor
    """(B, K) logits, without gradient."""
    student: Tensor
    """(B, K) logits."""
    per_sample: Tensor
    """(B,) KD losses."""
    loss: Tensor
    """Scalar that the student minimises."""


@dataclass(frozen=True)
class Look:
    """What the teacher says of images that carry gradient."""

    logits: Tensor
    """(B, K), float32 or wider."""
    features: Tensor | None
    """(B, D) penultimate features, where they were asked for."""
    bn: Tensor | None
    """Scalar BN-statistics loss, where the method weighs it and the teacher has BatchNorm."""
    statistics: list[tuple[Tensor, Tensor]] | None = None
    """(mean, variance) of the batch at every BatchNorm, beside `bn`."""


class StudentLoop:
    """Base of the data-free methods with a co-trained student (see the module text)."""

    requires: ClassVar[Requires] = Requires()
    default_curriculum: ClassVar[str] = "none"
    """What `--curriculum auto` means."""

    def __init__(self, config: Any, task: Task):
        from synthkit.models.build import build_model
        from synthkit.models.view import ModelView

        self.config, self.task, self.teacher = config, task, task.teacher
        runtime = task.runtime
        if runtime.world > 1:
            raise RequirementError(
                "a generator method is one optimisation and runs in one process",
                got=f"{runtime.world} processes",
                hint="start it once per --seed and join the banks",
            )
        self.device = runtime.device
        channels, height, width = self.teacher.input_size
        if height != width:
            raise RequirementError("the data-free family makes square images", got=(height, width))
        self.student_arch = self._student_arch()
        student = seeded_init(
            lambda: build_model(
                self.student_arch, num_classes=self.teacher.num_classes, in_channels=channels, image_size=height
            ),
            task.seed_of("student-init"),
        )
        self.student_view = ModelView(
            student,
            self.teacher.mean,
            self.teacher.std,
            input_size=self.teacher.input_size,
            num_classes=self.teacher.num_classes,
            class_names=self.teacher.class_names,
            name=f"student {self.student_arch}",
        ).to(self.device, channels_last=runtime.channels_last)
        self.optimizer_s = self._student_optimizer()
        weight = getattr(config, "bn", 0.0)
        self.use_bn = weight != 0 and self.teacher.has_batchnorm
        if weight != 0 and not self.use_bn and task.warn:
            task.warn(f"{self.teacher.name} has no BatchNorm layer: the BN-statistics term is off")
        self.step = 0
        self.stored = 0
        self._reset_figures()

    def _student_arch(self) -> str:
        if self.config.student != "auto":
            return self.config.student
        arch = str(self.task.extra.get("teacher_arch", ""))
        return STUDENTS.get(arch, arch)

    def _student_optimizer(self) -> torch.optim.Optimizer:
        c, weights, fused = self.config, self.student_view.module.parameters(), self.fused
        if c.optimizer == "adam":
            return torch.optim.Adam(weights, lr=c.lr, weight_decay=c.weight_decay, fused=fused)
        return torch.optim.SGD(weights, lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay, fused=fused)

    @property
    def fused(self) -> bool:
        """Whether optimisers may run as one kernel (several times faster for wide generators, on CPUs too)."""
        return self.device.type in ("cpu", "cuda")

    # ---- progress and curriculum -----------------------------------------------------------------------------

    @property
    def student_steps(self) -> int:
        """Student steps of the whole run."""
        return self.config.epochs * self.config.ep_steps

    @property
    def learned(self) -> int:
        """Student steps done."""
        return self.step

    @property
    def epoch(self) -> int:
        """Current epoch, counted from 0."""
        return self.learned // self.config.ep_steps

    def adversarial_weight(self, epoch: int) -> float:
        """Weight a(e) of the adversary: `adv`, growing under a curriculum with a ramp."""
        c = self.config
        growth = c.grad_adv if self.task.curriculum.ramp else 0.0
        return adversarial_weight(epoch, c.epochs, c.adv, growth, c.begin, c.end)

    @property
    def age(self) -> float:
        """lambda of the current student step."""
        return age_at(self.learned, self.config.lambda_0, self.config.alpha)

    def rate(self, kind: str, start: float, epoch: int, lowest: float = 0.0) -> float:
        """Learning rate in `epoch` of a schedule that starts at `start`."""
        c = self.config
        if kind == "cosine":
            return lowest + 0.5 * (start - lowest) * (1 + math.cos(math.pi * epoch / c.epochs))
        if kind == "step":
            return start * c.gamma ** sum(epoch >= int(m * c.epochs) for m in c.milestones)
        return start

    def schedule_figures(self, epoch: int) -> dict[str, float]:
        """Where the curriculum stood in `epoch`, for the log."""
        figures = {"adv_weight": self.adversarial_weight(epoch)}
        return figures if self.task.curriculum.weights == "none" else figures | {"age": self.age}

    # ---- the student -----------------------------------------------------------------------------------------

    def kd_per_sample(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The configured KD loss of every sample, (B,)."""
        if self.config.loss == "kl":
            return kl_per_sample(student, teacher, self.config.T)
        return (l1_per_sample if self.config.loss == "l1" else l2_per_sample)(student, teacher)

    def student_loss(self, per_sample: Tensor) -> Tensor:
        """mean_i v(l_i) l_i under the curriculum's weights (or v(mean l) mean l with granularity batch)."""
        form = self.task.curriculum.weights
        if form == "none":
            return per_sample.mean()
        losses = per_sample.mean() if self.config.granularity == "batch" else per_sample
        return (self_paced_weights(losses, self.age, form) * losses).mean()

    def distil(self, images: Tensor) -> Distilled:
        """Forward passes and loss of one student step; images (B, C, H, W) carry no gradient."""
        with self.task.runtime.autocast():
            with torch.no_grad():
                teacher = widened(self.teacher(images))
            student = widened(self.student_view(images))
        per_sample = self.kd_per_sample(student, teacher)
        return Distilled(teacher, student, per_sample, self.student_loss(per_sample))

    def learn(self, images: Tensor) -> Tensor:
        """One update of the student; returns its loss."""
        found = self.distil(images)
        self.optimizer_s.zero_grad(set_to_none=True)
        found.loss.backward()
        self.update_student()
        self.note(found)
        return found.loss

    def update_student(self) -> None:
        """Clip where it is asked for, and step."""
        self._clip(self.student_view.module)
        self.optimizer_s.step()

    def _clip(self, network: torch.nn.Module) -> None:
        if self.config.clip:
            torch.nn.utils.clip_grad_norm_(network.parameters(), self.config.clip)

    def note(self, found: Distilled) -> None:
        """Add a student step to the figures of the epoch."""
        top = found.teacher.argmax(1)
        self.histogram += torch.bincount(top, minlength=self.teacher.num_classes)
        agreement = (found.student.detach().argmax(1) == top).float().mean()
        self._add({"kd": found.per_sample.detach().mean(), "agreement": agreement}, "s")

    def look(self, images: Tensor, *, features: bool = False, ema: StatisticsEMA | None = None) -> Look:
        """One teacher forward that gradients flow back through, to the images alone."""
        if not self.use_bn:
            logits, feature = self.teacher.features(images) if features else (self.teacher(images), None)
            return Look(widened(logits), _widened_or_none(feature), None)
        with self.teacher.bn_statistics() as statistics:
            logits, feature = self.teacher.features(images) if features else (self.teacher(images), None)
        return Look(widened(logits), _widened_or_none(feature), statistics.loss(ema=ema), statistics.batch)

    @contextlib.contextmanager
    def module_draws(self, stream: str) -> Iterator[None]:
        """Dropout and the like can only draw from torch's global generator: lend it, seeded, and put it back."""
        with self.task.runtime.module_draws(self.task.seed_of(stream)):
            yield

    def described(self, images: Tensor, labels: Tensor | None = None) -> ImageBatch:
        """What the bank keeps of images (B, C, H, W) in [0, 1]: bytes, labels, teacher logits, difficulty."""
        student = self.student_view.module
        training = student.training
        student.eval()
        with torch.no_grad(), self.task.runtime.autocast():
            images = to_uint8(images)
            logits = widened(self.teacher(images))
            guess = widened(self.student_view(images))
            difficulty = self.kd_per_sample(guess, logits)
        student.train(training)
        if not bool(torch.isfinite(logits).all() & torch.isfinite(guess).all()):
            raise NonFiniteError(
                f"training diverged: logits became NaN or infinite before step {self.step}",
                hint="lower --method.lr or --method.lr_g; committed shards are whole, but the run needs a new --out",
            )
        return ImageBatch(
            images=images.cpu(),
            labels=(logits.argmax(1) if labels is None else labels).cpu(),
            logits=logits.float().cpu(),
            difficulty=difficulty.float().cpu(),
            step=self.step,
        )

    # ---- figures and health ----------------------------------------------------------------------------------

    def _reset_figures(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts = {"g": 0, "s": 0}
        self.histogram = torch.zeros(self.teacher.num_classes, dtype=torch.int64, device=self.device)

    def _add(self, values: dict[str, Tensor], kind: str) -> None:
        self._counts[kind] += 1
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def note_generator(self, terms: dict[str, Tensor], loss: Tensor) -> None:
        """Add a generator (or synthesis) step to the figures of the epoch."""
        self._add({f"g_{k}": v.detach() for k, v in terms.items()} | {"g_loss": loss.detach()}, "g")

    def figures(self) -> dict[str, float]:
        """Means since the epoch began (one synchronisation with the device)."""
        return {
            name: float(total) / max(1, self._counts["g" if name.startswith("g_") else "s"])
            for name, total in self._sums.items()
        }

    def class_balance(self) -> float:
        """Entropy of the teacher's classes on this epoch's images over log K: 1 balanced, 0 a single class."""
        share = self.histogram.double() / self.histogram.sum().clamp(min=1)
        entropy = -(share * share.clamp(min=1e-12).log()).sum()
        return max(0.0, float(entropy)) / math.log(max(2, self.teacher.num_classes))

    def grown(self) -> bool:
        """Whether one-sided images are a reason to warn (those of a young generator are expected)."""
        return True

    def _end_epoch(self, epoch: int, lr: float) -> None:
        figures = self.figures()
        bad = [name for name, value in figures.items() if not math.isfinite(value)]
        if bad:
            raise NonFiniteError(
                f"training diverged in epoch {epoch} (step {self.step}): {', '.join(bad)} is NaN or infinite",
                hint="lower --method.lr or --method.lr_g, or the weight of that term",
            )
        balance = self.class_balance()
        if self.task.warn and self.grown() and balance < 0.7:
            shares = (self.histogram.double() / self.histogram.sum()).tolist()
            missing = [i for i, s in enumerate(shares) if s < 0.1 / len(shares)]
            self.task.warn(
                f"epoch {epoch}: the generator is collapsing, class balance {balance:.2f} of 1"
                f" (nearly absent classes: {missing[:12]}); raise the class-balance weight or lower --method.lr_g"
            )
        if self.task.warn and figures["kd"] < 1e-3:
            self.task.warn(
                f"epoch {epoch}: KD loss {figures['kd']:.1e} is at its floor, the images teach nothing new;"
                " use a curriculum with a ramp, or a larger adversarial weight"
            )
        record = {"epoch": epoch, "step": self.step, "lr": lr, "class_balance": balance, **figures}
        record |= self.schedule_figures(epoch)
        self.student_view.module.eval()
        if self.task.keep_student:
            self.task.keep_student(self.student_view, self.learned)
        if self.task.eval_hook:
            record.update(self.task.eval_hook(self.student_view, epoch) or {})
        if self.task.log:
            self.task.log(record)
        self._reset_figures()

    # ---- state -----------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """What a method has beyond its loop: networks, optimisers, queues (nested dict of tensors, numbers, texts)."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Inverse of `extra_state`."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "student": dict(self.student_view.module.state_dict()),
            "optimizer_s": optimizer_state(self.optimizer_s),
            "histogram": self.histogram,
            "sums": dict(self._sums),
            "counts": dict(self._counts),
            "step": self.step,
            "stored": self.stored,
            "extra": self.extra_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.student_view.module.load_state_dict(state["student"])
        load_optimizer_state(self.optimizer_s, state["optimizer_s"])
        self.histogram = state["histogram"].to(self.device)
        self._sums = {k: v.to(self.device) for k, v in state.get("sums", {}).items()}
        self._counts = dict(state["counts"])
        self.step, self.stored = int(state["step"]), int(state["stored"])
        self.load_extra_state(state.get("extra", {}))

    def student(self) -> ModelView | None:
        """The co-trained student (published use of these methods)."""
        return self.student_view


def _widened_or_none(feature: Tensor | None) -> Tensor | None:
    return None if feature is None else widened(feature)
