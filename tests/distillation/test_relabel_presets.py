"""relabel: how the papers label, several teachers, and every combination of mode, storage and mix against a loop."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from synthkit.bank import Bank
from synthkit.bank.labels.topk import expand_topk
from synthkit.bank.labels.views import Views, apply_views, cutmix_boxes
from synthkit.bank.make import bank_from_arrays
from synthkit.cli.main import main
from synthkit.config.parse import parse_config
from synthkit.config.schema import RelabelConfig, RuntimeConfig
from synthkit.distillation.protocols import PROTOCOLS
from synthkit.distillation.relabel import relabel, teacher_mode
from synthkit.distillation.relabel_presets import PRESETS, Labelling, labelling
from synthkit.errors import ConfigError, ModelError, RequirementError
from synthkit.models.build import build_model, load_model
from synthkit.models.view import TeacherView
from synthkit.models.weights import save_weights

RUNTIME = RuntimeConfig(device="cpu")


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, list[str]]:
    """A bank of 20 images and the specs of two teachers with BatchNorm."""
    root = tmp_path_factory.mktemp("pair")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 1, 32, 32), dtype=np.uint8)
    bank_from_arrays(root / "bank", images, np.arange(20) % 4, num_classes=4, mean=[0.3], std=[0.3],
                     label_kind="target")  # fmt: skip
    return root / "bank", [teacher(root, "lenet5_half_bn", 1, mean=0.3), teacher(root, "lenet5_half_bn", 2, mean=0.5)]


def teacher(root: Path, arch: str, seed: int, *, mean: float) -> str:
    """The card of an untrained network with opinions and statistics of its own."""
    network = build_model(arch, num_classes=4, in_channels=1, image_size=32, seed=seed).train()
    with torch.no_grad():
        [m for m in network.modules() if isinstance(m, torch.nn.Linear)][-1].weight.mul_(25)
        for _ in range(3):
            network(torch.randn(64, 1, 32, 32, generator=torch.Generator().manual_seed(seed)))
    save_weights(network.eval(), root / f"{seed}.safetensors")
    card = {"arch": arch, "weights": f"{seed}.safetensors", "num_classes": 4, "input_size": [1, 32, 32],
            "mean": [mean], "std": [0.25]}  # fmt: skip
    (root / f"{seed}.json").write_text(json.dumps(card))
    return str(root / f"{seed}.json")


@pytest.fixture
def bank(pair, tmp_path) -> Path:
    shutil.copytree(pair[0], tmp_path / "bank")
    return tmp_path / "bank"


def config(bank: Path, teacher: str, name: str = "a", **changes) -> RelabelConfig:
    return RelabelConfig(**{"bank": str(bank), "name": name, "teacher": teacher, "runtime": RUNTIME, **changes})


def by_hand(bank: Path, name: str, specs: list[str], *, bn: str, combine: str, batch_size: int) -> torch.Tensor:
    """(rows, K) what the teachers say, batch by batch, of exactly the stored views."""
    opened = Bank(bank)
    labels, views = opened.labels(name), [TeacherView.from_loaded(load_model(s)) for s in specs]
    answers = []
    for first in range(0, len(labels), batch_size):
        rows = np.arange(first, min(first + batch_size, len(labels)))
        if bn == "batch":  # a small rest is filled up with the rows before it
            rows = np.arange(max(0, rows[-1] + 1 - batch_size), rows[-1] + 1)
        found = labels.views(rows)
        own, partners = (
            torch.from_numpy(opened.batch(r, ["images"]).images) for r in (found.sample, found.partner_sample)
        )
        images = apply_views(own, found, (32, 32), partners)
        members = []
        for view in views:
            with teacher_mode(view, bn), torch.no_grad():
                members.append(view(images).double())
        stacked = torch.stack(members)
        mean = stacked.mean(0) if combine == "logits" else stacked.softmax(2).mean(0).log()
        answers.append(mean[len(rows) - (min(first + batch_size, len(labels)) - first) :])
    return torch.cat(answers)


COMBINATIONS = list(itertools.product(("eval", "batch"), (None, 2), ("none", "mixup", "cutmix"), (1, 2)))


@pytest.mark.parametrize(("bn", "top_k", "mix", "teachers"), COMBINATIONS)
def test_every_combination_is_the_loop(bank, pair, bn, top_k, mix, teachers):
    specs = pair[1][:teachers]
    combine = "logits" if mix == "mixup" else "probs"
    relabel(config(bank, ",".join(specs), views=2, crop_scale=(0.3, 1.0), mix=mix, bn=bn, top_k=top_k,
                   combine=combine, batch_size=16))  # fmt: skip
    labels = Bank(bank).labels("a")
    wanted = by_hand(bank, "a", specs, bn=bn, combine=combine if teachers > 1 else "logits", batch_size=16)
    stored = torch.from_numpy(np.asarray(labels.logits(np.arange(40)))).double()
    if top_k is None:
        torch.testing.assert_close(stored, wanted, rtol=1e-3, atol=2e-3)  # fp16
    else:
        best = wanted.topk(2, dim=1)
        rest = wanted.logsumexp(1).exp() - best.values.exp().sum(1)
        dense = expand_topk(best.indices, best.values.half(), rest.log().float(), 4).double()
        assert (stored.softmax(1) - dense.softmax(1)).abs().max() < 5e-3
    assert np.any(labels.views(np.arange(40)).mixed) == (mix != "none")
    policy = labels.spec.policy["teacher"]
    assert policy["bn"] == bn and policy.get("combine") == (combine if teachers == 2 else None)


def test_one_teacher_among_others_counts_as_much_as_they_do(bank, pair):
    """The softmax of the stored answer is the mean of the members' softmaxes."""
    for name, spec in (("one", pair[1][0]), ("two", pair[1][1]), ("both", ",".join(pair[1]))):
        relabel(config(bank, spec, name))
    one, two, both = (
        torch.from_numpy(np.asarray(Bank(bank).labels(n).logits(np.arange(20)))).float().softmax(1)
        for n in ("one", "two", "both")
    )
    assert (both - (one + two) / 2).abs().max() < 2e-3 and (one - two).abs().max() > 0.2
    teacher = Bank(bank).labels("both").spec.teacher
    assert [m["arch"] for m in teacher["members"]] == ["lenet5_half_bn"] * 2 and len(teacher["sha256"]) == 64
    assert teacher["spec"] == ",".join(pair[1])
    shas = {Bank(bank).labels(n).spec.identity_hash() for n in ("one", "two", "both")}
    assert len(shas) == 3


