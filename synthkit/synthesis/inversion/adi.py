"""Adaptive DeepInversion: images on which a student, trained along on the earlier ones, still differs."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from synthkit.errors import ConfigError, RequirementError
from synthkit.lazy import torch
from synthkit.synthesis.base import ImageBatch, Makes, Requires, Snapshot, Task
from synthkit.synthesis.inversion.competition import CoTrainedStudent
from synthkit.synthesis.inversion.config import InversionConfig
from synthkit.synthesis.inversion.job import Job, even_parts
from synthkit.synthesis.inversion.loop import Inverter, makes_of_config, requires_of

if TYPE_CHECKING:
    from synthkit.models.view import ModelView

NETWORKS = ("verifier",)
SAFE = 20
"""Iterations, or student steps, between two safe points."""


@dataclass(frozen=True, kw_only=True)
class ADIConfig(InversionConfig):
    """Adaptive DeepInversion; the inversion's defaults are the published CIFAR-10 settings."""

    competition: float = 1.0
    """Weight of the competition with the student (0.2 on ImageNet)."""
    plain: int = 4
    """Batches made without competition before the student first learns."""
    round: int = 1
    """Batches between two times that the student learns."""
    student: str = "auto"
    """Architecture of the student; auto takes the usual partner of the teacher."""
    student_steps: int = 400
    """SGD steps of the student each time."""
    student_batch: int = 256
    """Images per student step."""
    student_lr: float = 0.1
    """Learning rate of the student (SGD, momentum 0.9, half a cosine over all its steps)."""
    weight_decay: float = 1e-4
    """Weight decay of the student."""
    T: float = 20.0
    """Temperature of the student's distillation loss."""
    augment: str = "crop_flip"
    """Augmentation of the student's images."""
    memory: int = 50_000
    """Newest images that the student learns from."""
    checkpoints: int = 0
    """States of the student that the bank keeps, spread evenly over its steps, the last one included (0: none)."""

    def __post_init__(self) -> None:
        from synthkit.data.policies import POLICIES

        super().__post_init__()
        for name in ("plain", "round", "student_steps", "student_batch", "memory"):
            if getattr(self, name) < 1:
                raise ConfigError(f"method.{name} must be at least 1", got=getattr(self, name))
        for name in ("student_lr", "T"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"method.{name} must be positive", got=getattr(self, name))
        if self.checkpoints < 0:
            raise ConfigError("method.checkpoints must not be negative", got=self.checkpoints)
        if self.augment not in POLICIES:
            raise ConfigError("method.augment: no such policy", got=self.augment, allowed=POLICIES)


