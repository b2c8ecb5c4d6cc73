"""Sources: pure functions of (seed, step), the same global batch for any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from synthkit.bank import Bank
from synthkit.bank.labels.stored import StoredLogits
from synthkit.distillation import sources, stores
from synthkit.distillation.sources import (
    BlockShuffled,
    EasyToHard,
    GeneratorPool,
    NoiseSource,
    RandomOrder,
    ResidentStore,
    StoreSource,
    StreamedStore,
    bank_store,
    split_holdout,
)
from synthkit.errors import BankError, ConfigError, DataError, RequirementError

CPU = torch.device("cpu")


def store_of(n: int = 40) -> ResidentStore:
    """Image i has every pixel i."""
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 8, 8).contiguous()
    return ResidentStore(images, torch.arange(n), None, CPU)


def source_of(batch_size: int = 8, **options) -> StoreSource:
    order = options.pop("order", RandomOrder(np.arange(40), 5))
    return StoreSource(store_of(), order, batch_size, device=CPU, seed=5, **options)


def test_holdout_is_a_pure_function_of_the_seed():
    train, held = split_holdout(101, 0.1, seed=3)
    assert len(held) == 10 and sorted([*train, *held]) == list(range(101))
    assert np.array_equal(held, split_holdout(101, 0.1, seed=3)[1])
    assert not np.array_equal(held, split_holdout(101, 0.1, seed=4)[1])
    assert len(split_holdout(10, 0.0, seed=0)[1]) == 0
    for share in (1.0, -0.1):
        with pytest.raises(ConfigError, match="holdout"):
            split_holdout(10, share, seed=0)
    with pytest.raises(ConfigError, match="leaves 0 of 2"):
        split_holdout(2, 0.9, seed=0)


def test_an_epoch_takes_every_image_once_and_epochs_differ():
    source = source_of()
    assert source.steps_per_epoch == 5
    seen = [source.batch(step) for step in range(10)]
    labels = [torch.cat([b.labels for b in seen[at : at + 5]]).tolist() for at in (0, 5)]
    assert sorted(labels[0]) == sorted(labels[1]) == list(range(40))
    assert labels[0] != labels[1]
    for batch in seen:  # images go with their labels, in [0, 1]
        assert torch.equal(batch.images[:, 0, 0, 0], batch.labels.float() / 255)


def test_a_batch_does_not_depend_on_what_was_read_before():
    fresh, walked = source_of(policy="crop_flip"), source_of(policy="crop_flip")
    for step in range(7):
        walked.batch(step)
    assert torch.equal(walked.batch(7).images, fresh.batch(7).images)


@pytest.mark.parametrize("policy", ["none", "crop_flip"])
def test_ranks_share_the_global_batch(policy):
    whole = source_of(policy=policy).batch(3)
    parts = [source_of(policy=policy, rank=r, world=2).batch(3) for r in range(2)]
    assert torch.equal(whole.labels, torch.stack([p.labels for p in parts], 1).flatten())
    assert torch.equal(whole.images, torch.stack([p.images for p in parts], 1).flatten(0, 1))


def test_batch_size_must_divide_and_fit():
    with pytest.raises(ConfigError, match="multiple of the 3 processes"):
        source_of(8, world=3)
    with pytest.raises(DataError, match="fewer training images"):
        source_of(41)


def test_last_partial_batch_is_dropped():
    assert source_of(9).steps_per_epoch == 4


def test_easy_to_hard_grows():
    difficulty = np.linspace(1, 0, 40)  # image 39 is the easiest
    order = EasyToHard(np.arange(40), difficulty, seed=1, epochs=10)
    assert [order.share(e) for e in (0, 1, 5, 9)] == pytest.approx([0.3, 0.44, 1.0, 1.0])
    first = order.epoch(0)
    assert len(first) == 40 and set(first) == set(range(28, 40))
    counts = np.bincount(first)[28:]
    assert counts.max() - counts.min() <= 1  # passes over the easy ones, none preferred
    assert sorted(order.epoch(5)) == list(range(40))
    assert np.array_equal(first, EasyToHard(np.arange(40), difficulty, seed=1, epochs=10).epoch(0))
    some = np.array([2, 4, 8])
    assert set(EasyToHard(some, difficulty, seed=1, epochs=4).epoch(3)) == {2, 4, 8}


def test_streamed_equals_resident(workshop):
    bank = Bank(workshop.bank)
    order = RandomOrder(np.arange(len(bank)), 2)
    resident = StoreSource(ResidentStore.from_bank(bank, CPU, logits=StoredLogits(bank)), order, 16, device=CPU)
    streamed = StoreSource(StreamedStore(bank, CPU, logits=StoredLogits(bank)), order, 16, device=CPU)
    for step in (0, 1, 2, 11, 12, 5):  # over an epoch's end, and a jump that the prefetch did not foresee
        a, b = resident.batch(step), streamed.batch(step)
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        assert torch.equal(a.logits, b.logits) and a.logits.dtype == torch.float32
    streamed.close()


def test_a_bank_that_does_not_fit_is_streamed(workshop, monkeypatch):
    bank = Bank(workshop.bank)
    assert bank_store(bank, CPU, logits=None).resident
    monkeypatch.setattr(stores, "free_memory", lambda device: len(bank) * 1024)
    store = bank_store(bank, CPU, logits=None)
    assert not store.resident
    store.close()


def test_a_bank_beyond_memory_is_read_in_blocks(workshop):
    bank = Bank(workshop.bank, mapped_bytes=0)
    assert not bank.fits_memory
    train = np.setdiff1d(np.arange(192), [0, 7, 100, 191])
    order = BlockShuffled(bank, train, seed=2)
    first = order.epoch(0)
    assert sorted(first) == train.tolist() and not np.array_equal(first, order.epoch(1))
    assert np.array_equal(first, BlockShuffled(bank, train, seed=2).epoch(0))
    assert not np.array_equal(first, BlockShuffled(bank, train, seed=3).epoch(0))
    asked = []
    store = StreamedStore(bank, CPU, logits=None)
    store.load_ahead = asked.append
    source = StoreSource(store, order, 16, device=CPU)
    seen = [source.batch(step) for step in range(11)]
    images = np.concatenate([b.images.numpy() for b in seen])
    assert np.array_equal(images, workshop.images[first[:176]].astype(np.float32) / 255)
    assert len(asked) == 1  # one window: there is none after it
    source.close()


def test_the_next_window_is_asked_for_once_each(workshop, monkeypatch):
    bank = Bank(workshop.bank, mapped_bytes=0)
    monkeypatch.setattr(Bank, "block_rows", property(lambda self: 8))
    order = BlockShuffled(bank, np.arange(192), seed=2)
    monkeypatch.setattr(BlockShuffled, "order", lambda self, epoch: small_windows(bank, epoch))
    asked = []
    store = StreamedStore(bank, CPU, logits=None)
    store.load_ahead = asked.append
    source = StoreSource(store, order, 16, device=CPU)
    for step in range(source.steps_per_epoch):
        source.batch(step)
    expected = [order.order(0).blocks_of(window) for window in range(1, 6)]  # every window but the first, once
    found = [rows for rows in asked if len(rows)]
    assert len(found) == 5 and all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    source.close()


def small_windows(bank: Bank, epoch: int):
    from synthkit.bank.reading.order import BlockOrder

    return BlockOrder(n=192, seed=2, epoch=epoch, block=8, window=4)


def test_noise_statistics_and_ranks():
    noise = NoiseSource((3, 16, 16), 64, 5, rank=0, world=1, policy="none", seed=1, device=CPU)
    images = noise.batch(0).images
    assert images.shape == (64, 3, 16, 16) and float(images.min()) >= 0 and float(images.max()) <= 1
    assert float(images.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(images.std()) == pytest.approx(0.24, abs=0.01)  # 0.25 before clipping at two sigma
    assert not torch.equal(images, noise.batch(1).images)
    half = NoiseSource((3, 16, 16), 64, 5, rank=1, world=2, policy="none", seed=1, device=CPU)
    assert torch.equal(half.batch(0).images, images[1::2])


# --- fresh images -----------------------------------------------------------------------------------------------------


def test_fresh_share_of_a_batch(generator_bank):
    pool = GeneratorPool(generator_bank, CPU)
    assert len(pool.networks) == 2
    order = RandomOrder(np.arange(100), 3)
    options = {"policy": "none", "seed": 3, "device": CPU, "fresh": 0.25, "pool": pool}
    source = StoreSource(ResidentStore.from_bank(generator_bank, CPU, logits=None), order, 16, **options)
    images = source.batch(2).images
    stored = torch.from_numpy(generator_bank.batch(source.indices(2)).images).float() / 255
    assert images.shape == (16, 1, 32, 32) and source.steps_per_epoch == 6
    assert torch.equal(images[:12], stored)
    assert torch.equal(images[12:], pool.images(4, 3, 2)) and not torch.equal(images[12:], pool.images(4, 3, 3))
    parts = [StoreSource(source.store, order, 16, rank=r, world=2, **options).batch(2).images for r in range(2)]
    assert torch.equal(images, torch.stack(parts, 1).flatten(0, 1))


def test_every_late_snapshot_is_drawn(generator_bank):
    pool = GeneratorPool(generator_bank, CPU)
    drawn = set()
    for step in range(20):
        generator = sources.torch_generator(0, "fresh", step)
        chosen = int(torch.randint(2, (1,), generator=generator))
        latent = torch.randn(2, 6, generator=generator)
        with torch.no_grad():
            expected = [network(latent) for network in pool.networks]
        assert torch.equal(pool.images(2, 0, step), expected[chosen]) and not torch.equal(*expected)
        drawn.add(chosen)
    assert drawn == {0, 1}


def test_snapshots_missing_or_unnamed(workshop, generator_bank):
    with pytest.raises(RequirementError, match="no generator snapshots"):
        GeneratorPool(Bank(workshop.bank), CPU)
    for record in (generator_bank.path / "generators").glob("*.json"):
        record.write_text(record.read_text().replace('"name"', '"nome"'))
    with pytest.raises(BankError, match="does not say which generator"):
        GeneratorPool(Bank(generator_bank.path), CPU)
