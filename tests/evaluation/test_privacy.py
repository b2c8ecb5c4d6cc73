"""The audit finds what was planted, and nothing where there is nothing; chance is what theory says it is."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from workshop import save_teacher

from synthkit.bank import Bank
from synthkit.bank.make import bank_from_arrays, noise_images
from synthkit.cli.bank import main
from synthkit.data.real import RealData
from synthkit.errors import DataError, ModelError, OutputExistsError, UsageError
from synthkit.evaluation.copies import find_copies
from synthkit.evaluation.features import Images, pixel_source
from synthkit.evaluation.neighbours import Neighbours, nearest
from synthkit.evaluation.privacy import _membership, audit, chance_limit

MNIST = Path(__file__).resolve().parents[3] / "shared" / "data"


def pictures(n: int, seed: int, side: int = 12) -> np.ndarray:
    """Smooth random images with a little noise: one distribution, any number of independent draws."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.normal(128, 60, (n, 1, 3, 3)))
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear").numpy()
    return np.clip(smooth + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)


def data(images: np.ndarray, name: str = "pictures", split: str = "train") -> RealData:
    labels = torch.zeros(len(images), dtype=torch.int64)
    return RealData(images=torch.from_numpy(images), labels=labels, class_names=["a"], name=name, root="x", split=split)


def bank_of(path, images: np.ndarray, **options) -> Bank:
    rest = {"num_classes": 2, "mean": [0.5], "std": [0.2], "label_kind": "argmax", **options}
    return bank_from_arrays(path, images, np.zeros(len(images), int), **rest)


def run(bank: Bank, train: np.ndarray, held: np.ndarray | None, **options):
    holdout = None if held is None else data(held, split="test")
    return audit(bank, data(train), holdout, [pixel_source(bank.shape)], **{"replicates": 1000, **options})


# --- copies, pixel for pixel


def moved(image: np.ndarray, dy: int, dx: int, fill: int | None = None) -> np.ndarray:
    out = np.roll(image, (dy, dx), (1, 2))
    if fill is not None:
        if dy:
            out[:, slice(0, dy) if dy > 0 else slice(dy, None)] = fill
        if dx:
            out[:, :, slice(0, dx) if dx > 0 else slice(dx, None)] = fill
    return out


@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_copy_is_found_and_named(channels):
    rng = np.random.default_rng(0)
    real = rng.integers(0, 256, (200, channels, 14, 16), dtype=np.uint8)
    made = rng.integers(0, 256, (60, channels, 14, 16), dtype=np.uint8)
    mirrored = real[:, :, :, ::-1]
    made[3], made[5] = real[10], mirrored[11]
    made[7], made[9] = moved(real[12], 2, -1), moved(real[13], -2, 2, fill=0)
    made[11], made[13] = moved(mirrored[14], 1, 0, fill=255), moved(real[15], 3, 0)
    made[15] = real[16]
    made[15, 0, 7, 7] ^= 1
    made[17] = real[17]
    made[17, :, 0] = 9  # only the border differs
    found = find_copies(Images.of_array(made), Images.of_array(real))
    assert dict(zip(found.rows.tolist(), found.sources.tolist(), strict=True)) == {
        3: 10, 5: 11, 7: 12, 9: 13, 11: 14, 17: 17}  # fmt: skip
    assert found.counts() == {"exact": 1, "shifted": 3, "mirrored": 1, "mirrored and shifted": 1}
    alone = find_copies(Images.of_array(made), Images.of_array(real), max_shift=0, mirror=False)
    assert alone.rows.tolist() == [3]


def test_images_of_one_colour_are_no_copies_of_each_other():
    real, made = pictures(20, 0), pictures(20, 1)
    real[3] = made[4] = made[5] = 7
    found = find_copies(Images.of_array(made), Images.of_array(real))
    assert len(found.rows) == 0 and found.blank == 2


def test_the_lowest_of_equal_training_images_is_named():
    real = pictures(30, 0)
    real[[9, 20]] = real[4]
    found = find_copies(Images.of_array(real[[20, 9]]), Images.of_array(real))
    assert found.sources.tolist() == [4, 4] and found.kinds.tolist() == [0, 0]


