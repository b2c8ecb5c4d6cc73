"""Set metrics against other libraries, closed forms and naive loops; the command with its controls."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from workshop import save_teacher

from synthkit.bank import Bank
from synthkit.bank.make import bank_from_arrays
from synthkit.cli.bank import main
from synthkit.data.real import RealData
from synthkit.errors import BankError, DataError, ModelError, NonFiniteError, UsageError
from synthkit.evaluation.features import FeatureSource, Images, features, pixel_source, sample, view_source
from synthkit.evaluation.set_metrics import (
    diversity,
    far_out_fence,
    frechet_distance,
    manifold_metrics,
    vendi_score,
)
from synthkit.evaluation.stats import bank_stats
from synthkit.models.build import load_model
from synthkit.models.view import TeacherView


def cloud(n: int, width: int = 6, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(n, width)) * scale + shift).astype(np.float32)


# --- Frechet distance


def test_frechet_of_axis_aligned_gaussians_is_the_closed_form():
    """For diagonal covariances: |mu|^2 + sum (s_a - s_b)^2; the samples are whitened so that the moments are exact."""
    raw = np.random.default_rng(0).normal(size=(500, 4))
    raw -= raw.mean(0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw.T)).T)
    a, b = white * [1, 2, 3, 4], white * [2, 2, 1, 0] + [1, 0, 0, 2]
    expected = (1 + 4) + (1 + 0 + 4 + 16)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_agrees_with_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    a, b = cloud(300), cloud(260, seed=1, scale=1.3, shift=0.2)
    moments = [
        torch.tensor(f(x.astype(np.float64))) for x in (a, b) for f in (lambda v: v.mean(0), lambda v: np.cov(v.T))
    ]
    assert frechet_distance(a, b) == pytest.approx(float(fid._compute_fid(*moments)), rel=1e-8)


def test_frechet_of_fewer_vectors_than_dimensions():
    a, b = cloud(10, width=40), cloud(12, width=40, seed=1)
    assert math.isfinite(frechet_distance(a, b)) and frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    with pytest.raises(DataError, match="at least 2"):
        frechet_distance(a[:1], b)


# --- precision, recall, density, coverage


@pytest.mark.parametrize("k", [1, 3, 5])
def test_manifold_metrics_agree_with_prdc(k):
    prdc = pytest.importorskip("prdc")
    a, b = cloud(310), cloud(270, seed=1, scale=1.1, shift=0.2)
    ours, theirs = manifold_metrics(a, b, k), prdc.compute_prdc(a, b, k)
    assert ours == pytest.approx({name: float(value) for name, value in theirs.items()}, abs=1e-12)


def test_manifold_metrics_by_hand():
    """On a line, k = 1: real 0, 1, 10 have radii 1, 1, 9; made 0.5, 30, 31 have radii 29.5, 1, 1."""
    real, made = (np.array(v, np.float32)[:, None] for v in ([0, 1, 10], [0.5, 30, 31]))
    assert manifold_metrics(real, made, 1) == {
        "precision": 1 / 3,  # 0.5 lies in the balls of 0 and 1, and of 10 (9.5 > 9: no)
        "recall": 1.0,  # all lie within 29.5 of 0.5
        "density": 2 / 3,
        "coverage": 2 / 3,
    }


def test_the_surface_of_a_ball_is_outside():
    real, made = (np.array(v, np.float32)[:, None] for v in ([0, 2, 100], [4, 5, 6]))
    assert manifold_metrics(real, made, 1)["density"] == pytest.approx(3 / 3)  # only the ball of 100 (radius 98)


def test_too_few_images_for_k():
    with pytest.raises(DataError, match="at least 6"):
        manifold_metrics(cloud(5), cloud(50), 5)


# --- diversity


def test_vendi_counts_equal_groups():
    groups = np.repeat(np.eye(5, dtype=np.float32) * [[1], [2], [3], [4], [5]], 8, axis=0)  # length does not matter
    assert vendi_score(groups) == pytest.approx(5, rel=1e-9)
    assert vendi_score(np.ones((9, 4), np.float32)) == pytest.approx(1, rel=1e-9)
    assert vendi_score(groups[:3]) == pytest.approx(1, rel=1e-9)


def test_vendi_is_that_of_the_kernel_matrix():
    x = cloud(30, width=50)
    unit = x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    values = np.linalg.eigvalsh(unit @ unit.T / 30)
    values = values[values > 1e-12]
    assert vendi_score(x) == pytest.approx(np.exp(-(values * np.log(values)).sum()), rel=1e-6)


def test_diversity_by_hand():
    found = diversity(np.array([[0.0], [3.0], [3.0], [7.0]], np.float32))
    assert found["mean_pairwise"] == pytest.approx((3 + 3 + 7 + 0 + 4 + 4) / 6, rel=1e-6)
    assert found["nearest_median"] == pytest.approx(1.5) and found["identical"] == 2 and found["n"] == 4
    assert diversity(cloud(1))["mean_pairwise"] is None


def test_far_out_fence_by_hand():
    logs = np.tile([0.0, 1.0, 2.0, 3.0, 4.0], 20)  # quartiles 1 and 3
    assert far_out_fence(np.append(np.exp(logs), [0.0] * 50)) == pytest.approx(math.exp(1 - 3 * 2))
    assert far_out_fence(np.append(np.ones(49), np.zeros(9))) is None
    assert (far_out_fence(np.ones(50)) or 1) < 1  # where all are equal, none is far out
    ordinary = np.random.default_rng(0).normal(size=100_000)
    assert (np.exp(ordinary) < (far_out_fence(np.exp(ordinary)) or 0)).sum() <= 3  # 1.2 in a million for a log-normal


# --- features


def images(n: int, side: int = 8, seed: int = 0, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, channels, side, side), dtype=np.uint8)


def test_pixel_distance_is_the_root_mean_square():
    pair = np.stack([np.zeros((3, 8, 8), np.uint8), np.full((3, 8, 8), 51, np.uint8)])
    found = features(pixel_source((3, 8, 8)), Images.of_array(pair))
    assert np.linalg.norm(found[0] - found[1]) == pytest.approx(51 / 255, rel=1e-6)
    large = pixel_source((3, 64, 48))
    assert "averaged to 32 x 32" in large.name
    assert features(large, Images.of_array(images(2, 64, channels=3)[:, :, :, :48])).shape == (2, 3 * 32 * 32)


def test_features_do_not_hang_on_the_batch_and_the_network_stays_as_it_was(tmp_path):
    loaded = load_model(str(save_teacher(tmp_path, side=32)))
    view = TeacherView.from_loaded(loaded)
    view.module.train()
    source, pixels = view_source(view, sha256=loaded.sha256), images(1100, 32)
    rows = np.array([1050, 3, 3, 700])
    whole = features(source, Images.of_array(pixels))
    np.testing.assert_allclose(features(source, Images.of_array(pixels), rows), whole[rows], rtol=1e-4, atol=1e-5)
    assert whole.dtype == np.float32 and view.module.training
    assert all(not m._forward_pre_hooks for m in view.module.modules())
    lengths = np.linalg.norm(features(source.normalised(), Images.of_array(pixels), rows), axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)
    assert "length 1" in source.normalised().record()["name"] and source.record()["sha256"] == loaded.sha256


def test_features_that_are_not_finite_are_refused():
    source = FeatureSource(kind="pixels", name="broken", extract=lambda x: x.flatten(1).float() / 0,
                           input_size=(1, 8, 8), device=torch.device("cpu"))  # fmt: skip
    with pytest.raises(NonFiniteError, match="broken"):
        features(source, Images.of_array(images(3)))
    with pytest.raises(DataError, match="no images"):
        features(pixel_source((1, 8, 8)), Images.of_array(images(0)))


def test_noise_and_samples_are_functions_of_the_seed():
    noise = Images.noise(50, (1, 4, 4), 7)
    np.testing.assert_array_equal(noise.rows(np.array([9, 2])), noise.rows(np.arange(50))[[9, 2]])
    assert not np.array_equal(noise.rows(np.array([9])), Images.noise(50, (1, 4, 4), 8).rows(np.array([9])))
    rows = sample(1000, 10, 3)
    assert len(set(rows.tolist())) == 10 and (np.diff(rows) > 0).all() and np.array_equal(rows, sample(1000, 10, 3))
    assert np.array_equal(sample(5, 10, 0), np.arange(5))


# --- the command


def blobs(n: int, seed: int, spread: float = 25.0) -> tuple[np.ndarray, np.ndarray]:
    """Three kinds of small images, some noise around each."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    means = np.random.default_rng(99).integers(60, 200, (3, 1, 8, 8))
    return np.clip(means[labels] + rng.normal(0, spread, (n, 1, 8, 8)), 0, 255).astype(np.uint8), labels


