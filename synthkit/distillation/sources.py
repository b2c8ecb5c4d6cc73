"""Where the trainer's images come from: a bank, real data, fresh generator images or noise.

Every source is a pure function of (seed, step): the order of an epoch, the augmentation, the fresh latents and the
noise are drawn from generators that are made anew for each step. A resumed run therefore needs no sampler state, and
each rank takes its slice of the same global batch, so one process and several train the same student.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from synthkit.bank.reading.order import BlockOrder
from synthkit.data.augment import augment, check_policy
from synthkit.distillation.contract import Batch
from synthkit.distillation.stores import ResidentStore, Store, StreamedStore, bank_store, free_memory
from synthkit.errors import BankError, ConfigError, DataError, RequirementError
from synthkit.synthesis.curriculum import rising

if TYPE_CHECKING:
    from torch import Tensor

    from synthkit.bank import Bank

__all__ = [
    "BatchSource", "BlockShuffled", "EasyToHard", "GeneratorPool", "NoiseSource", "Order", "RandomOrder",
    "ResidentStore", "Store", "StoreSource", "StreamedStore", "bank_store", "free_memory",
    "split_holdout", "stream_seed", "torch_generator",
]  # fmt: skip

_STREAMS = {
    name: number
    for number, name in enumerate(
        ("order", "augment", "fresh", "noise", "holdout", "weights", "dropout", "subset", "loss"), start=1
    )
}  # the numbers are part of every seed: only append


def stream_seed(seed: int, stream: str, *position: int) -> int:
    """A 63-bit seed that depends on the run's seed, the purpose and the position (step, epoch, rank)."""
    sequence = np.random.SeedSequence([seed, _STREAMS[stream], *position])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def torch_generator(seed: int, stream: str, *position: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh torch generator for one purpose and position; the global one is never touched."""
    return torch.Generator(device=device).manual_seed(stream_seed(seed, stream, *position))


def split_holdout(n: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices (training, held out) of `n` images; a pure function of the seed.

    Raises:
        ConfigError: the share leaves nothing to train on.
    """
    if not 0 <= share < 1:
        raise ConfigError("holdout is a share in [0, 1)", got=share)
    held = round(share * n)
    if n - held < 2:
        raise ConfigError(f"holdout leaves {n - held} of {n} images for training", got=share, hint="lower --holdout")
    order = np.random.default_rng(stream_seed(seed, "holdout")).permutation(n)
    return np.sort(order[held:]), np.sort(order[:held])


# --- orders -----------------------------------------------------------------------------------------------------------


class RandomOrder:
    """Every epoch a new permutation of the training indices."""

    def __init__(self, indices: np.ndarray, seed: int):
        self.indices, self.seed = indices, seed

    def epoch(self, epoch: int) -> np.ndarray:
        """(n,) indices in the order of this epoch."""
        rng = np.random.default_rng(stream_seed(self.seed, "order", epoch))
        return self.indices[rng.permutation(len(self.indices))]


def easy_share(epoch: int, epochs: int, start: float = 0.3, until: float = 0.5) -> float:
    """Share of the easiest images that epoch `epoch` (from 0) of `epochs` counts: from `start` to 1, linear, reached
    at the share `until` of the run."""
    return rising(epoch / max(until * epochs, 1e-9), start, 1.0)


class EasyToHard:
    """Random order over the easiest images; the share that may be drawn grows with the run.

    In epoch e of E the easiest `share(e) = min(1, start + (1 - start) * e / (until * E))` of the images are shuffled
    and repeated until the epoch has as many draws as there are images (pacing of Hacohen & Weinshall 2019, linear).
    """

    def __init__(
        self, indices: np.ndarray, difficulty: np.ndarray, seed: int, epochs: int, *, start: float = 0.3, until=0.5
    ):
        ranks = np.argsort(difficulty[indices], kind="stable")
        self.indices, self.seed = indices[ranks], seed
        self.epochs, self.start, self.until = epochs, start, until

    def share(self, epoch: int) -> float:
        """Share of the images that epoch `epoch` (from 0) draws from."""
        return easy_share(epoch, self.epochs, self.start, self.until)

    def epoch(self, epoch: int) -> np.ndarray:
        """(n,) indices in the order of this epoch."""
        n = len(self.indices)
        easy = self.indices[: max(2, math.ceil(self.share(epoch) * n))]
        rng = np.random.default_rng(stream_seed(self.seed, "order", epoch))
        passes = [easy[rng.permutation(len(easy))] for _ in range(math.ceil(n / len(easy)))]
        return np.concatenate(passes)[:n]


class BlockShuffled:
    """For banks that are read from disk: blocks of neighbouring images in random order, shuffled inside windows.

    How far this is from uniform is said in bank/reading/order.py; with independent images nothing is lost.
    """

    def __init__(self, bank: Bank, indices: np.ndarray, seed: int):
        self.bank, self.indices, self.seed = bank, indices, seed
        self._kept = np.zeros(len(bank), bool)
        self._kept[indices] = True
        self._order: BlockOrder | None = None

    def order(self, epoch: int) -> BlockOrder:
        """The order of all images of the bank, held out or not."""
        if self._order is None or self._order.epoch != epoch:
            seed = stream_seed(self.seed, "order", epoch)
            self._order = BlockOrder(n=len(self.bank), seed=seed, epoch=epoch, block=self.bank.block_rows)
        return self._order

    def epoch(self, epoch: int) -> np.ndarray:
        """(n,) indices in the order of this epoch."""
        order = self.order(epoch).part(0, len(self.bank))
        return order[self._kept[order]]

    def ahead(self, epoch: int, share: float) -> tuple[int, np.ndarray]:
        """(window, its images as they lie on the disk) of the window after the one at `share` of the epoch."""
        order = self.order(epoch)
        window = order.window_at(min(int(share * len(self.bank)), len(self.bank) - 1)) + 1
        return window, order.blocks_of(window) if window < order.windows else np.zeros(0, np.int64)


Order = RandomOrder | EasyToHard | BlockShuffled


# --- fresh images -----------------------------------------------------------------------------------------------------


class GeneratorPool:
    """The bank's generator snapshots of the last half of its making; one, chosen uniformly, paints each batch.

    Raises:
        RequirementError: the bank holds none. BankError: a snapshot is damaged or does not say what it is.
        ModelError, WeightsError: its generator is unknown, or the weights do not fit it.
    """

    def __init__(self, bank: Bank, device: torch.device):
        from synthkit.models.generators import build_generator
        from synthkit.models.weights import fit_state_dict

        records = bank.generators()
        if not records:
            raise RequirementError(
                f"fresh: bank {bank.path} holds no generator snapshots",
                hint="leave --fresh out, or make the bank with a generator method of synthkit (e.g. cudfkd)",
            )
        late = [r for r in records if int(r.path.stem) >= bank.spec.shards // 2]
        self.networks = []
        for record in late or records:
            spec = record.meta.get("generator", {})
            if "name" not in spec or "latent_dim" not in spec:
                raise BankError(f"{record.path}: the snapshot does not say which generator it is", got=record.meta)
            network = build_generator(**{**spec, "mean": bank.mean, "std": bank.std, "seed": 0})
            state = {key: torch.from_numpy(np.array(value)) for key, value in record.load().items()}
            fit_state_dict(
                network, {k: v.float() if v.is_floating_point() else v for k, v in state.items()}, str(record.path)
            )
            self.networks.append(network.to(device).eval().requires_grad_(False))
        self.device = device

    @torch.no_grad()
    def images(self, count: int, seed: int, step: int) -> Tensor:
        """(count, C, H, W) float32 in [0, 1]; a pure function of (seed, step)."""
        generator = torch_generator(seed, "fresh", step)
        chosen = int(torch.randint(len(self.networks), (1,), generator=generator))
        network = self.networks[chosen]
        z = torch.randn(count, *network.latent_shape, generator=generator)
        return network(z.to(self.device)).float().clamp_(0, 1)


# --- sources ----------------------------------------------------------------------------------------------------------


class BatchSource(Protocol):
    """What the trainer reads."""

    batch_size: int
    steps_per_epoch: int

    def batch(self, step: int) -> Batch:
        """This rank's slice of the global batch of `step`."""
        ...

    def close(self) -> None: ...


class _Sliced:
    """Augment the global batch and cut this rank's part out of it.

    The augmentation of a batch is one call with one generator, so every rank augments the whole global batch (cheap
    beside the networks) and the draws do not depend on the number of ranks.
    """

    def __init__(self, batch_size: int, *, rank: int, world: int, policy: str, seed: int, device: torch.device):
        if batch_size % world:
            raise ConfigError(f"batch_size must be a multiple of the {world} processes", got=batch_size)
        self.batch_size, self.policy, self.seed, self.device = batch_size, check_policy(policy), seed, device
        self.slice = slice(rank, None, world)  # strided, so that fresh and stored images spread over the ranks

    def finish(self, batch: Batch, step: int) -> Batch:
        images = batch.images
        if self.policy != "none":
            images = augment(images, self.policy, torch_generator(self.seed, "augment", step))
        images = images[self.slice]
        return Batch(
            images=images.float().div_(255) if images.dtype == torch.uint8 else images.float().contiguous(),
            labels=None if batch.labels is None else batch.labels[self.slice],
            logits=None if batch.logits is None else batch.logits[self.slice],
            index=None if batch.index is None else batch.index[self.slice],
        )


class StoreSource(_Sliced):
    """Batches of a store in a given order, a share of each batch drawn anew from generator snapshots."""

    def __init__(
        self,
        store: Store,
        order: Order,
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        policy: str = "none",
        seed: int = 0,
        device: torch.device,
        fresh: float = 0.0,
        pool: GeneratorPool | None = None,
    ):
        super().__init__(batch_size, rank=rank, world=world, policy=policy, seed=seed, device=device)
        if batch_size > len(order.indices):
            raise DataError(
                "fewer training images than one batch",
                got=len(order.indices),
                hint=f"use --batch_size {max(2, len(order.indices))} or less",
            )
        self.store, self.order, self.pool = store, order, pool
        self.fresh = round(fresh * batch_size) if pool is not None else 0
        self.steps_per_epoch = len(order.indices) // batch_size  # the last partial batch is dropped
        self._epoch: tuple[int, np.ndarray] | None = None
        self._window: tuple[int, int] | None = None

    def indices(self, step: int) -> np.ndarray:
        """Indices of the stored part of the global batch of `step`."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self.order.epoch(epoch))
        count = self.batch_size - self.fresh
        return self._epoch[1][position * count : (position + 1) * count]

    def batch(self, step: int) -> Batch:
        found = self.store.gather(self.indices(step))
        found.index = torch.from_numpy(self.indices(step)).to(self.device, non_blocking=True)
        self.store.announce(self.indices(step + 1))
        self._load_window(step)
        if self.fresh and self.pool is not None:
            anew = self.pool.images(self.fresh, self.seed, step)
            stored = found.images.float().div_(255) if found.images.dtype == torch.uint8 else found.images.float()
            index = torch.cat([found.index, found.index.new_full((self.fresh,), -1)])
            found = Batch(images=torch.cat([stored, anew]), index=index)
        return self.finish(found, step)

    def _load_window(self, step: int) -> None:
        """In block order: have the disk load the next window while this one is used."""
        if not isinstance(self.order, BlockShuffled):
            return
        epoch, position = divmod(step, self.steps_per_epoch)
        window, images = self.order.ahead(epoch, position / self.steps_per_epoch)
        if self._window != (epoch, window):
            self._window = (epoch, window)
            self.store.load_ahead(images)

    def close(self) -> None:
        self.store.close()


class NoiseSource(_Sliced):
    """Control: pixels drawn from N(0.5, 0.25^2), clipped to [0, 1], new ones in every step.

    An unlimited supply, so at least as strong as an equal-size bank of noise.
    """

    def __init__(self, shape: tuple[int, int, int], batch_size: int, steps_per_epoch: int, **kwargs):
        super().__init__(batch_size, **kwargs)
        self.shape, self.steps_per_epoch = shape, steps_per_epoch

    def batch(self, step: int) -> Batch:
        generator = torch_generator(self.seed, "noise", step)
        images = torch.randn((self.batch_size, *self.shape), generator=generator).mul_(0.25).add_(0.5).clamp_(0, 1)
        return self.finish(Batch(images=images.to(self.device)), step)

    def close(self) -> None:
        """Nothing to do."""