def test_small_images_are_shifted_less():
    tiny = np.random.default_rng(0).integers(0, 256, (10, 1, 6, 6), dtype=np.uint8)
    assert find_copies(Images.of_array(tiny), Images.of_array(tiny)).shift == 0
    medium = np.random.default_rng(0).integers(0, 256, (10, 1, 9, 9), dtype=np.uint8)
    found = find_copies(Images.of_array(np.roll(medium, 1, 3)), Images.of_array(medium))
    assert found.shift == 1 and found.counts()["shifted"] == 10


# --- chance


@pytest.mark.parametrize(("n", "m", "place"), [(50, 80, 1), (200, 100, 3), (30, 30, 30)])
def test_the_limit_of_chance_holds_in_simulation(n, m, place):
    rng = np.random.default_rng(0)
    limit, draws = chance_limit(n, m, place, level=0.95), 20_000
    threshold = np.sort(rng.random((draws, m)), axis=1)[:, place - 1]
    counts = rng.binomial(n, threshold)
    assert (counts <= limit).mean() >= 0.945 and (counts <= limit - 1).mean() < 0.955


def test_the_limit_of_chance_in_corners():
    assert chance_limit(10, 10, 11 - 1, level=1.0) == 10 and 0 <= chance_limit(1, 1, 1) <= 1


# --- the audit


def test_a_bank_of_training_images_is_found(tmp_path):
    train, held = pictures(300, 0), pictures(300, 1)
    result = run(bank_of(tmp_path / "b", train, contains_real=True), train, held)
    assert result["copies"]["exact"] == result["copies"]["found"] == 300
    member = result["spaces"][0]["membership"]
    assert member["auc"] == 1.0 == member["low"] and member["p"] < 0.001
    assert result["verdict"]["level"] == "real images"
    assert "CONTAINS REAL IMAGES: 300 of 300" in result["verdict"]["text"]
    assert result["verdict"]["text"].startswith("By its own record this bank contains real pixels.")


@pytest.mark.parametrize("seed", range(4))
def test_independent_images_of_the_same_distribution_are_not_accused(tmp_path, seed):
    result = run(bank_of(tmp_path / "b", pictures(400, 90 + seed)), pictures(500, seed), pictures(500, 50 + seed))
    space = result["spaces"][0]
    assert space["membership"]["low"] <= 0.5 <= space["membership"]["high"] and not space["near"]["found"]
    assert result["verdict"]["level"] == "nothing found" and result["copies"]["found"] == 0
    assert "no privacy guarantee" in result["verdict"]["text"] and "FOUND" not in result["verdict"]["text"]


def test_more_training_than_holdout_images_do_not_bias_membership(tmp_path):
    """The nearest of 3,000 images is nearer than the nearest of 300: unequal sets would accuse an innocent bank."""
    made, train, held = pictures(300, 0), pictures(3000, 1), pictures(300, 2)
    naive = (nearest(*_flat(train, made)).distances < nearest(*_flat(held, made)).distances).mean()
    assert naive > 0.85
    member = run(bank_of(tmp_path / "b", made), train, held)["spaces"][0]["membership"]
    assert member["share"] == naive and member["by_chance"] == pytest.approx(3000 / 3300)
    assert member["low"] <= 0.5 <= member["high"] and member["p"] > 0.01


def test_few_copies_of_many_training_images_show_in_membership(tmp_path):
    """A bank of 200 of 3,000 training images: a training sample as small as the hold-out would hold 20 of them."""
    train, held = pictures(3000, 1), pictures(300, 2)
    member = run(bank_of(tmp_path / "b", train[:200]), train, held)["spaces"][0]["membership"]
    assert member["auc"] == 1.0 == member["low"] and member["p"] < 0.001


def test_a_holdout_that_is_nearer_than_chance_is_told(tmp_path):
    train, held = pictures(400, 0), pictures(400, 1)
    made = np.clip(held[:200].astype(int) + np.random.default_rng(2).normal(0, 3, (200, 1, 12, 12)).round(), 0, 255)
    result = run(bank_of(tmp_path / "b", made.astype(np.uint8)), train, held)
    assert result["spaces"][0]["membership"]["high"] < 0.5 and result["verdict"]["level"] == "nothing found"
    assert any("nearer to the hold-out than chance" in note for note in result["notes"])


