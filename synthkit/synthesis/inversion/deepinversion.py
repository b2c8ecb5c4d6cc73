"""DeepInversion: images out of a trained classifier through its classes and its BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from synthkit.errors import ConfigError
from synthkit.synthesis.base import ImageBatch, Makes, Requires, Task
from synthkit.synthesis.independent import IndependentLoop
from synthkit.synthesis.inversion.config import InversionConfig
from synthkit.synthesis.inversion.job import Job, even_parts
from synthkit.synthesis.inversion.loop import Inverter, makes_of_config, requires_of

NETWORKS = ("verifier", "competitor")


@dataclass(frozen=True, kw_only=True)
class DeepInversionConfig(InversionConfig):
    """DeepInversion; the defaults are the published CIFAR-10 settings."""

    competitor: str | None = None
    """Model spec of a fixed student that the images compete with (`competition`); the method `adi` trains one along."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.competitor is None) != (self.competition == 0):
            raise ConfigError(
                "method.competitor and method.competition go together",
                got=(self.competitor, self.competition),
                hint="name a network and a weight (0.2 on ImageNet, 1 on CIFAR-10), or neither; adi trains a student",
            )


class DeepInversion(IndependentLoop):
    """Optimise pixels until the teacher sees the intended class and its BatchNorm layers what they saw in training.

    min_x  ce CE(t(v(x)), y) + bn R(v(x)) + tv_l2 TV_2 + tv_l1 TV_1 + l2 mean_i ||x_i|| + l2_batch ||x||
           [+ c (1 - clamp(JS(s, t), 0, 1)) against a fixed student s]
    with R = sum_l w_l (||var_l - running_var_l||_2 + ||mean_l - running_mean_l||_2) over the inputs of the BatchNorm
    layers, and v a random view (crop, roll, flip). Several teachers: sum_k w_k (CE_k + R_k), or in turn.
    `--curriculum` matters only where crops are on (`crop`): with an easy-to-hard one the views go from whole images to
    small parts (CDA); without crops nothing gets harder and it is no part of the recipe.

    Shapes: pixels (B, C, H, W) in the teacher's normalised space; images uint8; labels (B,) the intended classes, row r
        being class r mod K; logits (B, K) of the stored images.
    Source: Yin et al., "Dreaming to distill" (CVPR 2020, arXiv 1912.08795); NVlabs/DeepInversion@2413af1. Crops and
        their curriculum: SRe2L (arXiv 2306.13092), CDA (arXiv 2311.18838), VILA-Lab/SRe2L@8d00cba.
    Differs from source: the last iterate is kept (the CIFAR script's "best" is an alias of it); every shard's classes
        are balanced; a shard is cut into nearly equal batches; the teacher is frozen; mosaic starts are tiles of
        random crops, not of the ones that the teacher likes best (RDED).
    Cost: per iteration one forward and one backward to the input of each teacher in use (and competitor); O(B).
    """

    requires: ClassVar[Requires] = Requires(batchnorm=True, shardable=True, max_teachers=16, networks=NETWORKS)
    makes: ClassVar[Makes] = Makes(label_kind="target")
    Config: ClassVar[type] = DeepInversionConfig
    config: DeepInversionConfig

    def __init__(self, config: DeepInversionConfig, task: Task):
        super().__init__(config, task)
        self.inverter = Inverter(config, task, task.networks.get("competitor"))
        if task.warn and config.bn and task.per_shard < min(config.batch_size, task.images):
            task.warn(
                f"shards hold {task.per_shard} images, so batches are smaller than method.batch_size"
                f" {config.batch_size} and match BatchNorm statistics worse; raise --images_per_shard"
            )

    @classmethod
    def requires_for(cls, config: DeepInversionConfig) -> Requires:
        """BatchNorm while its term is on, data for a real start, the curriculum where crops are on."""
        return requires_of(config, shardable=True, networks=NETWORKS)

    @classmethod
    def makes_for(cls, config: DeepInversionConfig) -> Makes:
        """Images of intended classes, which start from real pixels or not."""
        return makes_of_config(config)

    @property
    def work_per_image(self) -> int:
        """Iterations."""
        return self.inverter.iterations

    def make_batch(self, start: int, count: int) -> ImageBatch:
        """The rows from `start` on, optimised together."""
        labels = self.inverter.labels(start, count)
        job = Job(self.inverter, start, labels, self.inverter.start(start, labels))
        return self.inverter.finish(job.run(self._tell))

    def _tell(self, images: int) -> int:
        self.advance(images)
        return self.step

    def _batches(self, start: int, end: int) -> Iterator[ImageBatch]:
        """Nearly equal batches of the shard: BatchNorm statistics over a small remainder would be poor."""
        for first, last in even_parts(start // self.task.per_shard * self.task.per_shard, end, self.config.batch_size):
            if first >= start:
                yield self.make_batch(first, last - first)

    def estimate(self) -> dict[str, float]:
        """{"seconds", "memory_bytes"} of all images."""
        return self.inverter.estimate()
