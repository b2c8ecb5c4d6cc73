"""The loop that all generator-based data-free methods share.

One cycle is `g_steps` generator updates, then `kd_steps` updates of a co-trained student on fresh generator images.
A method says what the generator minimises (`generator_terms`) and how the student's samples are weighted
(`student_loss`); this file owns the order of steps, optimisers, schedules, collection of bank images, state and health.

Source of the order: ljrprocc/DataFree@bf3096b `datafree_kd.py:main_worker` (methods/dfkd.md 1.1 and 2.1).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from synthkit.errors import NonFiniteError, RequirementError
from synthkit.lazy import torch
from synthkit.logits import kl_per_sample, l1_per_sample, l2_per_sample
from synthkit.synthesis.base import (
    ImageBatch,
    Requires,
    Snapshot,
    Task,
    load_optimizer_state,
    optimizer_state,
    seeded_init,
    to_uint8,
    widened,
)
from synthkit.synthesis.generator.config import STUDENTS, GeneratorConfig
from synthkit.synthesis.generator.cost import estimate

if TYPE_CHECKING:
    from torch import Tensor

    from synthkit.models.view import ModelView


class GeneratorLoop:
    """Base of the generator family (see the module text)."""

    requires: ClassVar[Requires] = Requires()
    Config: ClassVar[type] = GeneratorConfig

    def __init__(self, config: Any, task: Task):
        from synthkit.models.build import build_model
        from synthkit.models.generators import build_generator
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
        if height != width or height % 2**config.depth:
            raise RequirementError(
                f"the generator makes square images whose side is a multiple of 2^depth = {2**config.depth}",
                got=(height, width),
                hint="choose another --method.depth or a teacher of another input size",
            )
        self.generator_spec: dict[str, Any] = {
            "name": config.generator,
            "latent_dim": config.nz,
            "image_size": height,
            "channels": channels,
            "depth": config.depth,
            "width": config.width,
            "mean": list(self.teacher.mean),  # used by generators that paint in the teacher's normalised space
            "std": list(self.teacher.std),
        }
        self.student_arch = self._student_arch()
        generator = seeded_init(lambda: build_generator(**self.generator_spec), task.seed_of("generator-init"))
        student = seeded_init(
            lambda: build_model(
                self.student_arch, num_classes=self.teacher.num_classes, in_channels=channels, image_size=height
            ),
            task.seed_of("student-init"),
        )
        self.latent_shape: tuple[int, ...] = generator.latent_shape  # type: ignore[assignment]  # of our generators
        self.generator = generator.to(self.device)
        self.student_view = ModelView(
            student,
            self.teacher.mean,
            self.teacher.std,
            input_size=self.teacher.input_size,
            num_classes=self.teacher.num_classes,
            class_names=self.teacher.class_names,
            name=f"student {self.student_arch}",
        ).to(self.device, channels_last=runtime.channels_last)
        if runtime.channels_last:
            self.generator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stub lacks the keyword
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), lr=config.lr_g, betas=tuple(config.betas_g))
        self.optimizer_s = torch.optim.SGD(
            self.student_view.module.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.noise = task.rng("noise")
        self.bank_noise = task.rng("bank-noise")
        self.step = 0
        self.stored = 0
        self._reset_figures()

    def _student_arch(self) -> str:
        if self.config.student != "auto":
            return self.config.student
        arch = str(self.task.extra.get("teacher_arch", ""))
        return STUDENTS.get(arch, arch)

    # ---- what a method defines -------------------------------------------------------------------------------

    def generator_terms(self, images: Tensor) -> dict[str, Tensor]:
        """Weighted scalar terms whose sum the generator minimises; images (B, C, H, W) in [0, 1] carry gradient."""
        raise TypeError(f"{type(self).__name__} must define generator_terms")

    def student_loss(self, per_sample: Tensor) -> Tensor:
        """Scalar student loss of per-sample KD losses (B,); the mean unless a method weighs them."""
        return per_sample.mean()

    def schedule_figures(self, epoch: int) -> dict[str, float]:
        """Where the curriculum stood in `epoch`, for the log."""
        return {}

    # ---- progress --------------------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        """Student steps of the whole run."""
        return self.config.epochs * self.config.ep_steps

    @property
    def epoch(self) -> int:
        """Current epoch, counted from 0."""
        return self.step // self.config.ep_steps

    def kd_per_sample(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The configured KD loss of every sample, (B,)."""
        if self.config.loss == "kl":
            return kl_per_sample(student, teacher, self.config.T)
        return (l1_per_sample if self.config.loss == "l1" else l2_per_sample)(student, teacher)

    def _due(self) -> int:
        start = self.config.store_from
        share = min(1.0, max(0.0, (self.step / self.total_steps - start) / (1 - start)))
        return math.floor(self.task.images * share + 1e-9)

    # ---- the loop --------------------------------------------------------------------------------------------

    def generate(self) -> Iterator[ImageBatch]:
        """Run cycles to the end; yield images spread evenly over the run after `store_from`."""
        chunk = min(self.config.batch_size, 256, max(1, self.task.images // 100))
        while True:
            due = self._due()
            finished = self.step >= self.total_steps
            while self.stored < due and (due - self.stored >= chunk or finished):
                yield self._collect(min(chunk, due - self.stored))
            if finished:
                return
            self.cycle()

    def cycle(self) -> None:
        """`g_steps` generator updates, then `kd_steps` student updates (fewer at the end of an epoch)."""
        epoch = self.epoch
        lr = 0.5 * self.config.lr * (1 + math.cos(math.pi * epoch / self.config.epochs))
        for group in self.optimizer_s.param_groups:
            group["lr"] = lr
        steps = min(self.config.kd_steps, (epoch + 1) * self.config.ep_steps - self.step)
        with self._module_draws(f"modules-{self.step}"):
            self._set_modes(generating=True)
            for _ in range(self.config.g_steps):
                self.generator_step()
            self._set_modes(generating=False)
            for _ in range(steps):
                self.student_step()
                self.step += 1
        if self.task.tick:
            self.task.tick(steps)
        if self.step % self.config.ep_steps == 0:
            self._end_epoch(epoch, lr)

    @contextlib.contextmanager
    def _module_draws(self, stream: str) -> Iterator[None]:
        """Dropout and the like can only draw from torch's global generator: lend it, seeded, and put it back."""
        on_gpu = self.device.type == "cuda"
        with torch.random.fork_rng(devices=[self.device] if on_gpu else []):
            seed = self.task.seed_of(stream)
            torch.default_generator.manual_seed(seed)
            if on_gpu:
                torch.cuda.manual_seed(seed)
            yield

    def _set_modes(self, *, generating: bool) -> None:
        student = self.student_view.module
        self.generator.train(generating)
        student.train(not generating)
        student.requires_grad_(not generating)  # its weight gradients would be thrown away

    def generator_step(self) -> dict[str, Tensor]:
        """One Adam update of the generator on `generator_terms`; student and teacher in eval mode."""
        with self.task.runtime.autocast():
            terms = self.generator_terms(self.generator(self.latents(self.config.batch_size, self.noise)))
        loss = torch.stack([widened(t) for t in terms.values()]).sum()
        self.optimizer_g.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer_g.step()
        self._add({f"g_{k}": v.detach() for k, v in terms.items()} | {"g_loss": loss.detach()}, "g")
        return terms

    def student_step(self) -> Tensor:
        """One SGD update of the student on fresh generator images (generator in eval mode, no gradient to it)."""
        with self.task.runtime.autocast():
            with torch.no_grad():
                images = self.generator(self.latents(self.config.batch_size, self.noise))
                teacher = widened(self.teacher(images))
            student = widened(self.student_view(images))
        per_sample = self.kd_per_sample(student, teacher)
        loss = self.student_loss(per_sample)
        self.optimizer_s.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer_s.step()
        top = teacher.argmax(1)
        self.histogram += torch.bincount(top, minlength=self.teacher.num_classes)
        self._add(
            {"kd": per_sample.detach().mean(), "agreement": (student.detach().argmax(1) == top).float().mean()}, "s"
        )
        return loss

    def latents(self, n: int, rng: torch.Generator) -> Tensor:
        """z ~ N(0, I), (n, nz), or (n, nz, side, side) for generators of spatial noise."""
        return torch.randn(n, *self.latent_shape, generator=rng, device=self.device)

    def _collect(self, n: int) -> ImageBatch:
        modes = self.generator.training, self.student_view.module.training
        self.generator.eval()
        self.student_view.module.eval()
        with torch.no_grad(), self.task.runtime.autocast():
            images = to_uint8(self.generator(self.latents(n, self.bank_noise)))
            teacher = widened(self.teacher(images))
            student = widened(self.student_view(images))
            difficulty = self.kd_per_sample(student, teacher)
        self.generator.train(modes[0])
        self.student_view.module.train(modes[1])
        if not bool(torch.isfinite(teacher).all() & torch.isfinite(student).all()):
            raise NonFiniteError(
                f"training diverged: logits became NaN or infinite before step {self.step}",
                hint="lower --method.lr or --method.lr_g; committed shards are whole, but the run needs a new --out",
            )
        self.stored += n
        return ImageBatch(
            images=images.cpu(),
            labels=teacher.argmax(1).cpu(),
            logits=teacher.float().cpu(),
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

    def _end_epoch(self, epoch: int, lr: float) -> None:
        figures = self.figures()
        bad = [name for name, value in figures.items() if not math.isfinite(value)]
        if bad:
            raise NonFiniteError(
                f"training diverged in epoch {epoch} (step {self.step}): {', '.join(bad)} is NaN or infinite",
                hint="lower --method.lr or --method.lr_g, or the weight of that term",
            )
        balance = self.class_balance()
        grown = self.step >= self.config.store_from * self.total_steps  # a young generator is expected to be one-sided
        if self.task.warn and grown and balance < 0.7:
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
        if self.task.eval_hook:
            self.student_view.module.eval()
            record.update(self.task.eval_hook(self.student_view, epoch) or {})
        if self.task.log:
            self.task.log(record)
        self._reset_figures()

    # ---- state -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "generator": dict(self.generator.state_dict()),
            "student": dict(self.student_view.module.state_dict()),
            "optimizer_g": optimizer_state(self.optimizer_g),
            "optimizer_s": optimizer_state(self.optimizer_s),
            "noise": self.noise.get_state(),
            "bank_noise": self.bank_noise.get_state(),
            "histogram": self.histogram,
            "sums": dict(self._sums),
            "counts": dict(self._counts),
            "step": self.step,
            "stored": self.stored,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.generator.load_state_dict(state["generator"])
        self.student_view.module.load_state_dict(state["student"])
        load_optimizer_state(self.optimizer_g, state["optimizer_g"])
        load_optimizer_state(self.optimizer_s, state["optimizer_s"])
        self.noise.set_state(state["noise"])
        self.bank_noise.set_state(state["bank_noise"])
        self.histogram = state["histogram"].to(self.device)
        self._sums = {k: v.to(self.device) for k, v in state.get("sums", {}).items()}
        self._counts = dict(state["counts"])
        self.step, self.stored = int(state["step"]), int(state["stored"])

    def snapshot(self) -> Snapshot | None:
        """The generator in half precision (its images differ by less than one grey level)."""
        state = {k: v.half() if v.is_floating_point() else v for k, v in self.generator.state_dict().items()}
        return Snapshot(step=self.step, spec=dict(self.generator_spec), state=state)

    def student(self) -> ModelView | None:
        """The co-trained student (published use of these methods)."""
        return self.student_view

    def estimate(self) -> dict[str, float]:
        """Seconds and bytes of the whole run, measured on a throw-away copy (see `cost.py`)."""
        return estimate(self)
