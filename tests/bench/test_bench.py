"""The measuring commands: their JSON is whole, and their arithmetic is what it says."""

from __future__ import annotations

import json
import statistics

import pytest
from conftest import ROOT

from synthkit.bench.pipeline import spread
from synthkit.cli.main import main
from synthkit.errors import SynthkitError


def run(capsys, *words: str):
    code = main(list(words))
    return code, capsys.readouterr()


def test_steps(capsys, tmp_path):
    out = tmp_path / "steps.json"
    code, printed = run(
        capsys, "bench", "steps", "--teacher", "resnet8", "--student", "resnet8", "--batch", "4", "--threads", "1",
        "--repeats", "3", "--out", str(out),
    )  # fmt: skip
    assert code == 0
    found = json.loads(out.read_text())
    assert json.loads(printed.out) == found
    for kind in ("generator_step", "kd_step"):
        bare = [v for k, v in found["seconds"].items() if k.startswith(f"bare_{kind}")]
        assert len(bare) == 2 and found["floor"][kind] == min(bare)
        assert found["ratio"][kind] == pytest.approx(found["seconds"][kind] / found["floor"][kind], rel=1e-2)
    assert found["hardware"]["threads"] == 1 and found["versions"]["torch"]


def test_spread():
    assert spread([1.0, 2.0, 4.0]) == {
        "mean": 7 / 3,
        "std": statistics.stdev([1, 2, 4]),
        "n": 3,
        "values": [1.0, 2.0, 4.0],
    }
    assert spread([0.5])["std"] == 0.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stepz"], "did you mean 'steps'"),
        (["steps", "--batch", "0"], "at least 1"),
        (
            ["pipeline", "--synthesize", "x", "--distill", "y", "--eval-data", "z", "--work", "w", "--seeds", "a"],
            "seeds",
        ),
        (["mixture", "--bank", "x", "--distill", "y", "--eval-data", "z", "--work", "w", "--fresh", "half"], "fresh"),
    ],
)
def test_wrong_use(capsys, words, message):
    code, printed = run(capsys, "bench", *words)
    assert code == 2 and message in printed.err


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    out = folder / "demo"
    assert main(["demo", "--smoke", "--threads", "1", "--out", str(out), "--result", str(folder / "r.json")]) == 0
    return out, json.loads((folder / "r.json").read_text())


def test_demo(demo, capsys):
    out, result = demo
    assert result["teacher"]["top1"] > 0.99  # the embedded teacher on the embedded images
    for value in (result["runs"][0]["student_top1"], result["control"]["top1"], result["runs"][0]["co_trained_top1"]):
        assert 0 <= value <= 1
    assert (out / "report.html").stat().st_size > 10_000
    code, printed = run(capsys, "demo", "--smoke", "--out", str(out))
    assert code == 2 and "--resume" in printed.err
    assert main(["bank", "verify", "--deep", str(out / "bank-seed0")]) == 0


def test_demo_resumes_to_the_same_result(demo):
    out, result = demo
    assert main(["demo", "--smoke", "--threads", "1", "--resume", "--out", str(out)]) == 0
    again = json.loads((out / "result.json").read_text())
    assert again["runs"][0]["student_top1"] == result["runs"][0]["student_top1"]
    assert again["runs"][0]["bank"]["root"] == result["runs"][0]["bank"]["root"]


def test_mixture(demo, tmp_path):
    out, _ = demo
    file = tmp_path / "mixture.json"
    words = ["--bank", str(out / "bank-seed0"), "--distill", "mnist/distill-lenet5_half_bn-demo", "--steps", "4"]
    words += ["--eval-data", "bank:" + str(out / "bank-seed0"), "--fresh", "0,1", "--work", str(tmp_path / "w")]
    assert main(["bench", "mixture", *words, "--threads", "1", "--out", str(file)]) == 0
    found = json.loads(file.read_text())
    assert [row["fresh"] for row in found["rows"]] == [0.0, 1.0]
    assert found["best_fresh"] == max(found["rows"], key=lambda row: row["top1"]["mean"])["fresh"]


def test_typed_errors_are_synthkit_errors():
    with pytest.raises(SynthkitError):
        from synthkit.cli.bench import main as bench

        bench(["nothing"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_learns(tmp_path):
    """The whole demo: the student beats 97 % on real test images it never saw, and its noise control by far."""
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    result = json.loads((tmp_path / "demo" / "result.json").read_text())
    student, control = result["runs"][0]["student_top1"], result["control"]["top1"]
    assert student >= 0.97 and student > control + 0.2


def test_labels_against_the_live_teacher(tmp_path, capsys):
    """Small: the forms agree with the live teacher on identical inputs as far as they can."""
    bank = ROOT / "assets" / "banks" / "mnist-eval"
    words = ["--teacher", "lenet5_bn", "--student", "lenet5_half_bn", "--views", "1", "--top-k", "9", "--seeds", "1"]
    out = tmp_path / "labels.json"
    common = ["--threads", "1", "--device", "cpu", "--out", str(out)]
    assert main(["bench", "labels", "--bank", str(bank), *words, *common]) == 0
    found = json.loads(out.read_text())
    assert found["views"] == 2000 and found["num_classes"] == 10 and set(found["forms"]) == {"fp16", "top9", "live"}
    fp16, top9 = found["forms"]["fp16"], found["forms"]["top9"]
    assert fp16["bytes_per_view"] == 37 + 2 * 10 and top9["bytes_per_view"] == 37 + 4 * 9 + 4
    for form in (fp16, top9):  # nine of ten and the tail are all of them
        assert form["loss_difference"]["1"]["mean_abs"] < 1e-3 * form["loss_difference"]["1"]["live_loss"]
    assert not (bank / "labels").exists()
    capsys.readouterr()