def test_teachers_may_be_weighed(bank, pair):
    for name, spec in (("one", pair[1][0]), ("two", pair[1][1])):
        relabel(config(bank, spec, name))
    relabel(config(bank, ",".join(pair[1]), "both", combine="logits", weights=(3.0, 1.0)))
    one, two, both = (
        torch.from_numpy(np.asarray(Bank(bank).labels(n).logits(np.arange(20)))).float() for n in ("one", "two", "both")
    )
    torch.testing.assert_close(both, 0.75 * one + 0.25 * two, rtol=2e-3, atol=5e-3)
    assert Bank(bank).labels("both").spec.policy["teacher"]["weights"] == [3.0, 1.0]
    with pytest.raises(ConfigError, match="several teachers"):
        relabel(config(bank, pair[1][0], "c", weights=(1.0,)))
    with pytest.raises(ConfigError, match=r"one positive number per teacher \(2\)"):
        relabel(config(bank, ",".join(pair[1]), "c", weights=(1.0,)))


def test_an_ensemble_that_cannot_be_is_refused(bank, pair, tmp_path):
    bare = teacher(tmp_path, "lenet5_half", 3, mean=0.3)
    with pytest.raises(RequirementError, match="no BatchNorm"):  # of one member is enough
        relabel(config(bank, f"{pair[1][0]},{bare}", bn="batch"))
    with pytest.raises(ModelError, match="10 classes"):
        relabel(config(bank, f"{pair[1][0]},lenet5_bn"))
    with pytest.raises(ConfigError, match="no model spec"):
        relabel(config(bank, ","))
    assert not (bank / "labels").exists()


