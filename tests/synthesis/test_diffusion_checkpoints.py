"""Which checkpoints are taken, which are refused and why, and the whole way from a folder on disk to a bank."""

from __future__ import annotations

import json
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from workshop import save_teacher

from synthkit.bank import Bank
from synthkit.bank.errors import BankMismatchError
from synthkit.cli.main import main
from synthkit.config.parse import parse_config
from synthkit.errors import ConfigError, DataError, ModelError, RequirementError, WeightsError
from synthkit.synthesis.base import ImageSpec, seeded_init
from synthkit.synthesis.diffusion import text
from synthkit.synthesis.diffusion.checkpoints import find, identity, load_network
from synthkit.synthesis.diffusion.diffusion import Diffusion, GuidedConfig
from synthkit.synthesis.diffusion.loop import DiffusionLoop
from synthkit.synthesis.engine import synthesize

from .tiny import task, teacher_view
from .tiny_diffusion import save_consistency, save_dit, save_unconditional, save_unet

RUNTIME = {"device": "cpu", "threads": torch.get_num_threads()}


def build(model: str, settings: dict[str, Any] | None = None, **of_task: Any) -> Diffusion:
    return Diffusion(GuidedConfig(model=model, **{"steps": 2, **(settings or {})}), task(**{"images": 12, **of_task}))


def run(out: Path, settings: dict[str, Any], **values: Any) -> Bank:
    """A bank by the engine."""
    method = {"name": "diffusion", "steps": 2, "batch_size": 8, **settings}
    return synthesize(parse_config("synthesize", {"method": method, "images": 12, "out": str(out), "runtime": RUNTIME,
                                                  **values}))  # fmt: skip


# ---- from a folder to a bank ---------------------------------------------------------------------------------


def test_a_dit_pipeline_on_disk_becomes_a_bank(tmp_path, capsys):
    """The command line, no teacher, no network: sizes and classes come from the pipeline."""
    model = save_dit(tmp_path / "dit")
    words = ["--method", "diffusion", "--method.model", model, "--method.steps", "2", "--method.cfg", "2"]
    words += ["--images", "12", "--out", str(tmp_path / "bank"), "--device", "cpu"]
    assert main(["synthesize", *words]) == 0
    bank = Bank(tmp_path / "bank")
    assert bank.shape == (3, 8, 8) and bank.spec.label_kind == "target"
    assert bank.spec.class_names == [f"name {i}" for i in range(10)]
    assert bank.spec.real_data_used and not bank.spec.contains_real
    assert bank.spec.recipe["made_from"] == {"checkpoint": identity(find(model))}
    assert bank.verify(deep=True).ok
    assert bank.column("labels").tolist() == [i % 10 for i in range(12)]
    assert "12 images" in capsys.readouterr().out


def test_a_teacher_sizes_labels_and_judges(tmp_path):
    teacher = save_teacher(tmp_path / "teacher")
    model = save_unet(tmp_path / "unet", channels=1)
    bank = run(tmp_path / "bank", {"model": model}, teacher=str(teacher))
    assert bank.shape == (1, 32, 32) and bank.spec.class_names == [f"class {i}" for i in range(10)]
    assert bank.has("logits") and bank.has("difficulty")


def test_classes_are_matched_by_name(tmp_path):
    names = [f"{letter} thing" for letter in "jihgfedcba"]
    spec = ImageSpec(shape=(3, 8, 8), num_classes=10, mean=[0.5] * 3, std=[0.5] * 3, class_names=sorted(names))
    said: list[str] = []
    method = build(save_unet(tmp_path, names=names), teachers=[], spec=spec, warn=said.append)
    assert method.painter.condition(torch.arange(10)).tolist() == list(range(9, -1, -1))  # type: ignore[union-attr]
    assert "mapped by name" in said[0]


def test_another_checkpoint_is_another_bank(tmp_path):
    model = save_unet(tmp_path / "unet")
    run(tmp_path / "bank", {"model": model}, images_per_shard=4)
    first = identity(find(model))
    shutil.copytree(model, tmp_path / "moved")
    assert identity(find(str(tmp_path / "moved"))) == first, "where it lies is no part of it"
    file = next((Path(model) / "unet").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert identity(find(model)) != first
    with pytest.raises(BankMismatchError, match="made_from.checkpoint"):
        run(tmp_path / "bank", {"model": model}, images_per_shard=4, resume=True)


def test_chosen_classes_make_a_subset(tmp_path):
    config = GuidedConfig(model=save_dit(tmp_path), classes=(7, 2, 5), steps=2)
    spec = DiffusionLoop.image_spec_for(config)
    assert spec.class_names == ["name 7", "name 2", "name 5"] and spec.num_classes == 3
    method = Diffusion(config, task(teachers=[], spec=spec))
    assert method.painter.condition(torch.arange(3)).tolist() == [7, 2, 5]  # type: ignore[union-attr]


def test_a_single_file_beside_its_config(tmp_path):
    folder = Path(save_unet(tmp_path / "unet"))
    bare = tmp_path / "bare"
    shutil.copytree(folder / "unet", bare)
    shutil.copy(folder / "scheduler" / "scheduler_config.json", bare)
    weights = next(bare.glob("*.safetensors"))
    whole, single = (load_network(find(str(name))) for name in (folder, weights))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), single.parameters(), strict=True))
    assert not single.training and not any(p.requires_grad for p in single.parameters())