def test_membership_by_hand():
    """Five bank images, three nearest to training: odds 3 / 2, times M / N = 2 / 6, is 1 / 2."""
    gaps = np.array([[1.0], [1.0], [1.0], [3.0], [3.0]])
    rows = np.array([[0], [1], [1], [4], [4]])
    train, held = Neighbours(gaps, rows), Neighbours(np.full((5, 1), 2.0), np.array([[0], [0], [0], [1], [0]]))
    found = _membership(train, held, (6, 2), 1000, 0)
    assert found["share"] == 0.6 and found["by_chance"] == 0.75 and found["auc"] == pytest.approx(1 / 3)
    assert found["nearest"] == 4 and found["low"] is None  # training 0 and 1, hold-out 0 and 1
    # P(share >= 3 / 5) with weights 1, 2, 1, 1 and labels that are training with 3 / 4: all but the sums 0, 1 and 2
    q = 0.25
    below = q**4 + 3 * 0.75 * q**3 + (3 * 0.75**2 * q**2 + 0.75 * q**3)
    assert found["p"] == pytest.approx(1 - below, abs=0.05)


def _flat(*sets: np.ndarray) -> list[np.ndarray]:
    return [x.reshape(len(x), -1).astype(np.float32) for x in sets]


@pytest.mark.parametrize("rest", ["noise", "same distribution"])
def test_planted_copies_are_counted(tmp_path, rest):
    rng = np.random.default_rng(0)
    train, held = pictures(600, 0), pictures(600, 1)
    made = noise_images(600, (1, 12, 12), 0) if rest == "noise" else pictures(600, 2)
    rows = rng.permutation(600)[:60]
    for number, row in enumerate(rows):
        image = train[number]
        if number < 15:
            made[row] = image
        elif number < 30:
            made[row] = np.clip(image + rng.normal(0, 1.5, image.shape).round(), 0, 255)
        elif number < 45:
            made[row] = image[:, :, ::-1]
        else:
            made[row] = moved(image, *[(1, 0), (-2, 1), (0, 2)][number % 3], fill=0)
    result = run(bank_of(tmp_path / "b", made), train, held)
    counts = result["copies"]
    assert (counts["exact"], counts["mirrored"], counts["shifted"], counts["found"]) == (15, 15, 15, 45)
    near = result["spaces"][0]["near"]
    assert near["found"] and 15 <= near["count"] <= 15 + near["limit"]
    if rest == "noise":
        assert near["count"] == 15
    noisy = set(rows[15:30].tolist())
    flagged = {row for row, _, _, is_near in result["spaces"][0]["closest"] if is_near}
    assert noisy <= flagged and not flagged & set(rows[:15].tolist())
    text = result["verdict"]["text"]
    assert "CONTAINS REAL IMAGES: 45 of 600" in text and "NEAR COPIES FOUND" in text
    assert {p["kind"] for p in result["pairs"]} >= {"exact", "mirrored", "shifted", "near"}


def test_near_copies_alone_are_named_as_that(tmp_path):
    train, held, made = pictures(500, 0), pictures(500, 1), pictures(500, 2)
    noise = np.random.default_rng(3).normal(0, 1.5, (40, 1, 12, 12)).round()
    made[:40] = np.clip(train[:40] + noise, 0, 255)
    result = run(bank_of(tmp_path / "b", made), train, held)
    assert result["verdict"]["level"] == "near copies" and "CONTAINS" not in result["verdict"]["text"]


def test_typical_images_are_not_copies(tmp_path):
    """A bank of means is nearer to the training images than hold-out images are; but to many, and to the others too."""
    train, held = pictures(2000, 0), pictures(2000, 1)
    made = np.clip(128 + np.random.default_rng(2).normal(0, 4, (400, 1, 12, 12)), 0, 255).astype(np.uint8)
    result = run(bank_of(tmp_path / "b", made), train, held)
    space = result["spaces"][0]
    assert space["bank"]["median"] < space["reference"]["median"]
    assert not space["near"]["found"] and result["verdict"]["level"] == "nothing found"


