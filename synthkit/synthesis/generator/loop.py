"""The loop of the online methods: a generator and a student learn in turn.

One cycle is `g_steps` generator updates, then `kd_steps` updates of a co-trained student on fresh generator images.
A method says what the generator minimises (`generator_terms`) and, where it differs, which images the student sees
(`student_images`), what it minimises (`distil`) and the order of a cycle (`run_cycle`); this file owns optimisers,
schedules, collection of bank images and state.

Source of the order: ljrprocc/DataFree@bf3096b `datafree_kd.py:main_worker` (methods/dfkd.md 1.1 and 2.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from synthkit.errors import RequirementError
from synthkit.lazy import torch
from synthkit.synthesis.base import (
    ImageBatch,
    Snapshot,
    Task,
    load_optimizer_state,
    optimizer_state,
    seeded_init,
    widened,
)
from synthkit.synthesis.generator.config import STUDENTS, GeneratorConfig
from synthkit.synthesis.generator.cost import estimate
from synthkit.synthesis.generator.student import StudentLoop

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["STUDENTS", "GeneratorConfig", "GeneratorLoop"]


class GeneratorLoop(StudentLoop):
    """Base of the online methods (see the module text)."""

    Config: ClassVar[type] = GeneratorConfig
    student_always_trains: ClassVar[bool] = False
    """Whether the student stays in train mode while the generator learns (its BN statistics then move)."""
    generator_always_trains: ClassVar[bool] = False
    """Whether the generator stays in train mode while the student learns."""

    def __init__(self, config: Any, task: Task):
        from synthkit.models.generators import build_generator

        super().__init__(config, task)
        channels, side, _ = self.teacher.input_size
        if config.generator == "cud" and side % 2**config.depth:
            raise RequirementError(
                f"the generator makes square images whose side is a multiple of 2^depth = {2**config.depth}",
                got=(side, side),
                hint="choose another --method.depth or a teacher of another input size",
            )
        self.generator_spec: dict[str, Any] = {
            "name": config.generator,
            "latent_dim": config.nz,
            "image_size": side,
            "channels": channels,
            "depth": config.depth,
            "width": config.width,
            "mean": list(self.teacher.mean),  # used by generators that paint in the teacher's normalised space
            "std": list(self.teacher.std),
        }
        generator = seeded_init(lambda: build_generator(**self.generator_spec), task.seed_of("generator-init"))
        self.latent_shape: tuple[int, ...] = generator.latent_shape  # type: ignore[assignment]  # of our generators
        self.generator = generator.to(self.device)
        if task.runtime.channels_last:
            self.generator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stub lacks the keyword
        self.optimizer_g = torch.optim.Adam(
            self.generator.parameters(), lr=config.lr_g, betas=tuple(config.betas_g), fused=self.fused
        )
        self.noise = task.rng("noise")
        self.bank_noise = task.rng("bank-noise")

    # ---- what a method defines -------------------------------------------------------------------------------

    def generator_terms(self, images: Tensor) -> dict[str, Tensor]:
        """Weighted scalar terms whose sum the generator minimises; images (B, C, H, W) in [0, 1] carry gradient."""
        raise TypeError(f"{type(self).__name__} must define generator_terms")

    def run_cycle(self, steps: int) -> None:
        """`g_steps` generator updates, then `steps` student updates, each of which adds 1 to `step`."""
        self.set_modes(generating=True)
        for _ in range(self.config.g_steps):
            self.generator_step()
        self.set_modes(generating=False)
        for _ in range(steps):
            self.student_step()
            self.step += 1

    def student_images(self) -> Tensor:
        """Images of one student step: fresh ones, no gradient to the generator."""
        with torch.no_grad(), self.task.runtime.autocast():
            return self.generator(self.latents(self.config.batch_size, self.noise))

    # ---- the loop --------------------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        """Student steps of the whole run."""
        return self.student_steps

    def grown(self) -> bool:
        """Once images are stored."""
        return self.step >= self.config.store_from * self.total_steps

    def _due(self) -> int:
        start = self.config.store_from
        share = min(1.0, max(0.0, (self.step / self.total_steps - start) / (1 - start)))
        return math.floor(self.task.images * share + 1e-9)

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
        """One cycle at the learning rates of its epoch (fewer student steps at the end of an epoch)."""
        epoch, c = self.epoch, self.config
        lr = self.rate(c.schedule, c.lr, epoch, c.lr_min)
        for group in self.optimizer_s.param_groups:
            group["lr"] = lr
        for group in self.optimizer_g.param_groups:
            group["lr"] = self.rate(c.schedule_g, c.lr_g, epoch)
        steps = min(c.kd_steps, (epoch + 1) * c.ep_steps - self.step)
        with self.module_draws(f"modules-{self.step}"):
            self.run_cycle(steps)
        if self.task.tick:
            self.task.tick(steps)
        if self.step % c.ep_steps == 0:
            self._end_epoch(epoch, lr)

    def set_modes(self, *, generating: bool) -> None:
        """Train or eval mode of both networks; the student is frozen while the generator learns."""
        student = self.student_view.module
        self.generator.train(generating or self.generator_always_trains)
        student.train(not generating or self.student_always_trains)
        student.requires_grad_(not generating)  # its weight gradients would be thrown away

    def generator_step(self) -> dict[str, Tensor]:
        """One Adam update of the generator on `generator_terms`; student and teacher in eval mode."""
        with self.task.runtime.autocast():
            terms = self.generator_terms(self.generator(self.latents(self.config.batch_size, self.noise)))
        loss = torch.stack([widened(t) for t in terms.values()]).sum()
        self.optimizer_g.zero_grad(set_to_none=True)
        loss.backward()
        self.update_generator()
        self.note_generator(terms, loss)
        return terms

    def update_generator(self) -> None:
        """Clip where it is asked for, and step."""
        self._clip(self.generator)
        self.optimizer_g.step()

    def student_step(self) -> Tensor:
        """One update of the student on `student_images`; returns its loss."""
        return self.learn(self.student_images())

    def latents(self, n: int, rng: torch.Generator) -> Tensor:
        """z ~ N(0, I), (n, nz), or (n, nz, side, side) for generators of spatial noise."""
        return torch.randn(n, *self.latent_shape, generator=rng, device=self.device)

    def _collect(self, n: int) -> ImageBatch:
        training = self.generator.training
        self.generator.eval()
        with torch.no_grad(), self.task.runtime.autocast():
            images = self.bank_images(n)
        self.generator.train(training)
        batch = self.described(images)
        self.stored += n
        return batch

    def bank_images(self, n: int) -> Tensor:
        """Fresh images for the bank (n, C, H, W); the generator is in eval mode, draws come from `bank_noise`."""
        return self.generator(self.latents(n, self.bank_noise))

    # ---- state -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            **super().state_dict(),
            "generator": dict(self.generator.state_dict()),
            "optimizer_g": optimizer_state(self.optimizer_g),
            "noise": self.noise.get_state(),
            "bank_noise": self.bank_noise.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.generator.load_state_dict(state["generator"])
        load_optimizer_state(self.optimizer_g, state["optimizer_g"])
        self.noise.set_state(state["noise"])
        self.bank_noise.set_state(state["bank_noise"])
        super().load_state_dict(state)

    def snapshot(self) -> Snapshot | None:
        """The generator in half precision (its images differ by less than one grey level)."""
        state = {k: v.half() if v.is_floating_point() else v for k, v in self.generator.state_dict().items()}
        return Snapshot(step=self.step, spec=dict(self.generator_spec), state=state)

    def estimate(self) -> dict[str, float]:
        """Seconds and bytes of the whole run, measured on a small batch and undone (see `cost.py`)."""
        seconds, memory = estimate(self, lambda steps: self.run_cycle(steps))
        cycles = math.ceil(self.config.ep_steps / self.config.kd_steps) * self.config.epochs
        return {"seconds": cycles * seconds[0] + self.total_steps * seconds[1], "memory_bytes": memory}
