"""The student that Adaptive DeepInversion trains along: distilled from the images made so far, which it remembers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from synthkit.lazy import torch
from synthkit.logits import kl_per_sample
from synthkit.synthesis.base import Task, load_optimizer_state, optimizer_state, seeded_init, widened
from synthkit.synthesis.generator.config import STUDENTS

if TYPE_CHECKING:
    from torch import Tensor

    from synthkit.synthesis.inversion.loop import Inverter


class CoTrainedStudent:
    """A student, its SGD and a bounded memory of uint8 images; it learns by distillation from the committee.

    Every draw (memory rows, augmentation, dropout) is a pure function of (seed, step), so the state is small.
    """

    def __init__(self, config: Any, task: Task, inverter: Inverter):
        from synthkit.models.build import build_model
        from synthkit.models.view import ModelView

        self.config, self.task, self.inverter = config, task, inverter
        teacher = task.teacher
        channels, height, _ = teacher.input_size
        own = str(task.extra.get("teacher_arch", ""))
        self.arch = STUDENTS.get(own, own) if config.student == "auto" else config.student
        module = seeded_init(
            lambda: build_model(self.arch, num_classes=teacher.num_classes, in_channels=channels, image_size=height),
            task.seed_of("student-init"),
        )
        self.view = ModelView(
            module.eval().requires_grad_(False),
            teacher.mean,
            teacher.std,
            input_size=teacher.input_size,
            num_classes=teacher.num_classes,
            class_names=teacher.class_names,
            name=f"student {self.arch}",
        ).to(task.runtime.device, channels_last=task.runtime.channels_last)
        self.optimizer = torch.optim.SGD(
            module.parameters(), lr=config.student_lr, momentum=0.9, weight_decay=config.weight_decay
        )
        self.memory = torch.zeros(0, *teacher.input_size, dtype=torch.uint8)
        self.step = 0

    def remember(self, images: Tensor) -> None:
        """Add uint8 images; the oldest are forgotten beyond `config.memory`."""
        self.memory = torch.cat([self.memory, images.cpu()])[-self.config.memory :]

    def learn(self, total: int) -> Tensor:
        """One SGD step of `total` on augmented images of the memory; returns the loss T^2 KL(teacher || student)."""
        from synthkit.data.augment import augment

        rate = 0.5 * self.config.student_lr * (1 + math.cos(math.pi * self.step / total))
        self.optimizer.param_groups[0]["lr"] = rate
        device = self.task.runtime.device
        draw = self.task.rng(f"student-{self.step}", device="cpu")
        rows = torch.randint(0, len(self.memory), (self.config.student_batch,), generator=draw)
        images = augment(self.memory[rows].to(device), self.config.augment, draw)
        with self._lent_global_generator(), self.task.runtime.autocast():
            teacher = self.inverter.logits(images)
            self.view.module.train().requires_grad_(True)
            student = widened(self.view(images))
        loss = kl_per_sample(student, teacher, self.config.T).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.view.module.eval().requires_grad_(False)
        self.step += 1
        return loss.detach()

    @contextlib.contextmanager
    def _lent_global_generator(self) -> Iterator[None]:
        """Dropout can only draw from torch's global generator: lend it, seeded, and put it back."""
        with self.task.runtime.module_draws(self.task.seed_of(f"student-modules-{self.step}")):
            yield

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimiser, memory and step."""
        return {
            "module": dict(self.view.module.state_dict()),
            "optimizer": optimizer_state(self.optimizer),
            "memory": self.memory,
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.view.module.load_state_dict(state["module"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.memory, self.step = state["memory"], int(state["step"])
