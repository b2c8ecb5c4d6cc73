"""The loop of the methods with a memory bank: synthesise a batch, remember it, let the student learn from all of them.

The memory bank is synthkit's bank: every call's batch is yielded to it as bytes, and a resumed run reads its memory
back from the committed shards (`Task.earlier`). There are ceil(images / synthesis_batch) calls; the first `warmup` of
them come before the student starts, the others are spread evenly over its steps. A method says how a batch is made
(`synthesise`) and, where it differs, which images the student sees (`student_images`) and what it minimises (`distil`).

Source of the order: zju-vipa/CMI@9e79fa9 `datafree_kd.py:main_worker` (methods/dfkd.md 1.1). Differs from source: the
memory holds exactly the bank's bytes instead of a growing folder of PNG files, and is drawn from with replacement.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from synthkit.lazy import torch
from synthkit.synthesis.base import ImageBatch, Makes, Snapshot, Task
from synthkit.synthesis.generator.config import PoolConfig
from synthkit.synthesis.generator.cost import SMALL, timed, trial, weight_bytes
from synthkit.synthesis.generator.student import StudentLoop

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = ("images", "labels", "logits", "difficulty")


class PoolLoop(StudentLoop):
    """Base of the methods with a memory bank (see the module text)."""

    Config: ClassVar[type] = PoolConfig
    makes: ClassVar[Makes] = Makes(label_kind="target")

    def __init__(self, config: Any, task: Task):
        super().__init__(config, task)
        self.calls = math.ceil(task.images / config.synthesis_batch)
        self.warm_calls = min(self.calls, math.ceil(config.warmup * self.calls))
        self.memory = torch.zeros(task.images, *self.teacher.input_size, dtype=torch.uint8, device=self.device)
        self.called = 0  # synthesis calls done
        self.remembered = 0  # rows of the memory that are filled
        self.ready: ImageBatch | None = None  # the newest batch: in the memory, not yet yielded

    # ---- what a method defines -------------------------------------------------------------------------------

    def synthesise(self, call: int) -> tuple[Tensor, Tensor | None]:
        """One batch: images (S, C, H, W) in [0, 1] without gradient and their target labels (S,), or none.

        A pure function of the state and of draws from `task.rng(f"call-{call}-...")`.
        """
        raise TypeError(f"{type(self).__name__} must define synthesise")

    def student_images(self) -> Tensor:
        """Images (B, C, H, W) of one student step: rows of the memory, augmented; pure in (seed, learned)."""
        from synthkit.data.augment import augment

        draw = self.task.rng(f"student-{self.learned}")
        rows = torch.randint(0, self.remembered, (self.config.batch_size,), generator=draw, device=self.device)
        return augment(self.memory[rows], self.config.augment, draw)

    # ---- progress --------------------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        """Iterations of all synthesis calls, and student steps."""
        return self.calls * self.config.g_steps + self.student_steps

    @property
    def learned(self) -> int:
        """Student steps done."""
        return self.step - self.called * self.config.g_steps

    @property
    def warming(self) -> bool:
        """Whether the present call belongs to the warm-up, before the student starts."""
        return self.called < self.warm_calls

    def adversarial_weight(self, epoch: int) -> float:
        """As of the other methods, and 0 while the student has not started."""
        return 0.0 if self.warming else super().adversarial_weight(epoch)

    def _starts_at(self, call: int) -> int:
        """Student step before which a call is made."""
        rest = self.calls - self.warm_calls
        return 0 if call < self.warm_calls else (call - self.warm_calls) * self.student_steps // max(1, rest)

    def _advance(self, steps: int) -> None:
        self.step += steps
        if self.task.tick:
            self.task.tick(steps)

    # ---- the loop --------------------------------------------------------------------------------------------

    def generate(self) -> Iterator[ImageBatch | None]:
        """Synthesise and learn in turn; a batch is yielded when the student's steps on it are done."""
        while True:
            while self.called < self.calls and self._starts_at(self.called) <= self.learned:
                if self.ready is not None:
                    yield self._hand_over()
                self._call()
                yield None
            if self.learned >= self.student_steps:
                break
            self._learn()
            yield None
        while self.called < self.calls:  # only where there are more calls than student steps
            if self.ready is not None:
                yield self._hand_over()
            self._call()
        if self.ready is not None:
            yield self._hand_over()

    def _call(self) -> None:
        """One synthesis call: its images enter the memory."""
        self.student_view.module.eval().requires_grad_(False)
        with self.module_draws(f"call-modules-{self.called}"):
            images, labels = self.synthesise(self.called)
        room = len(self.memory) - self.remembered
        self.ready = self.described(images[:room], None if labels is None else labels[:room])
        end = self.remembered + len(self.ready.images)
        self.memory[self.remembered : end] = self.ready.images.to(self.device)
        self.remembered = end
        self.called += 1
        self._advance(self.config.g_steps)

    def _learn(self) -> None:
        """Student steps up to the next call or the end of the epoch."""
        c, epoch = self.config, self.epoch
        end = (epoch + 1) * c.ep_steps
        if self.called < self.calls:
            end = min(end, self._starts_at(self.called))
        lr = self.rate(c.schedule, c.lr, epoch, c.lr_min)
        for group in self.optimizer_s.param_groups:
            group["lr"] = lr
        self.student_view.module.train().requires_grad_(True)
        steps = end - self.learned
        with self.module_draws(f"modules-{self.learned}"):
            for _ in range(steps):
                self.learn(self.student_images())
                self.step += 1
        if self.task.tick:
            self.task.tick(steps)
        if end == (epoch + 1) * c.ep_steps:
            self._end_epoch(epoch, lr)

    def _hand_over(self) -> ImageBatch:
        batch, self.ready = self.ready, None
        assert batch is not None  # callers look first; the last call always leaves one
        batch.step = self.step
        self.stored += len(batch.images)
        return batch

    # ---- state -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on; the memory itself only where no bank can give it back."""
        ready = {} if self.ready is None else {name: getattr(self.ready, name) for name in COLUMNS}
        state = {**super().state_dict(), "called": self.called, "remembered": self.remembered, "ready": ready}
        return state if self.task.earlier else {**state, "memory": self.memory[: self.stored].cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.called, self.remembered = int(state["called"]), int(state["remembered"])
        super().load_state_dict(state)
        ready = state.get("ready")
        self.ready = ImageBatch(**ready, step=self.step) if ready else None
        parts = [self.task.earlier(self.stored) if self.task.earlier else state["memory"]]
        parts += [self.ready.images] if self.ready is not None else []
        self.memory[: self.remembered] = torch.cat(parts).to(self.device)

    def snapshot(self) -> Snapshot | None:
        """None: what the bank holds is the memory."""
        return None

    def estimate(self) -> dict[str, float]:
        """Seconds and bytes of the whole run, measured on a small batch of few iterations and undone."""
        c = self.config
        batch = min(c.synthesis_batch, SMALL) if self.device.type == "cpu" else c.synthesis_batch
        few = min(c.g_steps, 4)
        with trial(self, SMALL) as scale:
            object.__setattr__(self.config, "synthesis_batch", batch)
            object.__setattr__(self.config, "g_steps", few)
            call, saved = timed(self, lambda: self._trial_call())
            step, of_student = timed(self, lambda: self.learn(self.student_images()))
        of_call = c.synthesis_batch / batch
        return {
            "seconds": self.calls * call * of_call * c.g_steps / few + self.student_steps * step * scale,
            "memory_bytes": max(saved * of_call, of_student * scale) * 1.5
            + 4 * weight_bytes(self)
            + self.memory.nbytes,
        }

    def _trial_call(self) -> None:
        self._call()
        self.ready = None
        self.student_view.module.train().requires_grad_(True)
