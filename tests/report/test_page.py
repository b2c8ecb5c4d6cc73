"""The page: what is said and where it was measured, that hostile text stays text, that nothing is overwritten."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from synthkit.cli.report import main
from synthkit.errors import BankError, OutputExistsError, StorageError, UsageError
from synthkit.report import report
from synthkit.report.page import MARKER, build, is_report

from .makers import add_engine_record, charts, make_bank, make_run, result, tree, words, write_json

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
ROOT = Path(__file__).resolve().parents[2]


def rows(page: str) -> dict[str, list[str]]:
    """Table rows of the page by the text of their head."""
    found = {}
    for row in tree(page).iter("tr"):
        head, *cells = list(row)
        found[words(head)] = [words(c) for c in cells]
    return found


# --- bank ------------------------------------------------------------------------------------------------------------


def test_a_bank_with_its_run(tmp_path):
    bank = make_bank(tmp_path / "toy")
    add_engine_record(bank)
    page = build(bank)
    text = words(tree(page))
    assert (
        "40 images (1 x 8 x 8) of 3 classes, made by cudfkd from the teacher lenet5. Made without any real data."
        in text
    )
    assert "reaches 60.00 % top-1 on real test data, the teacher 80.00 %." in text
    found = rows(page)
    assert found["top-1 real test data"] == ["80.00 %", "60.00 %"]
    assert found["retention (student / teacher) real test data"] == ["", "75.00 %"]
    assert found["agreement with the teacher real test data"] == ["", "61.00 %"]
    assert found["top-1 toy test claimed by its card"] == ["75.00 %", ""]
    assert "mnist:DIR, 500 images" in text
    assert "the generator is collapsing (4 times)" in text
    for fact in ("Abacus 3000", "9.9.9", "1m15s", "3.0 MiB", "method.grad_adv", "easy2hard"):
        assert fact in text, fact
    assert set(charts(page)) == {
        "Difficulty over the curriculum", "Classes over the bank", "Class balance while making", "Adversarial weight",
        "Distillation loss of the student", "Terms of the generator's loss", "Agreement of student and teacher",
        "Co-trained student, top-1 on real test data", "Learning rate of the student", "temperature_of_room",
    }  # fmt: skip


def test_adversarial_weight_follows_the_ramp_of_the_recipe(tmp_path):
    bank = make_bank(tmp_path / "toy")
    add_engine_record(bank)
    text = words(charts(build(bank))["Adversarial weight"])
    # 10 epochs, begin 0.25, end 0.75, growth 0.5: flat until epoch 3, then 0.5 an epoch up to epoch 7
    expected = [0, 0, 0, 0, 0.5, 1, 1.5, 2, 2, 2]
    found = re.findall(r"weight, from the recipe: ([\d.]+) at step ([\d,]+)", text)
    assert [(float(v), int(s)) for v, s in found] == [(v, 10 * (i + 1)) for i, v in enumerate(expected)]


def test_a_curriculum_without_ramp_has_a_constant_weight(tmp_path):
    recipe = {
        "curriculum": "none",
        "method": {"name": "m", "epochs": 10, "adv": 0.25, "grad_adv": 9, "begin": 0, "end": 1},
    }
    bank = make_bank(tmp_path / "toy", recipe=recipe)
    add_engine_record(bank)
    found = re.findall(r"weight, from the recipe: ([\d.]+) at", words(charts(build(bank))["Adversarial weight"]))
    assert found == ["0.25"] * 10


def test_difficulty_is_shown_over_the_steps(tmp_path):
    bank = make_bank(tmp_path / "toy")
    text = words(charts(build(bank))["Difficulty over the curriculum"])
    assert "mean: 3.9 at step that made the image 390" in text and "median: 0 at step that made the image 0" in text


def test_the_picture_is_the_grid_of_the_bank(tmp_path):
    bank = make_bank(tmp_path / "toy")
    page = build(bank, per_class=4)
    image = next(tree(page).iter("img"))
    data = base64.b64decode(str(image.get("src")).removeprefix("data:image/png;base64,"))
    from synthkit.bank import Bank
    from synthkit.report import grid_png

    assert data == grid_png(Bank(bank), 4, max_classes=20)
    text = words(tree(page))
    assert (
        "Every class, up to 4 images each, by the difficulty stored with them: easy on the left, hard on the right."
        in text
    )
    assert "no image is a real one" in text and "no real data was used" in text


@pytest.mark.parametrize(
    ("changes", "badges", "line"),
    [({"real_data_used": True}, {"no image is a real one", "real data was used"}, "no image is a real one."),
     ({"real_data_used": True, "contains_real": True}, {"contains real images", "real data was used"}, "real pixels"),
     ({"contains_real": True}, {"contains real images", "real data was used"}, "real pixels")],
)  # fmt: skip
def test_real_data_is_named(tmp_path, changes, badges, line):
    page = build(make_bank(tmp_path / "toy", **changes))
    found = {words(e) for e in tree(page).iter("span") if str(e.get("class")).startswith("badge")}
    assert badges <= found and "no real data was used" not in found
    assert line in words(tree(page))


def test_a_bank_without_a_run_shows_what_there_is(tmp_path):
    bank = make_bank(tmp_path / "toy", columns=(), teacher={}, recipe={})
    page = build(bank)
    assert set(charts(page)) == {"Classes over the bank"}
    text = words(tree(page))
    assert "in stored order (the bank records no difficulty)" in text
    assert "co-trained" not in text and "warning" not in text


def test_an_unfinished_and_an_empty_bank(tmp_path):
    text = words(tree(build(make_bank(tmp_path / "half", shards=2))))
    assert "unfinished: 2 of 4 shards are there; go on with --resume" in text and "20 images" in text
    page = build(make_bank(tmp_path / "none", shards=0))
    assert "unfinished: 0 of 4 shards" in words(tree(page)) and not list(tree(page).iter("img"))


def test_an_unfinished_run_reports_the_last_measurement(tmp_path):
    bank = make_bank(tmp_path / "toy", shards=2)
    add_engine_record(bank, student=None)
    assert "reaches 60.00 % top-1" in words(tree(build(bank)))  # the log's last epoch says 0.06 * 10


def test_uneven_and_absent_classes_are_warned_about(tmp_path):
    bank = make_bank(tmp_path / "toy", images=10, num_classes=12, class_names=[f"kind {i}" for i in range(12)])
    text = words(tree(build(bank)))
    assert "2 of 12 classes have no image: kind 10, kind 11" in text


def test_unlabelled_images(tmp_path):
    page = build(make_bank(tmp_path / "toy", label_kind="none"))
    assert "The images carry no labels." in words(tree(page)) and "Classes over the bank" not in charts(page)


def test_a_page_stays_small_even_of_noise(tmp_path):
    from synthkit.bank.make import bank_from_arrays

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (400, 3, 64, 64), dtype=np.uint8)
    bank_from_arrays(tmp_path / "noise", images, np.arange(400) % 20, num_classes=20, mean=[0.5] * 3, std=[0.5] * 3)
    page = build(tmp_path / "noise")
    assert len(page.encode()) < 2_000_000 and len(list(tree(page).iter("img"))) == 1
    assert "8 of 20 classes" in words(tree(page)) or "10 of 20 classes" in words(tree(page))


def test_many_classes_and_shards(tmp_path):
    bank = make_bank(tmp_path / "toy", images=140, per_shard=2, columns=("difficulty",))
    found = charts(build(bank))
    assert "part of the bank" in words(found["Classes over the bank"])
    assert "image, in stored order" in words(found["Difficulty over the curriculum"])


# --- runs ------------------------------------------------------------------------------------------------------------


def test_several_seeds_and_a_control(tmp_path):
    page = build(make_run(tmp_path / "s1", (0.5, 0.6, 0.7)))
    text, found = words(tree(page)), rows(page)
    assert (
        "lenet5_half, trained from synthetic images, reaches 60.00 ± 10.00 % top-1 on real test data (mnist:DIR)"
        in text
    )
    assert "over 3 seeds; its teacher 80.00 %, so 75.00 ± 12.50 % of the teacher's accuracy is kept." in text
    assert "40.0 points above the control, trained on noise N(0.5, 0.25), new in every step." in text
    assert found["top-1 real test data"] == ["80.00 %", "60.00 ± 10.00 %", "20.00 %"]
    assert found["KL(teacher ‖ student), nats real test data"][1] == "0.25"
    assert found["agreement, images held out synthetic images"][1:] == ["90.00 ± 0.00 %", "90.00 %"]
    assert found["trainings (n)"] == ["", "3", "1"]
    assert "trained on 38 images of the bank banks/toy" in text and "Synthetic images: 2 of the bank" in text
    for line in ("seed 0", "seed 1", "seed 2", "control", "teacher"):
        assert line in words(charts(page)["Top-1 on real test data"])
    assert "ant: " not in text and "ant" in words(charts(page)["Accuracy of each class"])
    assert not re.search(r"one seed only|no control|not finished", text)
    for fact in ("plan.optimizer", "adamw", "Abacus 3000", "5.0 MiB", "resized"):
        assert fact in text, fact


def test_one_seed_without_control_says_so(tmp_path):
    text = words(tree(build(make_run(tmp_path / "s1", (0.6,), control=None))))
    assert "one seed only" in text and "there is no control" in text


def test_a_student_no_better_than_noise_is_called_out(tmp_path):
    text = words(tree(build(make_run(tmp_path / "s1", (0.3, 0.4), control=0.35))))
    assert "a student trained on noise is as good" in text
    assert "0.0 points" in text
    text = words(tree(build(make_run(tmp_path / "s2", (0.6, 0.61), control=0.35))))
    assert "a student trained on noise is as good" not in text


def test_an_unfinished_run(tmp_path):
    text = words(tree(build(make_run(tmp_path / "s1", (0.5, 0.6, 0.7), finished=1, control=None))))
    assert "not finished: 1 of 3 trainings have a result" in text and "reaches 50.00 % top-1" in text
    text = words(tree(build(make_run(tmp_path / "s2", (0.5,), finished=0, control=None))))
    assert "the run is not finished, there is no result yet" in text


def test_a_run_without_real_data_is_labelled_as_fidelity(tmp_path):
    absent = ("top1", "teacher_top1", "retention", "eval_agreement", "eval_kl", "per_class", "eval_data")
    run = make_run(tmp_path / "s1", changes=dict.fromkeys(absent), control=None)
    page = build(run)
    text = words(tree(page))
    assert (
        "agrees with its teacher on 90.00 % of held-out synthetic images; its accuracy on real data was not measured"
        in text
    )
    assert not [name for name in rows(page) if "real test data" in name]


def test_a_control_folder_and_a_teacher(tmp_path):
    run = make_run(tmp_path / "s1", (0.6,))
    text = words(tree(build(run / "control")))
    assert "lenet5_half, trained on noise N(0.5, 0.25), new in every step, reaches 20.00 %" in text
    teacher = tmp_path / "t"
    write_json(teacher / "run.json", {"config": {"arch": "lenet5"}, "command": "teach"})
    found = {"kind": "teach", "arch": "lenet5", "data": "mnist:DIR", "eval_images": 100, "top1": 0.9, "loss": 0.1}
    write_json(teacher / "result.json", found)
    page = build(teacher)
    assert "lenet5, trained on real data, reaches 90.00 % top-1 on real test data (mnist:DIR)." in words(tree(page))
    assert rows(page)["top-1 real test data"] == ["90.00 %"]
    assert "one seed only" not in words(tree(page))


def test_a_summary_without_its_seeds(tmp_path):
    write_json(tmp_path / "s1" / "summary.json", {"kind": "distill", "runs": [result(0, 0.5), result(1, 0.7)]})
    assert "reaches 60.00 ± 14.14 % top-1" in words(tree(build(tmp_path / "s1")))


def test_more_seeds_than_colours(tmp_path):
    page = build(make_run(tmp_path / "s1", tuple(0.5 + i / 100 for i in range(9)), control=None))
    assert "First 6 of 9 seeds." in words(charts(page)["Training loss"])


# --- page ------------------------------------------------------------------------------------------------------------


def test_several_parts_have_an_overview(tmp_path):
    bank = make_bank(tmp_path / "toy")
    add_engine_record(bank)
    page = build([bank, make_run(tmp_path / "s1", (0.5, 0.7)), bank])
    found = rows(page)
    assert found["toy"] == ["bank", "80.00 %", "60.00 %", "", "75.00 %", "1"]
    assert found["s1"] == ["distill run", "80.00 %", "60.00 ± 14.14 %", "20.00 %", "75.00 ± 17.68 %", "2"]
    sections = [e.get("id") for e in tree(page).iter("section") if e.get("id")]
    assert sections == ["part1", "part2"]  # a directory given twice is shown once
    assert {e.get("href") for e in tree(page).iter("a")} == {"#part1", "#part2"}


def test_everything_from_a_file_is_escaped(tmp_path):
    recipe = {"method": {"name": EVIL, EVIL: EVIL}, "curriculum": EVIL}
    bank = make_bank(tmp_path / "toy", class_names=[EVIL, "</style>", "&amp;"], recipe=recipe,
                     teacher={"arch": EVIL, "sha256": EVIL, "accuracy": {EVIL: 0.5}}, parents=[EVIL])  # fmt: skip
    add_engine_record(bank, warnings={EVIL: 2}, versions={EVIL: EVIL}, config={EVIL: [EVIL], "eval_data": EVIL})
    with open(bank / "metrics.jsonl", "a") as stream:
        stream.writelines(json.dumps({"step": s, EVIL: s, "g_" + EVIL: s}) + "\n" for s in (200, 300))
    run = make_run(
        tmp_path / "<img src=x onerror=alert(3)>", (0.6,),
        changes={"student": EVIL, "eval_data": EVIL, "bank": EVIL, "warnings": [EVIL], "per_class": {EVIL: 0.5}},
        record={"notes": [EVIL], "plan": {EVIL: EVIL}, "protocol": EVIL, "hardware": {"cpu": EVIL}},
    )  # fmt: skip
    page = build([bank, run], title=EVIL)
    root = tree(page)  # fails on anything that broke out of its place
    allowed = {
        "html", "head", "meta", "title", "style", "body", "header", "main", "footer", "section", "h1", "h2", "h3",
        "h4", "p", "b", "span", "div", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption",
        "img", "svg", "line", "text", "path", "circle", "rect", "i", "a", "dl", "dt", "dd", "details", "summary",
    }  # fmt: skip
    assert {e.tag for e in root.iter()} <= allowed
    for element in root.iter():
        assert not [name for name in element.attrib if name.lower().startswith("on")]
        assert str(element.get("src", "data:")).startswith("data:image/png;base64,") or "src" not in element.attrib
        assert str(element.get("href", "#")).startswith("#")
    assert "<script" not in page.lower()
    assert words(root).count("<script>alert(1)</script>") > 15  # shown, as text


def test_nothing_outside_is_asked_for(tmp_path):
    page = build(make_bank(tmp_path / "toy"))
    without = re.sub(r'src="data:[^"]*"', "", page)
    assert "http" not in without.replace("http-equiv", "") and "url(" not in without and "@import" not in without
    assert any("default-src 'none'" in str(e.get("content")) for e in tree(page).iter("meta"))


def test_hostile_numbers_do_not_break_the_page(tmp_path):
    absurd = dict.fromkeys(("epochs", "adv", "grad_adv", "begin", "end"), 1e308)
    bank = make_bank(tmp_path / "toy", recipe={"method": {"name": "m", **absurd}})
    add_engine_record(bank, student={"test_top1": "high", "teacher_top1": 0}, seconds=1e300, peak_memory_bytes=-1)
    lines = [
        '{"step": 1e308, "kd": 1, "epoch": 1}', '{"step": 1, "kd": NaN, "lr": Infinity, "epoch": 2}', "[1, 2]",
        "[" * 100_000, "torn", '{"step": 5, "epoch": 1e29, "kd": 1e-320, "class_balance": -1e29}',
        '{"step": 6, "epoch": 3, "kd": "3", "class_balance": 1e29}', '{"step": 7, "ki',
    ]  # fmt: skip
    (bank / "metrics.jsonl").write_text("\n".join(lines))
    text = words(tree(build(bank)))
    assert "metrics.jsonl: 3 lines cannot be read" in text


def test_difficulty_that_is_not_finite_is_left_out(tmp_path):
    bank = make_bank(tmp_path / "toy", images=10)
    damage(bank, "difficulty", np.full(10, np.nan, "<f4"))
    assert "Difficulty over the curriculum" not in charts(build(bank))


def test_labels_outside_the_classes_are_damage(tmp_path):
    bank = make_bank(tmp_path / "toy", images=10)
    damage(bank, "labels", np.full(10, -1, "<i4"))
    with pytest.raises(BankError, match="labels lie outside"):
        build(bank)


def damage(bank: Path, column: str, values: np.ndarray) -> None:
    """Write other values over a column of the first shard, as a stranger could."""
    place = json.loads((bank / "shards/00000.json").read_text())["datasets"][column]["offset"]
    with open(bank / "shards/00000.h5", "r+b") as stream:
        stream.seek(place)
        stream.write(values.tobytes())


# --- wrong input -----------------------------------------------------------------------------------------------------


def test_wrong_paths_name_what_is_near(tmp_path):
    make_bank(tmp_path / "mnist")
    with pytest.raises(UsageError, match=r"does not exist; did you mean '.*mnist'\?"):
        build(tmp_path / "mnits")
    with pytest.raises(UsageError, match="neither a bank .* nor a run .*it holds .*mnist"):
        build(tmp_path)
    with pytest.raises(UsageError, match="is a file; give the directory .*mnist"):
        build(tmp_path / "mnist" / "bank.json")
    with pytest.raises(UsageError, match="does not exist"):
        build(tmp_path / "no" / "where")
    with pytest.raises(UsageError, match="nothing to show"):
        build([])
    with pytest.raises(UsageError, match="per_class must be 1 to 100; got 0"):
        build(tmp_path / "mnist", per_class=0)


def test_damaged_files_are_typed_errors(tmp_path):
    run = make_run(tmp_path / "s1")
    (run / "result.json").write_text("{")
    with pytest.raises(UsageError, match=r"result\.json cannot be used .*not readable JSON"):
        build(run)
    bank = make_bank(tmp_path / "toy")
    (bank / "shards" / "00001.json").write_text("{}")
    with pytest.raises(BankError):
        build(bank)


def test_only_a_report_is_replaced(tmp_path):
    bank = make_bank(tmp_path / "toy")
    out = report(bank, tmp_path / "pages" / "r.html")
    assert is_report(out) and MARKER in out.read_text()[:100]
    assert report([bank], out, title="again") == out and "again" in out.read_text()
    mine = tmp_path / "mine.html"
    mine.write_text(f"<p>my notes on {MARKER}</p>")
    for wrong in (mine, tmp_path):
        with pytest.raises((OutputExistsError, UsageError)):
            report(bank, wrong)
    assert mine.read_text().startswith("<p>my notes")
    (tmp_path / "x.html").mkdir()
    with pytest.raises(OutputExistsError, match="is a directory"):
        report(bank, tmp_path / "x.html")
    with pytest.raises(UsageError, match=r"must name an \.html file"):
        report(bank, tmp_path / "r.pdf")
    with pytest.raises(UsageError, match="is a file, so"):
        report(bank, mine / "r.html")
    (tmp_path / "gone.html").symlink_to(tmp_path / "nowhere.html")
    with pytest.raises(OutputExistsError):
        report(bank, tmp_path / "gone.html")


def test_a_place_that_cannot_be_written_is_a_typed_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(5, "Input/output error")

    bank = make_bank(tmp_path / "toy")
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(StorageError, match="cannot write .*r.html: Input/output error"):
        report(bank, tmp_path / "r.html")
    assert [p.name for p in tmp_path.iterdir()] == ["toy"]


def test_nothing_is_written_when_the_input_is_wrong(tmp_path):
    with pytest.raises(UsageError):
        report(tmp_path / "nothing", tmp_path / "new" / "r.html")
    assert not (tmp_path / "new").exists()


def test_command(tmp_path, monkeypatch, capsys):
    make_bank(tmp_path / "toy")
    monkeypatch.chdir(tmp_path)
    assert main(["toy"]) == 0 and is_report(tmp_path / "report.html")
    assert "wrote report.html" in capsys.readouterr().out
    assert main(["toy", "--out", "b.html", "--per_class", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["out"] == "b.html" and found["bytes"] == (tmp_path / "b.html").stat().st_size
    with pytest.raises(UsageError, match="did you mean --title"):
        main(["toy", "--tilte", "x"])
    with pytest.raises(UsageError):
        main([])


def test_no_torch_is_imported(tmp_path):
    bank = make_bank(tmp_path / "toy")
    add_engine_record(bank)
    run = make_run(tmp_path / "s1")
    code = (
        "import sys; from synthkit.cli.report import main\n"
        f"assert main([{str(bank)!r}, {str(run)!r}, '--out', {str(tmp_path / 'r.html')!r}]) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
