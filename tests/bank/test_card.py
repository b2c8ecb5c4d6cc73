"""The card: true, complete, harmless, and the words in it that can be run do run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import yaml

from synthkit.bank import Bank, BankWriter
from synthkit.bank import card as cards
from synthkit.bank.make import bank_from_arrays
from synthkit.bank.seal import refresh_card
from synthkit.cli.bank import main
from synthkit.config.parse import config_to_dict, parse_command_line
from synthkit.tables import citation

from .banks import fill, make_bank, make_spec

EVIL = '"; rm -rf ~\n```\n<script>alert(1)</script> [x](http://evil) | `id` $(id) \x1b[31m'


def parts(text: str) -> tuple[dict, str]:
    _, meta, body = text.split("---\n", 2)
    return yaml.safe_load(meta), body


def render(bank: Bank) -> tuple[dict, str]:
    return parts(cards.render(bank.spec, bank.record, bank.sidecars, "r" * 64))


def real_bank(path, **options):
    images = np.random.default_rng(0).integers(0, 256, (12, 1, 8, 8), dtype=np.uint8)
    return bank_from_arrays(path, images, np.arange(12) % 3, num_classes=3, mean=[0.5], std=[0.2], **options)


@pytest.mark.parametrize(
    ("images", "word"),
    [(1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (50_000, "10K<n<100K"), (10**6, "1M<n<10M"), (10**13, "n>1T")],
)
def test_size_categories_are_the_hubs(images, word):
    assert cards.size_category(images) == word


def test_a_synthetic_and_a_real_bank_say_what_they_are(tmp_path, capsys):
    make_bank(tmp_path / "synthetic")
    meta, body = parts((tmp_path / "synthetic" / "README.md").read_text())
    assert {"synthetic", "data-free", "cudfkd"} <= set(meta["tags"]) and meta["license"] == "unknown"
    assert meta["size_categories"] == ["n<1K"] and meta["task_categories"] == ["image-classification"]
    assert "**Made without any real data.**" in body and "| real pixels | no |" in body
    assert "no privacy guarantee" in body

    real = real_bank(tmp_path / "real", extra={"licence": "CC-BY-4.0"})
    meta, body = parts((tmp_path / "real" / "README.md").read_text())
    assert "contains-real-images" in meta["tags"] and not {"synthetic", "data-free"} & set(meta["tags"])
    assert meta["license"] == "cc-by-4.0" and "**Contains real pixels" in body and "| real pixels | yes |" in body
    assert "contains real images" in repr(real)
    main(["info", str(real.path)])
    assert "Contains real pixels" in capsys.readouterr().out.splitlines()[0]
    main(["ls", str(tmp_path)])
    lines = {line.split()[0].rpartition("/")[2]: line for line in capsys.readouterr().out.splitlines()}
    assert "contains real images" in lines["real"] and "real" not in lines["synthetic"].partition(" ")[2]
    assert "contains real images" in real._repr_html_()


def test_real_data_used_without_real_pixels_is_not_called_data_free(tmp_path):
    bank = real_bank(tmp_path / "b", label_kind="target", real_data_used=True, contains_real=False)
    meta, body = render(bank)
    assert "data-free" not in meta["tags"] and "synthetic" in meta["tags"]
    assert "Real data was used in making it; no image is a real one." in body


def test_text_from_outside_stays_text(tmp_path):
    spec = make_spec(
        class_names=[EVIL, "b", "c", "d"], recipe={"method": {"name": EVIL, EVIL: EVIL}}, extra={"licence": EVIL},
        teacher={"name": EVIL, "spec": EVIL, "licence": EVIL, "source": EVIL, "accuracy": {EVIL: 1}},
        parents=[{EVIL: EVIL}, EVIL],
    )  # fmt: skip
    fill(BankWriter.create(tmp_path / "b", spec))
    text = (tmp_path / "b" / "README.md").read_text()
    meta, body = parts(text)
    assert isinstance(meta, dict) and set(meta) == {"license", "license_name", "pretty_name", "size_categories", "tags",
                                                    "task_categories"}  # fmt: skip
    assert "<script>" not in body and "](http" not in body.replace("\\]", "").replace("\\[", "") and "\x1b" not in text
    fences = [line for line in body.splitlines() if line.startswith("```")]
    assert len(fences) == 6  # of the loading section: nothing opened or closed another
    table = [line for line in body.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in table)


def test_the_command_makes_the_same_recipe_again(tmp_path):
    words = ["--teacher", "lenet5_bn", "--method", "cudfkd", "--images", "60", "--method.lr_g", "5e-4", "--seed", "3",
             "--curriculum", "none", "--method.betas_g", "[0.4,0.98]"]  # fmt: skip
    config = parse_command_line("synthesize", words).config
    recipe = {"method": {"name": config.method_name, **config_to_dict(config.method)}, "curriculum": config.curriculum}
    spec = make_spec(recipe=recipe, teacher={"spec": "lenet5_bn", "arch": "lenet5_bn"}, images=60, seed=3)
    command = cards.remake_command(spec)
    assert command is not None and command.startswith("synthkit synthesize ")
    again = parse_command_line("synthesize", shlex.split(command)[2:]).config
    assert {"name": again.method_name, **config_to_dict(again.method)} == recipe["method"]
    assert (again.curriculum, again.teacher, again.images, again.images_per_shard, again.seed) == (
        "none", "lenet5_bn", 60, 10, 3)  # fmt: skip


def test_no_command_where_none_makes_the_bank(tmp_path):
    recipe = {"method": {"name": "cudfkd"}}
    teacher = {"spec": "lenet5_bn"}
    assert cards.remake_command(make_spec(recipe=recipe, teacher=teacher))
    assert cards.remake_command(make_spec(recipe={"method": "arrays"}, teacher=teacher)) is None
    assert cards.remake_command(make_spec(recipe={"method": {"name": "merge"}}, teacher=teacher)) is None
    assert cards.remake_command(make_spec(recipe=recipe, teacher=teacher, parents=[{"uuid": "a"}])) is None
    assert cards.remake_command(make_spec(recipe={**recipe, "--out /": 1}, teacher=teacher)) is None
    assert cards.remake_command(make_spec(recipe=recipe)) is None  # neither a teacher to name nor data
    data = cards.remake_command(make_spec(recipe={**recipe, "data": {"name": "mnist"}}))
    assert data is not None and "--data mnist:PATH" in data


def test_a_word_of_the_command_is_one_word_for_a_shell(tmp_path):
    spec = make_spec(recipe={"method": {"name": "cudfkd"}}, teacher={"spec": "a b;$(id) `id` 'x'"})
    words = shlex.split(cards.remake_command(spec) or "")
    assert words[3] == "a b;$(id) id 'x'" and words[4] == "--method"


def test_citation_of_the_method(tmp_path):
    text = citation("cudfkd")
    assert text and text.startswith("Li et al.") and "2208.13648" in text and "\n" not in text
    bank = Bank(make_bank(tmp_path / "b", extra={"citation": text}).path)
    assert "2208.13648" in render(bank)[1]


def test_the_loading_section_runs(tmp_path):
    make_bank(tmp_path / "b")
    body = parts((tmp_path / "b" / "README.md").read_text())[1]
    blocks = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    assert len(blocks) == 2
    found: list[dict] = [{}, {}]
    for block, names in zip(blocks, found, strict=True):
        exec(block.replace("DIR", str(tmp_path / "b")), names)
    assert found[0]["batch"].images.shape == (53, 3, 6, 5) and found[1]["images"].shape == (3, 3, 6, 5)


def test_results_of_the_run_come_on_the_card(tmp_path):
    path = make_bank(tmp_path / "b").path
    assert "## Results" not in (path / "README.md").read_text()
    student = {"test_top1": 0.9123, "teacher_top1": 0.9955, "test_n": 10000, "test_agreement": True}
    (path / "run.json").write_text(json.dumps({"student": student, "config": {"eval_data": "mnist:/home/me"}}))
    sealed = (path / "manifest.json").read_bytes()
    refresh_card(path)
    body = (path / "README.md").read_text()
    assert "91.23 %" in body and "99.55 %" in body and "10000" in body and "agreement" not in body
    assert "| test data | mnist |" in body and "/home/me" not in body
    assert (path / "manifest.json").read_bytes() == sealed and Bank(path).verify().ok
    (path / "run.json").write_text("{not json")
    refresh_card(path)
    assert "## Results" not in (path / "README.md").read_text()


def test_licences_of_parents_are_named(tmp_path):
    parents = [{"uuid": "a", "extra": {"licence": "MIT"}}, {"uuid": "b", "extra": {"licence": "CC0-1.0"}}, "c"]
    assert cards.licence_of(make_spec(parents=parents)) == "MIT; CC0-1.0"
    assert cards.licence_of(make_spec(parents=parents, extra={"licence": "Apache-2.0"})) == "Apache-2.0"
    assert cards.licence_of(make_spec(extra={"licence": 7})) is None
    meta = cards.front_matter(make_spec(parents=parents), {}, [])
    assert meta["license"] == "other" and meta["license_name"] == "MIT; CC0-1.0"


def test_the_hub_library_reads_the_front_matter(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    make_bank(tmp_path / "b")
    card = hub.DatasetCard.load(tmp_path / "b" / "README.md")
    assert card.data.task_categories == ["image-classification"] and card.data.license == "unknown"
    assert "cudfkd" in card.data.tags and card.text.lstrip().startswith("# ")


def test_an_export_can_bring_its_own_words(tmp_path):
    bank = Bank(make_bank(tmp_path / "b").path)
    text = cards.body(bank.spec, bank.record, bank.sidecars, loading="Open it.", columns=["images"], name="My set")
    assert text.startswith("# My set\n") and "Open it." in text and "h5py" not in text and "| logits |" not in text


def test_info_in_tenths():
    from synthkit.bank.info import tenths

    assert tenths([]) is None and tenths([(10, 1.0), (10, None)]) is None
    assert tenths([(10, 1.0), (30, 2.0)]) == [1.0, 2.0]
    assert tenths([(10, 1.0), (30, 2.0), *[(1, 5.0)] * 18]) == pytest.approx([1.75, *[5.0] * 9])


def test_info_of_a_thousand_shards_is_quick_and_without_torch(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # a thousand times the disk is not what is tested here
    images = np.zeros((1000, 1, 2, 2), np.uint8)
    bank_from_arrays(
        tmp_path / "b", images, np.arange(1000) % 2, num_classes=2, mean=[0.5], std=[0.2], images_per_shard=1
    )
    code = (
        "import sys, time; t = time.perf_counter()\n"
        "from synthkit.cli.bank import main; main(['info', sys.argv[1]])\n"
        "print('seconds', time.perf_counter() - t, 'torch' in sys.modules)"
    )
    best = 9.0
    for _ in range(3):  # the machine may be busy
        words = [sys.executable, "-c", code, str(tmp_path / "b")]
        out = subprocess.run(words, capture_output=True, text=True, check=True)
        *_, seconds, torch = out.stdout.split()
        assert torch == "False" and "1000 of 1000" in out.stdout
        best = min(best, float(seconds))
    assert best < 2, best  # the bar is 0.5 s on a quiet machine
    print("info of 1,000 shards:", best)