def test_presets_are_the_papers():
    """largescale.md 1 and 2, kd.md 2.25, by hand."""
    rows = {
        "sre2l": (300, (0.08, 1.0), "cutmix", "eval", 1024, "probs", None),
        "cvdd": (300, (0.08, 1.0), "cutmix", "batch", 8, "logits", None),
        "rded": (300, (0.5, 1.0), "cutmix", "eval", 100, "probs", None),
        "gvbsm": (300, (0.08, 1.0), "cutmix", "eval", 1024, "logits", None),
        "edc": (300, (0.5, 1.0), "cutmix", "eval", 100, "logits", None),
        "fkd": (500, (0.08, 1.0), "none", "eval", 256, "probs", 5),
    }
    assert set(rows) == set(PRESETS)
    for name, row in rows.items():
        how = labelling(RelabelConfig(bank="b", name="n", preset=name))
        assert (how.views, how.crop_scale, how.mix, how.bn, how.batch_size, how.combine, how.top_k) == row, name
        assert how.name == name and how.flip == 0.5 and how.mix_alpha == 1.0 and PRESETS[name].description


def test_flags_win_over_a_preset_and_take_its_name_away():
    how = labelling(parse_config("relabel", ["--bank", "b", "--name", "n", "--preset", "sre2l", "--mix", "none"]))
    assert (how.name, how.mix, how.views) == ("custom", "none", 300)
    assert labelling(RelabelConfig(bank="b", name="n", preset="sre2l", seed=4, top_k=3, flip=0.0)).name == "sre2l"
    assert labelling(RelabelConfig(bank="b", name="n")) == Labelling()
    flat = labelling(RelabelConfig(bank="b", name="n", preset="cvdd", views=0))  # images as they are
    assert (flat.views, flat.mix, flat.bn, flat.name) == (0, "none", "batch", "custom")
    with pytest.raises(ConfigError, match="did you mean 'cvdd'"):
        labelling(RelabelConfig(bank="b", name="n", preset="cvd"))
    with pytest.raises(ConfigError, match="flip is for views"):
        labelling(RelabelConfig(bank="b", name="n", flip=0.5))


def test_a_preset_from_the_command_line(bank, pair, capsys):
    words = ["relabel", "--bank", str(bank), "--device", "cpu", "--teacher", ",".join(pair[1]), "--preset", "cvdd"]
    assert main([*words, "--name", "few", "--views", "3", "--json"]) == 0
    out, err = capsys.readouterr()
    assert set(PRESETS) <= set(PROTOCOLS)  # what `next:` offers
    found = json.loads(out)
    assert found["rows"] == 60 and found["policy"]["name"] == "custom" and found["policy"]["views"]["mix"]
    assert found["policy"]["teacher"] == {"bn": "batch", "batch_size": 8, "precision": "fp32", "combine": "logits",
                                          "weights": None}  # fmt: skip
    assert "note: preset cvdd changed by flags: CV-DD, SRe2L++" in err
    flags = ["--seed", "3", "--teacher", pair[1][0]]
    assert main([*words, *flags, "--name", "whole", "--shards", "1/30"]) == 0  # a part of all 300 views
    assert "unfinished" in capsys.readouterr().out
    record = json.loads((bank / "labels" / "whole" / "labels.json").read_text())
    assert record["policy"]["name"] == "cvdd" and record["rows"] == 6000
    wanted = by_hand(bank, "few", pair[1], bn="batch", combine="logits", batch_size=8)
    stored = torch.from_numpy(np.asarray(Bank(bank).labels("few").logits(np.arange(60)))).double()
    torch.testing.assert_close(stored, wanted, rtol=1e-3, atol=2e-3)


