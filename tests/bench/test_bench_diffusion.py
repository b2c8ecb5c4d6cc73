"""`synthkit bench diffusion` and `bench steps --family diffusion`, small."""

from __future__ import annotations

import json

import numpy as np
import pytest
from workshop import save_teacher

from synthkit.cli.main import main


def test_steps_of_the_diffusion_family(capsys):
    words = ["bench", "steps", "--family", "diffusion", "--batch", "2", "--repeats", "1", "--threads", "1"]
    assert main([*words, "--channels", "16,16", "--size", "8", "--teacher", "convnet_d1_w8_bn"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["ratio"]) == {"step", "guided_step", "guided_step_through"}
    assert all(0.3 < ratio < 30 for ratio in found["ratio"].values())


@pytest.fixture
def data(tmp_path) -> str:
    draw = np.random.default_rng(0)
    parts = {}
    for split, count in (("train", 60), ("test", 20)):
        parts[f"images_{split}"] = draw.integers(0, 256, (count, 8, 8), dtype=np.uint8)
        parts[f"labels_{split}"] = np.arange(count) % 10
    np.savez(tmp_path / "data.npz", **parts)
    return f"npz:{tmp_path / 'data.npz'}"


def test_the_whole_measurement_and_its_resumption(capsys, tmp_path, data):
    (tmp_path / "unet.yaml").write_text(
        "command: teach\narch: unet\ndata: DATA\nimage_size: 32\nsteps: 2\nbatch_size: 4\nunet_channels: [16, 16]\n"
    )
    (tmp_path / "bank.yaml").write_text(
        "command: synthesize\nimages: 20\nmethod:\n  name: diffusion\n  model: DIR\n  steps: 2\n"
    )
    words = ["bench", "diffusion", "--data", data, "--teacher", str(save_teacher(tmp_path / "teacher"))]
    words += ["--model", str(tmp_path / "unet.yaml"), "--recipe", str(tmp_path / "bank.yaml"), "--threads", "1"]
    words += ["--judge", "convnet_d2_w8_bn", "--judge-epochs", "1", "--judge-batch", "20", "--steps", "2"]
    words += ["--distill-batch", "8", "--seeds", "2", "--sweep-images", "4", "--work", str(tmp_path / "work")]
    assert main([*words, "--out", str(tmp_path / "out.json")]) == 0
    capsys.readouterr()
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["diffusion_model"]["steps"] == 2 and found["diffusion_model"]["cpu_minutes"] > 0
    assert {name: bank["n"] for name, bank in found["banks"].items()} == {"guided": 20, "unguided": 20}
    real, noise = found["students"]["control_top1"]
    assert real.startswith("19 random real images") and "noise" in noise  # 5 % of a bank are held out
    assert found["students"]["top1"]["n"] == 2
    scales = found["guidance_scales"]
    assert len(scales) == 6 and all(scale["n"] == 4 for scale in scales)
    assert "diffusers" in found["versions"] and found["hardware"]
    assert main([*words, "--out", str(tmp_path / "again.json")]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["students"] == found["students"] and again["banks"] == found["banks"]