def test_noise_is_clean(tmp_path):
    made = noise_images(300, (1, 12, 12), 0)
    result = run(bank_of(tmp_path / "b", made), pictures(400, 0), pictures(400, 1))
    assert result["verdict"]["level"] == "nothing found" and result["spaces"][0]["near"]["count"] == 0


def test_without_a_holdout_membership_is_not_claimed(tmp_path):
    train, made = pictures(400, 0), pictures(300, 1)
    made[:50] = np.clip(train[:50].astype(int) + 1, 0, 255)
    result = run(bank_of(tmp_path / "b", made), train, None)
    space = result["spaces"][0]
    assert space["membership"] is None and result["holdout"] is None and space["near"]["found"]
    assert space["reference_is"] == "training images among themselves"
    clean = run(bank_of(tmp_path / "c", pictures(300, 2)), train, None)
    assert "Membership was not measured" in clean["verdict"]["text"] and clean["verdict"]["level"] == "nothing found"
    assert any("--holdout" in note for note in clean["notes"])


def test_a_holdout_that_is_none_is_told(tmp_path):
    train, made = pictures(300, 0), pictures(100, 1)
    bank = bank_of(tmp_path / "b", made)
    with pytest.raises(DataError, match="300 are also training images"):
        run(bank, train, train)
    mixed = np.concatenate([pictures(200, 2), train[:30], made[:7]])
    result = run(bank, train, mixed)
    assert result["holdout"]["used"] == 207 and result["holdout"]["equal_to_training"] == 30
    assert result["holdout"]["in_bank"] == 7 and any("took part" in note for note in result["notes"])


def test_a_bank_that_says_it_is_real_but_holds_other_images(tmp_path):
    result = run(bank_of(tmp_path / "b", pictures(100, 5), contains_real=True), pictures(300, 0), pictures(300, 1))
    text = result["verdict"]["text"]
    assert text.startswith("By its own record this bank contains real pixels. None of its images was found")
    assert result["verdict"]["level"] == "nothing found"


def test_wrong_input(tmp_path):
    bank = bank_of(tmp_path / "b", pictures(20, 0))
    with pytest.raises(DataError, match="at least 12"):
        run(bank, pictures(5, 1), None)
    with pytest.raises(DataError, match="the bank's"):
        run(bank, pictures(30, 1, side=16), None)
    for options in ({"percentile": 0}, {"percentile": 80}, {"limit": 0}, {"replicates": 10}):
        with pytest.raises(UsageError):
            run(bank, pictures(30, 1), None, **options)


def test_single_images_and_resized_ones(tmp_path):
    bank = bank_of(tmp_path / "b", pictures(1, 2))
    train = data(pictures(40, 0, side=16)).resized((1, 12, 12))
    result = audit(bank, train, data(pictures(40, 1), split="test"), [pixel_source(bank.shape)], limit=1)
    assert result["bank"]["compared"] == 1 and result["verdict"]["level"] == "nothing found"
    assert any("resized from (1, 16, 16)" in note for note in result["notes"])
    assert result["spaces"][0]["membership"]["low"] is None


def test_the_same_audit_twice(tmp_path):
    bank, train, held = bank_of(tmp_path / "b", pictures(150, 2)), pictures(200, 0), pictures(200, 1)
    one, two = (run(bank, train, held, limit=90) for _ in range(2))
    assert {**one, "seconds": 0} == {**two, "seconds": 0} and one["bank"]["compared"] == 90
    assert one["copies"]["searched"] == 150 and json.loads(json.dumps(one)) == one


# --- the command


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)


def save(path: Path, images: np.ndarray, test: np.ndarray | None = None) -> str:
    labels = np.zeros(len(images), int)
    more = {} if test is None else {"images_test": test[:, 0], "labels_test": np.zeros(len(test), int)}
    names = ("images", "labels") if test is None else ("images_train", "labels_train")
    np.savez(path, **{names[0]: images[:, 0], names[1]: labels, "class_names": ["<script>x</script>"]}, **more)
    return f"npz:{path}"


