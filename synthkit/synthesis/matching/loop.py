"""The loop that all matching methods share: pixels are parameters, a method says what one outer iteration does to them.

It owns the pixels and their optimiser, the first images, labels, progress, figures, health, state, and the images at
the end. After every iteration it offers the engine a safe point. Gradients of gradients are taken in float32, whatever
the run's precision is: what is matched are differences of nearby numbers.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from synthkit.errors import NonFiniteError, RequirementError
from synthkit.lazy import torch
from synthkit.synthesis.base import (
    BankFacts,
    ImageBatch,
    Makes,
    Requires,
    Snapshot,
    Task,
    load_optimizer_state,
    optimizer_state,
    seeded_init,
    to_uint8,
)
from synthkit.synthesis.matching.config import MatchingConfig
from synthkit.synthesis.matching.pool import RealPool, Space
from synthkit.synthesis.memory import SavedBytes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from synthkit.models.view import ModelView


class MatchingLoop:
    """Base of the matching family (see the module text). Row r of the bank has class r mod K."""

    requires: ClassVar[Requires] = Requires(teacher=False, real_data=True, curriculum=False)
    makes: ClassVar[Makes] = Makes(label_kind="target", at_once=True)
    Config: ClassVar[type] = MatchingConfig
    default_ipc: ClassVar[int] = 10
    """Images per class where the task does not say."""
    prelude = 0
    """Steps of `prepare`, before the first iteration."""

    def __init__(self, config: Any, task: Task):
        name = type(self).__name__
        if task.data is None:
            raise RequirementError(f"{name} matches real data", hint="give it: --data cifar10:DIR")
        if task.runtime.world > 1:
            raise RequirementError(
                f"{name} is one optimisation and runs in one process",
                got=f"{task.runtime.world} processes",
                hint="start it once per --seed and join the banks",
            )
        self.config, self.task, self.spec, self.device = config, task, task.image_spec, task.runtime.device
        self.channels, height, self.side = self.spec.shape
        if height != self.side:
            raise RequirementError(f"{name} takes square images", got=self.spec.shape)
        self.space = self._space(task)
        self.real = RealPool(task.data, self.space, self.device)
        self.labels = torch.arange(task.images) % self.spec.num_classes
        self.classes = [
            (label, places)
            for label in range(self.spec.num_classes)
            if len(places := (self.labels == label).nonzero()[:, 0])
        ]
        self.ipc = len(self.classes[0][1])
        self.targets = self.labels.to(self.device)
        self.pixels = self.first_pixels().to(self.device)
        self.optimizer = torch.optim.SGD(self._parameter_groups(), lr=config.lr_img, momentum=config.momentum)
        self.step = self.stored = 0
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    @classmethod
    def makes_for(cls, config: MatchingConfig) -> Makes:
        """Images that start from real ones count as real."""
        return Makes(label_kind="target", contains_real=config.init != "noise", at_once=True)

    # ---- what a method defines -------------------------------------------------------------------------------

    def iteration(self, draws: torch.Generator) -> dict[str, Tensor]:
        """One outer iteration: update the pixels; returns figures (scalar tensors without gradient).

        All randomness comes from `draws` (a CPU generator of this iteration) and `fresh_network`.
        """
        raise TypeError(f"{type(self).__name__} must define iteration")

    def prepare(self) -> Iterator[None]:
        """Work before the first iteration (expert trajectories); yields at safe points."""
        yield from ()

    def first_pixels(self) -> Tensor:
        """The first images in training space, (N, C, H, W)."""
        draws = self.task.rng("first-images", "cpu")
        if self.config.init == "noise":
            return torch.randn(self.task.images, *self.spec.shape, generator=draws)
        return self.real.take(self.real.balanced(self.labels, draws))

    def figures_of_end(self) -> dict[str, float]:
        """Figures for the record of the shards."""
        return {}

    def label_logits(self) -> Tensor | None:
        """Learnt soft labels (N, K), where there are any."""
        return None

    def _space(self, task: Task) -> Space:
        return Space(self.spec, self.device)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.pixels]}]

    # ---- the loop --------------------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        """Steps of preparation and outer iterations of the run."""
        return self.prelude + self.config.iterations

    @property
    def done(self) -> int:
        """Outer iterations done."""
        return self.step - self.prelude

    def generate(self) -> Iterator[ImageBatch | None]:
        """Iterate to the end, then yield the images."""
        yield from self.prepare()
        while self.step < self.total_steps:
            self._note(self.iteration(self.task.rng(f"iteration-{self.done}", "cpu")))
            self.advance(1)
            yield None
        chunk = min(256, max(1, self.task.images // 100))
        while self.stored < self.task.images:
            start, self.stored = self.stored, min(self.stored + chunk, self.task.images)
            yield self._images(start, self.stored)

    def advance(self, steps: int) -> None:
        """Count `steps` more as done."""
        self.step += steps
        if self.task.tick:
            self.task.tick(steps)

    def fresh_network(self, stream: str) -> nn.Module:
        """A network with fresh weights of the stream called `stream`, in train mode."""
        return self.build(self.task.seed_of(stream))

    def build(self, seed: int) -> nn.Module:
        """A network with the fresh weights of `seed`, in train mode on the run's device."""
        from synthkit.models.build import build_model

        network = seeded_init(
            lambda: build_model(
                self.config.arch,
                num_classes=self.spec.num_classes,
                in_channels=self.channels,
                image_size=self.side,
            ),
            seed,
        )
        network.to(self.device)
        if self.task.runtime.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stub lacks the keyword
        return network.train()

    def update(self, gradient: Tensor) -> None:
        """One SGD step of the pixels."""
        self.pixels.grad = gradient
        self.optimizer.step()

    def _images(self, start: int, end: int) -> ImageBatch:
        pixels = self.pixels[start:end]
        if not bool(torch.isfinite(pixels).all()):
            raise NonFiniteError("pixels became NaN or infinite", hint="lower --method.lr_img")
        seen = self.space.leave(pixels)
        logits = self.label_logits()
        return ImageBatch(
            images=to_uint8(seen).cpu(),
            pixels=(pixels if self.space.zca else seen).cpu(),
            labels=self.labels[start:end],
            logits=None if logits is None else logits[start:end].float().cpu(),
            step=self.step,
            meta=self.figures_of_end(),
        )

    # ---- figures and health ----------------------------------------------------------------------------------

    def _note(self, figures: dict[str, Tensor]) -> None:
        for name, value in figures.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1
        done = self.done + 1
        if done % max(1, self.config.iterations // 100) and done < self.config.iterations:
            return
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        self.check(means)
        if self.task.log:
            self.task.log({"step": self.step + 1, "iteration": done, **means})

    def check(self, means: dict[str, float]) -> None:
        """Stop when a figure is NaN or infinite."""
        bad = [name for name, value in means.items() if not abs(value) < float("inf")]
        if bad:
            raise NonFiniteError(
                f"matching diverged before iteration {self.done + 1}: {', '.join(bad)} is NaN or infinite",
                hint="lower --method.lr_img",
            )

    # ---- state -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next iteration depends on (random numbers follow from its number)."""
        return {
            "pixels": self.pixels.detach(),
            "optimizer": optimizer_state(self.optimizer),
            "sums": dict(self._sums),
            "counts": dict(self._counts),
            "step": self.step,
            "stored": self.stored,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.pixels.copy_(state["pixels"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        self._sums = {name: value.to(self.device) for name, value in state.get("sums", {}).items()}
        self._counts = dict(state.get("counts", {}))
        self.step, self.stored = int(state["step"]), int(state["stored"])

    def facts(self) -> BankFacts:
        """The whitening behind the pixels, if there is one."""
        zca = self.space.zca
        return BankFacts(transform=("zca", zca.arrays(), {"eps": zca.eps}) if zca else None)

    def snapshot(self) -> Snapshot | None:
        """None: there is no generator."""
        return None

    def student(self) -> ModelView | None:
        """None: there is no student."""
        return None

    # ---- cost ------------------------------------------------------------------------------------------------

    def estimate(self) -> dict[str, float]:
        """Seconds and bytes of the whole run, measured on a throw-away copy."""
        twin = self._twin()
        with SavedBytes() as saved:
            begun = time.perf_counter()
            seconds = twin.measured_iteration()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds = time.perf_counter() - begun if seconds is None else seconds
        return {"seconds": seconds * self.config.iterations, "memory_bytes": 1.5 * saved.bytes + self.real.bytes}

    def measured_iteration(self) -> float | None:
        """Do one iteration, or a piece of it and return the seconds that a whole one would have taken."""
        self.iteration(self.task.rng("estimate", "cpu"))
        return None

    def _twin(self):
        twin = copy.copy(self)
        twin.pixels = self.pixels.clone()
        twin.optimizer = torch.optim.SGD(twin._parameter_groups(), lr=self.config.lr_img)
        return twin