class AdaptiveDeepInversion:
    """DeepInversion in rounds: plain images first, then images on which the student of all earlier ones is wrong.

    Images:   DeepInversion's loss + c (1 - clamp(JS(softmax(s/3), softmax(t/3)), 0, 1)), without the last term in the
              first `plain` batches.
    Student:  T^2 KL(softmax(t/T) || softmax(s/T)) on augmented images of its memory, `student_steps` steps after the
              plain batches and after every further `round` batches.
    Curriculum and views as in deepinversion. The stored difficulty is T^2 KL(t || s) at T = 3 against the student that
    the batch competed with (the teacher's cross-entropy in the plain batches).

    Shapes: as deepinversion; memory uint8 (M, C, H, W) on the CPU.
    Source: Yin et al., "Dreaming to distill" (CVPR 2020, arXiv 1912.08795); competition term of
        NVlabs/DeepInversion@2413af1; the order of the rounds is the authors' answer to users, no code of it exists.
    Differs from source: the student's training is synthkit's own (the released code competes with a fixed network:
        that is deepinversion with `competitor`, whose shards are independent); the last iterate is kept.
    Cost: deepinversion plus one forward/backward of the student per iteration, plus `student_steps` steps per round.
    """

    requires: ClassVar[Requires] = Requires(batchnorm=True, max_teachers=16, networks=NETWORKS)
    makes: ClassVar[Makes] = Makes(label_kind="target")
    Config: ClassVar[type] = ADIConfig

    def __init__(self, config: ADIConfig, task: Task):
        if task.runtime.world > 1:
            raise RequirementError(
                "adi makes its batches in order and runs in one process",
                got=f"{task.runtime.world} processes",
                hint="take deepinversion with --method.competitor, or start adi once per --seed and join the banks",
            )
        self.config, self.task = config, task
        self.inverter = Inverter(config, task)
        self.learner = CoTrainedStudent(config, task, self.inverter)
        self.parts = even_parts(0, task.images, config.batch_size)
        self.step = 0
        self.made = 0  # batches that were yielded
        self.job: Job | None = None
        self.ready: ImageBatch | None = None  # finished, and its round's learning is going on
        self.left = 0  # student steps of it

    @classmethod
    def requires_for(cls, config: ADIConfig) -> Requires:
        """BatchNorm while its term is on, data for a real start, the curriculum where crops are on."""
        return requires_of(config, shardable=False, networks=NETWORKS)

    @classmethod
    def makes_for(cls, config: ADIConfig) -> Makes:
        """Images of intended classes, which start from real pixels or not."""
        return makes_of_config(config)

    @property
    def student_arch(self) -> str:
        """Architecture of the student."""
        return self.learner.arch

    def learns_after(self, batch: int) -> bool:
        """Whether the student learns when batch number `batch` is finished: at every round's end, and at the end."""
        past = batch + 1 - self.config.plain
        return batch + 1 == len(self.parts) or (past >= 0 and past % self.config.round == 0)

    @property
    def total_steps(self) -> int:
        """Images times iterations, and images that the student sees."""
        return self.task.images * self.inverter.iterations + self.student_steps * self.config.student_batch

    @property
    def student_steps(self) -> int:
        """Steps of the student in the whole run."""
        return sum(map(self.learns_after, range(len(self.parts)))) * self.config.student_steps

    def _advance(self, images: int) -> int:
        self.step += images
        if self.task.tick:
            self.task.tick(images)
        return self.step

    # ---- the rounds ------------------------------------------------------------------------------------------

    def generate(self) -> Iterator[ImageBatch | None]:
        """Batch by batch: invert, remember, let the student learn where a round ends, yield."""
        while self.made < len(self.parts):
            if self.ready is None:
                yield from self._invert()
            yield from self._learn()
            batch, self.ready = self.ready, None
            self.made += 1
            yield batch

    def _invert(self) -> Iterator[None]:
        start, end = self.parts[self.made]
        self.inverter.competitor = self.learner.view if self.made >= self.config.plain else None
        if self.job is None:
            labels = self.inverter.labels(start, end - start)
            self.job = Job(self.inverter, start, labels, self.inverter.start(start, labels))
        while not self.job.done:
            self.job.log(self.job.step(), self._advance)
            if self.job.t % SAFE == 0 and not self.job.done:
                yield None
        self.ready, self.job = self.inverter.finish(self.job), None
        self.learner.remember(self.ready.images)
        self.left = self.config.student_steps if self.learns_after(self.made) else 0

    def _learn(self) -> Iterator[None]:
        loss = None
        while self.left:
            loss = self.learner.learn(self.student_steps)
            self.left -= 1
            self._advance(self.config.student_batch)
            if self.left and self.left % SAFE == 0:
                yield None
        if loss is not None and self.task.keep_student:
            self.task.keep_student(self.learner.view, self.learner.step)
        if loss is not None and self.task.log:
            record = {"step": self.step, "kd": float(loss), "batch": self.made, "student_steps": self.learner.step}
            if self.task.eval_hook:
                record.update(self.task.eval_hook(self.learner.view, self.made) or {})
            self.task.log(record)

    # ---- state -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        ready = {} if self.ready is None else {f.name: getattr(self.ready, f.name) for f in fields(self.ready)}
        return {
            "student": self.learner.state_dict(),
            "job": {} if self.job is None else self.job.state_dict(),
            "ready": {name: value for name, value in ready.items() if value is not None},
            "step": self.step,
            "made": self.made,
            "left": self.left,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.learner.load_state_dict(state["student"])
        self.step, self.made, self.left = (int(state[name]) for name in ("step", "made", "left"))
        self.job = Job.from_state(self.inverter, state["job"]) if state.get("job") else None
        self.ready = ImageBatch(**state["ready"]) if state.get("ready") else None

    def snapshot(self) -> Snapshot | None:
        """None: there is no generator."""
        return None

    def student(self) -> ModelView:
        """The student that was trained along."""
        return self.learner.view

    def estimate(self) -> dict[str, float]:
        """{"seconds", "memory_bytes"}: inversion with competition, and a step of a throw-away student."""
        inverter = copy.copy(self.inverter)
        inverter.competitor = self.learner.view
        found = inverter.estimate()
        twin = copy.copy(self.learner)
        twin.view = copy.copy(twin.view)
        twin.view.module = copy.deepcopy(twin.view.module)
        twin.optimizer = torch.optim.SGD(twin.view.module.parameters(), lr=self.config.student_lr)
        twin.memory = torch.zeros(1, *self.task.teacher.input_size, dtype=torch.uint8)
        twin.learn(self.student_steps)
        begun = time.perf_counter()
        twin.learn(self.student_steps)
        seconds = found["seconds"] + self.student_steps * (time.perf_counter() - begun)
        memory = min(self.config.memory, self.task.images) * float(twin.memory.numel())
        return {"seconds": seconds, "memory_bytes": found["memory_bytes"] + memory}