def test_command(tmp_path, capsys):
    train, held, made = pictures(200, 0), pictures(150, 1), pictures(120, 2)
    made[:10] = train[:10]
    bank_of(tmp_path / "<b>", made)
    real = save(tmp_path / "real.npz", train, held)
    words = ["audit", str(tmp_path / "<b>"), "--real", real, "--device", "cpu"]
    page, picture, record = (tmp_path / name for name in ("r.html", "p.png", "r.json"))
    assert main([*words, "--out", str(page), "--pairs", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "CONTAINS REAL IMAGES: 10 of 120" in text and "150 images of" in text and "measured in pixels only" in text
    html = page.read_text()
    parser = Page()
    parser.feed(html)
    assert "script" not in parser.tags and "b" not in parser.tags and "CONTAINS REAL IMAGES" in html
    assert "http://" not in html and "https://" not in html and picture.read_bytes().startswith(b"\x89PNG")
    assert main([*words, "--features", "pixels", "--out", str(record), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(record.read_text()) and printed["verdict"]["level"] == "real images"
    with pytest.raises(OutputExistsError):
        main([*words, "--out", str(record)])
    with pytest.raises(UsageError, match="html or .json"):
        main([*words, "--out", str(tmp_path / "r.txt")])
    with pytest.raises(UsageError, match="give --real"):
        main(["audit", str(tmp_path / "<b>")])
    with pytest.raises(ModelError, match="remembers no teacher"):
        main([*words, "--features", "teacher"])


def test_command_with_both_spaces_and_another_holdout(tmp_path, capsys):
    bank_of(tmp_path / "b", pictures(60, 2))
    real, held = save(tmp_path / "real.npz", pictures(80, 0)), save(tmp_path / "held.npz", pictures(70, 1))
    teacher = save_teacher(tmp_path, classes=2)
    words = ["audit", str(tmp_path / "b"), "--real", real, "--teacher", str(teacher), "--device", "cpu", "--json"]
    assert main([*words, "--holdout", held]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [s["features"]["kind"] for s in result["spaces"]] == ["pixels", "teacher"]
    assert result["holdout"]["used"] == 70 and all(s["membership"]["holdout"] == 70 for s in result["spaces"])
    assert main(words) == 0  # this file has no test part
    assert json.loads(capsys.readouterr().out)["holdout"] is None


# --- real images


@pytest.mark.slow
@pytest.mark.skipif(not (MNIST / "MNIST").is_dir(), reason="needs ../shared/data/MNIST")
def test_mnist(tmp_path):
    from synthkit.data.specs import load_data

    size = (1, 28, 28)
    train, test = (load_data(f"mnist:{MNIST}", split, size=size) for split in ("train", "test"))
    train = train.subset(20_000, seed=0)
    ours, others = test.images.numpy()[:2000], test.images.numpy()[2000:]
    holdout = data(others, "mnist", "test")

    def check(name: str, images: np.ndarray):
        bank = bank_of(tmp_path / name, images)
        return audit(bank, train, holdout, [pixel_source(bank.shape)], limit=2000)

    copied = check("train", train.images.numpy()[:2000])
    assert copied["copies"]["exact"] == 2000 and copied["spaces"][0]["bank"]["p90"] == 0
    assert copied["spaces"][0]["membership"]["low"] > 0.99 and copied["verdict"]["level"] == "real images"

    innocent = check("test", ours)
    member = innocent["spaces"][0]["membership"]
    assert innocent["copies"]["found"] == 0 and member["low"] <= 0.5 <= member["high"]
    assert innocent["verdict"]["level"] == "nothing found"

    rng, planted = np.random.default_rng(0), ours.copy()
    for number, row in enumerate(rng.permutation(2000)[:100]):
        image = train.images.numpy()[number]
        planted[row] = [image, np.clip(image + rng.normal(0, 6, image.shape).round(), 0, 255), image[:, :, ::-1],
                        moved(image, 1, -2)][number % 4]  # fmt: skip
    found = check("planted", planted)
    copies, near = found["copies"], found["spaces"][0]["near"]
    assert copies["exact"] == 25 and copies["found"] == 75 and near["found"] and near["count"] >= 25
    assert check("noise", noise_images(500, size, 0))["verdict"]["level"] == "nothing found"