def test_records_are_fkds():
    """A batch that the original labelled, from our record of it: the same box, the same mixed pixels and logits."""
    golden = np.load(Path(__file__).parents[1] / "reference" / "fkd_record.npz")
    images = torch.from_numpy(golden["images"]).float()
    count, size = len(images), (images.shape[2], images.shape[3])
    box = cutmix_boxes(golden["lam"][None], (golden["centre"][None] + 0.5) / np.array(size), size)
    assert np.array_equal(box[0], golden["rec4_bbox"])
    rows, partner = np.arange(count), golden["perm"]
    whole, straight = np.tile(np.array([0, 0, 1, 1], np.float32), (count, 1)), np.zeros(count, np.uint8)
    mixed = partner != rows  # `images` are views already: each is taken whole
    views = Views(
        row=rows, sample=rows, crop=whole, flip=straight, partner=partner,
        mix_lambda=np.full(count, golden["lam"], np.float32), mix_box=np.tile(box, (count, 1)).astype(np.uint16),
        partner_sample=partner[mixed], partner_crop=whole[mixed], partner_flip=straight[mixed],
    )  # fmt: skip
    made = apply_views(images, views, size, images[torch.from_numpy(partner[mixed])])
    logits = made.double().flatten(1) @ torch.from_numpy(golden["W"]).T
    released = torch.from_numpy(golden["rec5_logits_fp16"]).double()
    torch.testing.assert_close(logits, released, rtol=2e-3, atol=2e-3)


def test_the_recipes_of_post_training_run(bank, pair, tmp_path, capsys):
    """Each with its own loss, labels and schedule, cut to a step or two."""
    words = ["--bank", str(bank), "--device", "cpu"]
    few = ["--epochs", "2", "--batch_size", "10", "--student", "lenet5_half_bn"]
    for name, views in (("edc", "2"), ("cvdd", "2"), ("fkd", "2")):
        small = ["--views", views, "--batch_size", "8", "--top_k", "2"]
        teachers = ["--teacher", ",".join(pair[1])]
        assert main(["relabel", "--config", f"posttrain/{name}-relabel", *words, *teachers, *small]) == 0
        out = ["--out", str(tmp_path / name)]
        assert main(["distill", "--config", f"posttrain/{name}", *words, *few, *out]) == 0
    said = capsys.readouterr().err
    assert "linear eta 2, wd 0.01 (none on vectors), batch 10, 2 epochs, augment none" in said
    assert "was published with" not in said  # the recipes have the published losses
    live = ["--teacher", pair[1][0], *few]
    for name in ("rded-cifar", "sre2l-tiny", "rded", "sre2l-cifar"):
        assert main(["distill", "--config", f"posttrain/{name}", *words, *live, "--out", str(tmp_path / name)]) == 0
    said = capsys.readouterr().err
    assert "augment patches_rrc_flip_cutmix" in said and "was published with" not in said
    other = ["--protocol", "sre2l-tiny", *words, *live, "--out", str(tmp_path / "other")]
    assert main(["distill", "--loss", "kd", *other]) == 0
    assert "protocol sre2l-tiny was published with --loss.temperature 20.0" in capsys.readouterr().err


def test_ferkd_filters_stored_crops(bank, pair, tmp_path):
    words = ["--bank", str(bank), "--device", "cpu"]
    assert main(["relabel", *words, "--teacher", pair[1][0], "--name", "crops", "--views", "2"]) == 0
    words += ["--student", "lenet5_half_bn", "--loss", "ferkd", "--labels", "stored", "--label_set", "crops",
              "--epochs", "1", "--batch_size", "10", "--holdout", "0"]  # fmt: skip
    losses = []
    for number, bounds in enumerate((("0", "1"), ("1", "1"))):
        out = tmp_path / str(number)
        low, high = bounds
        assert main(["distill", *words, "--loss.low", low, "--loss.high", high, "--out", str(out)]) == 0
        losses.append(json.loads((out / "result.json").read_text())["loss"])
    assert losses[0] > 0.1 and losses[1] == 0.0  # everything is kept; everything is too hard