def test_an_unconditional_model_needs_a_guide(tmp_path):
    model = save_unconditional(tmp_path)
    with pytest.raises(RequirementError, match="only a teacher can make some"):
        build(model, {"guidance": 0.0})
    with pytest.raises(RequirementError, match="knows no classes"):
        DiffusionLoop.image_spec_for(GuidedConfig(model=model))
    with pytest.raises(RequirementError, match="unconditional"):
        build(model, {"cfg": 2.0})
    assert sum(len(batch.images) for batch in build(model).generate()) == 12


def test_a_consistency_model_is_not_guided(tmp_path):
    model = save_consistency(tmp_path)
    with pytest.raises(RequirementError, match="--method.guidance 0"):
        build(model)
    with pytest.raises(RequirementError, match="no 'no class' label"):
        build(model, {"guidance": 0.0, "cfg": 2.0})
    batches = list(build(model, {"guidance": 0.0, "steps": None}).generate())
    assert batches[0].logits is not None and torch.isfinite(batches[0].logits).all()


# ---- refusals ------------------------------------------------------------------------------------------------


def test_no_model():
    with pytest.raises(RequirementError, match="--method.model"):
        build(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "no such folder"), ("a/b/c", "no such folder"), ("unet.pt", "only .safetensors"),
     ("empty", "no diffusion model lies here")],
)  # fmt: skip
def test_what_is_no_checkpoint(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "unet.pt").write_bytes(b"x")
    with pytest.raises(ModelError, match=message):
        find(name if name == "a/b/c" else str(tmp_path / name))


def test_offline_never_asks_the_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="not in the local cache"):
        find("someone/some-model", offline=True)


def edit(path: Path, **changes: Any) -> None:
    found = json.loads(path.read_text())
    found.update(changes)
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def test_damaged_checkpoints(tmp_path):
    folder = Path(save_unet(tmp_path / "unet"))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:1000])
    with pytest.raises(WeightsError, match="cannot be loaded"):
        load_network(find(str(folder)))
    weights.unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(WeightsError, match="no safetensors"):
        load_network(find(str(folder)))
    edit(folder / "unet" / "config.json", _class_name="os.system")
    with pytest.raises(ModelError, match="cannot be sampled here"):
        find(str(folder))
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not readable as JSON"):
        find(str(folder))
    shutil.rmtree(folder / "unet")
    with pytest.raises(ModelError, match="neither unet/ nor transformer/"):
        find(str(folder))


def test_weights_that_do_not_fit(tmp_path):
    folder = Path(save_unet(tmp_path / "unet"))
    shutil.copy(folder / "scheduler" / "scheduler_config.json", folder / "unet")
    edit(folder / "unet" / "config.json", block_out_channels=[16, 16])
    with pytest.raises(WeightsError, match="does not fit"):
        load_network(find(str(folder / "unet" / "diffusion_pytorch_model.safetensors")))


def test_no_schedule(tmp_path):
    folder = Path(save_unet(tmp_path / "unet"))
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(ModelError, match="noise schedule"):
        find(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"image_size": [1, 8]}, "image_size"), ({"mean": [0.1]}, "mean and std"), ({"pixel_range": [1, -1]}, "low, high"),
     ({"colour": "red"}, "no card"), ({"class_names": None}, "no card"), ({"image_size": ["a", 8, 8]}, "no card")],
)  # fmt: skip
def test_a_wrong_card(tmp_path, changes, message):
    folder = Path(save_unet(tmp_path / "unet"))
    edit(folder / "diffusion.json", **changes)
    with pytest.raises(ConfigError, match=message):
        find(str(folder))


def test_classes_and_channels_that_do_not_fit(tmp_path):
    model = save_unet(tmp_path / "grey", channels=1)
    with pytest.raises(ModelError, match=r"paints 1 channel\(s\), the bank holds 3"):
        build(model)
    colour = save_unet(tmp_path / "colour", names=[f"kind {i}" for i in range(10)])
    with pytest.raises(ConfigError, match="the bank has 10 classes"):
        build(colour, {"classes": (1, 2)})
    with pytest.raises(ConfigError, match="0 to 9"):
        build(colour, {"classes": tuple(range(1, 11))})
    other = ImageSpec(shape=(3, 8, 8), num_classes=10, mean=[0.5] * 3, std=[0.5] * 3, class_names=list("abcdefghij"))
    said: list[str] = []
    build(colour, spec=other, warn=said.append)
    assert "class names of the data and of the model differ" in said[0]
    some = ImageSpec(shape=(3, 8, 8), num_classes=2, mean=[0.5] * 3, std=[0.5] * 3, class_names=["a", "b"])
    with pytest.raises(DataError, match="the model has 10 classes, the data have 2"):
        build(colour, spec=some)


