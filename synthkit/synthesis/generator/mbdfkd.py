"""MB-DFKD: data-free distillation that rehearses batches of earlier images from a small memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from synthkit.lazy import torch
from synthkit.synthesis.generator.config import at_least_one
from synthkit.synthesis.generator.loop import GeneratorLoop
from synthkit.synthesis.generator.replay import ReplayConfig, novel_terms

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MBDFKDConfig(ReplayConfig):
    """MB-DFKD."""

    capacity: int = 10
    """Batches that the memory holds; the oldest is overwritten."""
    push_every: int = 5
    """Epochs between two batches that are remembered, from the first epoch on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "capacity", "push_every")


class CyclicMemory:
    """The last `capacity` batches pushed, in half precision; slots are overwritten in turn."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.entries: list[Tensor] = []
        self.pushes = 0

    def push(self, images: Tensor) -> None:
        """Keep a copy of `images` (n, C, H, W) in the slot whose turn it is."""
        # the plain layout, which a resumed run finds as well: the same kernels, the same bits
        entry = images.detach().to(torch.float16, memory_format=torch.contiguous_format, copy=True)
        slot = self.pushes % self.capacity
        self.entries[slot : slot + 1] = [entry]
        self.pushes += 1

    def state(self) -> dict[str, Any]:
        """Entries by slot, and the number of pushes."""
        return {"pushes": self.pushes, "entries": {str(i): entry for i, entry in enumerate(self.entries)}}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Inverse of `state`."""
        entries = state.get("entries", {})
        self.pushes = int(state["pushes"])
        self.entries = [entries[str(i)].to(device) for i in range(len(entries))]


class MBDFKD(GeneratorLoop):
    """Train generator and student in turn; every student step rehearses one batch of a memory of earlier images.

    Generator:  L_G of PRE-DFKD (`replay.replay_terms`): one-hot, class balance, activation, element-mean adversary.
    Student:    L_S = mean |s - t| over B fresh images and, once there is one, a memory entry of B/8 images, drawn
    uniformly. At the end of every `push_every`-th epoch, the first included, the first B/8 fresh images of its last
    student step enter the memory.
    `--curriculum easy2hard` raises the adversary's weight from `adv` by `grad_adv` per epoch and weighs every sample
    of L_S, rehearsed ones included, by its self-paced weight; published: neither (auto).

    Shapes: latents (B, nz) -> images (B, C, H, W), H a multiple of 4; not clamped to [0, 1] (the bank's are).
    Source: Binici et al., "Preventing Catastrophic Forgetting and Distribution Mismatch in Knowledge Distillation via
        Synthetic Data" (WACV 2022, arXiv 2108.05698), as re-implemented in gaurav104/LRA@40a8941
        `src/agents/predfkd_memory.py`, `src/utils/replay_memory_DFKD.py`; no code of the authors was found.
    Differs from source: entries are kept in half precision (released: float32 on the CPU); the student is in train
        mode in every generator step (released: in eval mode in the first of an epoch, a leftover of the evaluation);
        the choice of an entry comes from the step's own random stream; the spectral norms start from 15 power
        iterations.
    Cost: student steps on 9/8 of the images, and capacity B/8 C H W 2 bytes of memory.
    """

    Config: ClassVar[type] = MBDFKDConfig
    student_always_trains: ClassVar[bool] = True
    generator_always_trains: ClassVar[bool] = True
    config: MBDFKDConfig

    def __init__(self, config: MBDFKDConfig, task):
        super().__init__(config, task)
        self.replay = CyclicMemory(config.capacity)

    def generator_terms(self, images: Tensor) -> dict[str, Tensor]:
        """The weighted terms of L_G."""
        return novel_terms(self, images)

    def student_step(self) -> Tensor:
        """One student update on fresh images and a memory entry; the end of some epochs is remembered."""
        fresh = self.student_images()
        recalled = self.recall()
        loss = self.learn(fresh if recalled is None else torch.cat([fresh, recalled.to(fresh.dtype)]))
        if (self.step + 1) % self.config.ep_steps == 0 and self.epoch % self.config.push_every == 0:
            self.replay.push(fresh[: self.config.rehearsed])
        return loss

    def recall(self) -> Tensor | None:
        """A memory entry, drawn uniformly for the current step; none while the memory is empty."""
        entries = self.replay.entries
        if not entries:
            return None
        return entries[int(self.task.numpy_rng("memory", self.step).integers(len(entries)))]

    def extra_state(self) -> dict[str, Any]:
        """The memory."""
        return {"memory": self.replay.state()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Inverse of `extra_state`."""
        self.replay.load(state["memory"], self.device)