def small_bank(path, n: int = 120, seed: int = 1, **options) -> Bank:
    pixels, labels = blobs(n, seed)
    return bank_from_arrays(
        path, pixels, labels, num_classes=3, mean=[0.5], std=[0.2], label_kind="argmax", **options
    )  # fmt: skip


def real_data(n: int = 300, seed: int = 2) -> RealData:
    pixels, labels = blobs(n, seed)
    return RealData(images=torch.from_numpy(pixels), labels=torch.from_numpy(labels), class_names=list("abc"),
                    name="blobs", root="here")  # fmt: skip


def test_stats_put_the_bank_between_its_controls(tmp_path):
    bank = small_bank(tmp_path / "b")
    result = bank_stats(bank, pixel_source(bank.shape), real=real_data())
    table = result["against_real"]
    assert table["n"] == 120 and table["k"] == 5
    assert table["real"]["fd_pixels"] < table["noise"]["fd_pixels"] / 5 > table["bank"]["fd_pixels"]
    assert table["noise"]["coverage"] == 0 and table["real"]["coverage"] > 0.9 < table["bank"]["coverage"]
    assert 0.7 < table["real"]["density"] < 1.3
    assert sorted(result["diversity"]["per_class"]) == ["0", "1", "2"]
    assert result["features"]["name"] == "pixels" and "fid" not in json.dumps(result).lower()
    assert json.loads(json.dumps(result)) == result