def test_an_unknown_teacher_size_is_scaled(tmp_path):
    """A teacher of 12 x 12 images on a model of 8 x 8."""
    view = teacher_view(size=12)
    batches = list(build(save_unet(tmp_path), teachers=[view]).generate())
    assert batches[0].images.shape[1:] == (3, 12, 12)


# ---- text ----------------------------------------------------------------------------------------------------


def save_text_model(folder: Path, **changes: Any) -> str:
    """A Stable-Diffusion-like pipeline without its text encoder (whose package the tests do not need)."""

    def parts() -> tuple[Any, Any]:
        network = UNet2DConditionModel(
            sample_size=4, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 8),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=6, attention_head_dim=2,
            norm_num_groups=4, mid_block_type="UNetMidBlock2DCrossAttn",
        )  # fmt: skip
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8), norm_num_groups=4,
        )  # fmt: skip
        return network, vae

    network, vae = seeded_init(parts, 0)
    network.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    edit(folder / "unet" / "config.json", **changes)
    return str(folder)


class Tokenizer:
    """Letters as numbers."""

    model_max_length = 5

    def __call__(self, prompts, padding, max_length, truncation, return_tensors):
        assert (padding, truncation, return_tensors) == ("max_length", True, "pt")
        rows = [[ord(letter) for letter in prompt.ljust(max_length)[-max_length:]] for prompt in prompts]
        return types.SimpleNamespace(input_ids=torch.tensor(rows))


class Encoder(torch.nn.Module):
    """(N, 5) tokens -> ((N, 5, 6) states,)."""

    def forward(self, tokens):
        return (torch.sin(tokens.float()[..., None] * torch.arange(1, 7)),)


def test_text_models_paint_the_class_names(tmp_path, monkeypatch):
    model = save_text_model(tmp_path)
    asked: list[list[str]] = []

    class Asking(Tokenizer):
        def __call__(self, prompts, **settings):
            asked.append(prompts)
            return super().__call__(prompts, **settings)

    monkeypatch.setattr(text, "load_encoder", lambda layout: (Asking(), Encoder()))
    spec = ImageSpec(shape=(3, 8, 8), num_classes=2, mean=[0.5] * 3, std=[0.5] * 3, class_names=["ant", "bee"])
    settings = {"cfg": 2.0, "prompt": "a {}", "negative_prompt": "cartoon"}
    method = build(model, settings, teachers=[], spec=spec)
    assert asked == [["a ant", "a bee", "cartoon"]]
    state, now = torch.randn(2, 4, 4, 4), torch.tensor(400)
    got = method.painter(state, now, method.painter.condition(torch.tensor([1, 0])))
    embedded = Encoder()(Tokenizer()(["a bee", "a ant", "cartoon"], "max_length", 5, True, "pt").input_ids)[0]
    with torch.no_grad():
        named = method.painter.network(state, now, encoder_hidden_states=embedded[:2]).sample
        null = method.painter.network(state, now, encoder_hidden_states=embedded[2:].expand(2, -1, -1)).sample
    torch.testing.assert_close(got, null + 2 * (named - null))
    images = torch.cat([batch.images for batch in method.generate()])
    assert images.shape == (12, 3, 8, 8) and images.float().std() > 0


def test_text_models_need_transformers(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RequirementError, match=r"synthkit\[text\]"):
        build(save_text_model(tmp_path))


def test_text_models_of_other_kinds(tmp_path):
    with pytest.raises(RequirementError, match="SDXL"):
        build(save_text_model(tmp_path / "xl", addition_embed_type="text_time"))
    with pytest.raises(RequirementError, match="guidance scale as an embedding"):
        build(save_text_model(tmp_path / "lcm", time_cond_proj_dim=256))


def test_a_moved_checkpoint_makes_the_same_bank(tmp_path):
    """Where the model lies is no part of the bank: another copy goes on with it, another model does not."""
    model = save_dit(tmp_path / "dit")
    shutil.copytree(model, tmp_path / "moved")
    bank = run(tmp_path / "bank", {"model": model})
    again = run(tmp_path / "bank", {"model": str(tmp_path / "moved")}, resume=True)
    assert again.record["uuid"] == bank.record["uuid"] and "model" not in bank.spec.recipe["method"]
    with pytest.raises(BankMismatchError, match="checkpoint"):
        run(tmp_path / "bank", {"model": save_unet(tmp_path / "unet")}, resume=True)