def test_stats_see_a_collapsed_bank(tmp_path):
    pixels, _ = blobs(3, 1)
    repeated = np.repeat(pixels[:1], 100, axis=0)
    bank = bank_from_arrays(tmp_path / "b", repeated, None, num_classes=3, mean=[0.5], std=[0.2])
    found = bank_stats(bank, pixel_source(bank.shape), real=real_data())
    own = found["diversity"]
    assert own["identical"] == 100 and own["vendi"] == pytest.approx(1) and own["mean_pairwise"] == pytest.approx(0)
    assert own["per_class"] is None and found["against_real"]["bank"]["coverage"] < 0.4


def test_stats_use_equal_numbers_and_say_what_they_sampled(tmp_path):
    bank = small_bank(tmp_path / "b")
    result = bank_stats(bank, pixel_source(bank.shape), real=real_data(60), limit=100)
    assert result["against_real"]["n"] == 30 and result["diversity"]["n"] == 100
    assert any("random sample of 100" in note for note in result["notes"])
    assert any("60 real and 100 bank" in note for note in result["notes"])
    with pytest.raises(DataError, match="more than 5"):
        bank_stats(bank, pixel_source(bank.shape), real=real_data(10))
    with pytest.raises(UsageError):
        bank_stats(bank, pixel_source(bank.shape), limit=1)


def test_stats_command(tmp_path, capsys):
    small_bank(tmp_path / "b", extra={"licence": "x"})
    pixels, labels = blobs(80, 5)
    np.savez(tmp_path / "real.npz", images=pixels[:, 0], labels=labels)
    words = ["stats", str(tmp_path / "b"), "--real", f"npz:{tmp_path / 'real.npz'}", "--device", "cpu"]
    assert main([*words, "--features", "pixels"]) == 0
    text = capsys.readouterr().out
    assert "fd_pixels" in text and "noise" in text and "it is no FID" in text and "k = 5" in text
    with pytest.raises(ModelError, match="remembers no teacher"):
        main(words)
    with pytest.raises(UsageError, match="no part"):
        main([*words, "--features", "pixels", "--teacher", "lenet5"])
    teacher = save_teacher(tmp_path, arch="lenet5_bn", classes=3)
    assert main([*words, "--teacher", str(teacher), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["against_real"]["bank"]) == {"fd_teacher", "precision", "recall", "density", "coverage"}
    assert any("resized from (1, 8, 8) to (1, 32, 32)" in note for note in result["notes"])
    assert result["features"]["sha256"] and result["versions"]["torch"]


def test_stats_of_an_empty_bank(tmp_path):
    from bank.banks import make_spec

    from synthkit.bank import BankWriter

    bank = Bank(BankWriter.create(tmp_path / "b", make_spec()).path)
    with pytest.raises(BankError, match="no shard"):
        bank_stats(bank, pixel_source(bank.shape))
