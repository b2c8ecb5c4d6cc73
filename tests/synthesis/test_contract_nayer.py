"""NAYER under the contract of all synthesis methods, and what its docstring promises."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from contract import SynthesizerContract
from safetensors.torch import save_file

from synthesis.tiny import task, teacher_view
from synthkit.errors import ConfigError, RequirementError, SynthkitError, WeightsError
from synthkit.synthesis.curriculum import Curriculum
from synthkit.synthesis.generator.embeddings import encoded_class_names, load_embeddings, orthogonal_embeddings
from synthkit.synthesis.generator.nayer import NAYER, NAYERConfig

SMALL = {
    "epochs": 4, "ep_steps": 4, "batch_size": 16, "synthesis_batch": 12, "g_steps": 2, "warmup": 0.4, "nz": 8,
    "width": 4, "embedding_width": 12, "g_life": 2, "warmup_epochs": 2, "lr": 0.05, "T": 4,
}  # fmt: skip


class TestNAYER(SynthesizerContract):
    name = "nayer"
    options = {**SMALL, "student": "convnet_d1_w8_bn"}
    engine_options = {**SMALL, "epochs": 2, "ep_steps": 2, "batch_size": 8, "student": "lenet5_half", "bn": 0}
    inner = {"synthesise": (3, 2), "learn": (3, 1)}
    arrivals = (2, 1)
    falling = ("g_loss", "kd")
    longer = {
        "epochs": 5, "ep_steps": 20, "batch_size": 32, "synthesis_batch": 6, "g_steps": 20, "warmup": 0.2, "adv": 0.0,
        "g_life": 100,
    }  # fmt: skip


def method(images: int = 37, warnings: list[str] | None = None, curriculum: str = "none", **settings) -> NAYER:
    config = NAYERConfig(**{**SMALL, "student": "convnet_d1_w8_bn", **settings})
    warn = None if warnings is None else warnings.append
    return NAYER(config, task(images=images, warn=warn, curriculum=Curriculum.named(curriculum)))


# ---- targets, noise, life of the generator ---------------------------------------------------------------------


def test_every_class_once_per_slice_and_a_random_rest():
    found = method(synthesis_batch=37)
    targets = found.targets(3)
    assert torch.equal(targets[:30], torch.arange(10).repeat(3)) and len(targets) == 37
    rests = {tuple(found.targets(call)[30:].tolist()) for call in range(5)}
    assert len(rests) > 1 and torch.equal(found.targets(3), targets)
    assert found.slices == len(found.generator.weight) == 4


def test_more_classes_than_samples_are_drawn_at_random():
    found = method(synthesis_batch=4)
    assert found.slices == 1 and len(found.targets(0)) == 4


def test_noise_is_new_for_every_call_and_its_biases_are_zero():
    found, drawn = method(), []
    found.generator.redraw = lambda rng, redraw=found.generator.redraw: (  # type: ignore[method-assign]
        redraw(rng), drawn.append((found.generator.weight.clone(), found.generator.bias.clone())),
    )  # fmt: skip
    found.generator_epoch = lambda call: 0  # type: ignore[method-assign]  # the same generator for both calls
    for call in (0, 1):
        found.synthesise(call)
    (first, bias), (second, _) = drawn
    assert not torch.equal(first, second) and not bias.any()
    assert abs(float(first.detach().mean())) < 0.2 and 0.8 < float(first.detach().std()) < 1.2


def test_life_of_the_generator_as_published():
    """400 calls of the CIFAR-10 run: epochs 0 to 19 with 10 calls each, 20 to 119 with 2, a new generator every 10."""
    found = method(images=160_000, synthesis_batch=400, warmup=0.5, epochs=100, warmup_epochs=20, g_life=10)
    assert (found.calls, found.warm_calls) == (400, 200)
    published = [epoch for epoch in range(20) for _ in range(10)] + [e for e in range(20, 120) for _ in range(2)]
    assert [found.generator_epoch(call) for call in range(400)] == published
    births = [call for call in range(400) if found.reborn(call)]
    assert births == [call for call in range(1, 400) if published[call] % 10 == 0 and published[call - 1] % 10]


def test_a_life_that_does_not_divide_the_warm_up_counts_from_both():
    found = method(images=36, synthesis_batch=1, warmup=1 / 3, epochs=24, warmup_epochs=12, g_life=5)
    rule = [e for e in range(1, 36) if e % 5 == 0 or (e - 12) % 5 == 0]
    assert [call for call in range(36) if found.reborn(call)] == rule


def test_rebirth_replaces_the_generator_and_only_then():
    found = method(images=120, warmup=0.0, g_life=1, epochs=5)
    kept = found.generator
    found.synthesise(0)
    assert found.generator is kept
    found.synthesise(next(call for call in range(1, 10) if found.reborn(call)))
    assert found.generator is not kept


# ---- what is minimised -----------------------------------------------------------------------------------------


def test_the_adversary_starts_after_the_warm_up():
    found, seen = method(images=60), []
    found.note_generator = lambda terms, loss: seen.append((found.called, "adversarial" in terms))  # type: ignore
    list(found.generate())
    assert found.warm_calls == 2
    assert seen == [(call, call >= 2) for call in range(5) for _ in range(2)]


def test_curriculum_ramps_the_adversary_up_from_its_constant():
    with_ramp, without = method(curriculum="easy2hard", epochs=8, grad_adv=0.5), method(epochs=8, grad_adv=0.5)
    for found in (with_ramp, without):
        found.called = found.warm_calls
    assert [without.adversarial_weight(e) for e in range(8)] == [1.33] * 8
    assert [with_ramp.adversarial_weight(e) for e in range(8)] == pytest.approx(
        [1.33 + 0.5 * r for r in [0, 0, 0, 0, 1, 2, 3, 3]]
    )


def test_statistics_of_earlier_calls_are_blended_in():
    found = method(g_steps=1)
    assert found.ema.memory is None
    found.synthesise(0)
    first = [(mean.clone(), var.clone()) for mean, var in found.ema.memory or []]
    assert len(first) == 2
    batches, look = [], found.look

    def spied(images, **options):
        batches.append(look(images, **options))
        return batches[-1]

    found.look = spied  # type: ignore[method-assign]
    found.synthesise(1)
    for (old, _), (new, _), (batch, _) in zip(first, found.ema.memory or [], batches[0].statistics, strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * batch.detach())
    assert method(bn_mmt=0.0).synthesise(0) and method(bn_mmt=0.0).ema.memory is None


def test_synthesis_leaves_the_students_statistics_alone():
    """The released code has the student in train mode from an epoch's second batch on; then they would follow G."""
    found = method(images=60, warmup=0.0, curriculum="none")
    student = found.student_view.module.eval()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    found.synthesise(1)
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())
    student.train()  # the released behaviour
    found.synthesise(1)
    moved = [k for k, v in student.state_dict().items() if not torch.equal(before[k], v)]
    assert moved and all("running" in k or "tracked" in k for k in moved)


def test_the_batch_of_lowest_loss_is_kept():
    found = method(g_steps=6, lr_g=1.0)
    offers, net = [], found.generator
    found.note_generator = lambda terms, loss: offers.append(float(loss.detach()))  # type: ignore[method-assign]
    painted = []
    net.register_forward_hook(lambda layer, args, out: painted.append(out.detach().clone()))
    images, _ = found.synthesise(0)
    assert torch.equal(images, painted[int(np.argmin(offers))])


# ---- class vectors ---------------------------------------------------------------------------------------------


def test_label_only_form_is_said_once_and_is_orthonormal():
    warnings: list[str] = []
    found = method(warnings=warnings)
    assert [text for text in warnings if "label-only form" in text] == warnings[:1]
    torch.testing.assert_close(found.embeddings @ found.embeddings.T, torch.eye(10), atol=1e-6, rtol=0)
    assert torch.equal(orthogonal_embeddings(10, 12), found.embeddings)
    assert orthogonal_embeddings(20, 12).shape == (20, 20)
    assert found.facts().identity["embeddings"]["kind"] == "label-only"


@pytest.mark.parametrize("suffix", ["npy", "npz", "safetensors", "pt"])
def test_embeddings_from_a_file(tmp_path, suffix):
    values = torch.randn(10, 7, generator=torch.Generator().manual_seed(1))
    path = str(tmp_path / f"e.{suffix}")
    if suffix == "npy":
        np.save(path, values.numpy())
    elif suffix == "npz":
        np.savez(path, embeddings=values.numpy(), names=np.arange(3))
    elif suffix == "safetensors":
        save_file({"text": values}, path)
    else:
        torch.save(values, path)
    warnings: list[str] = []
    found = method(warnings=warnings, embeddings=path)
    assert torch.equal(found.embeddings, values) and not warnings
    assert found.generator.norm.num_features == 7
    moved = tmp_path / f"elsewhere.{suffix}"
    moved.write_bytes((tmp_path / f"e.{suffix}").read_bytes())
    assert method(embeddings=str(moved)).facts() == found.facts() != method().facts()


def test_embeddings_that_do_not_fit(tmp_path):
    def saved(values: np.ndarray) -> str:
        np.save(tmp_path / "e.npy", values)
        return str(tmp_path / "e.npy")

    for values in (np.zeros((9, 4), np.float32), np.arange(10.0), np.zeros((10, 4), np.int64)):
        with pytest.raises(ConfigError, match=r"floats of shape \(10, E\)"):
            load_embeddings(saved(values), 10)
    for values in (np.zeros((10, 4)), np.full((10, 4), np.nan)):
        with pytest.raises(ConfigError, match="different for every class"):
            load_embeddings(saved(values), 10)
    with pytest.raises(ConfigError, match="no such file"):
        load_embeddings(str(tmp_path / "none.npy"), 10)
    with pytest.raises(ConfigError, match="kind of file"):
        load_embeddings(str(tmp_path / "e.pickle"), 10)
    np.savez(tmp_path / "two.npz", a=np.zeros(3), b=np.zeros(3))
    with pytest.raises(ConfigError, match="none is called 'embeddings'"):
        load_embeddings(str(tmp_path / "two.npz"), 10)


def test_a_file_with_code_in_it_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (sys.exit, (3,))

    torch.save({"embeddings": Trap()}, tmp_path / "trap.pt")
    np.save(tmp_path / "trap.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    (tmp_path / "half.safetensors").write_bytes(b"12345678")
    for name in ("trap.pt", "trap.npy", "half.safetensors"):
        with pytest.raises(WeightsError, match="cannot be read"):
            load_embeddings(str(tmp_path / name), 10)


class Text:
    """Stands for transformers: every prompt becomes its length and its last letter."""

    class CLIPTokenizer:
        @classmethod
        def from_pretrained(cls, folder, **_):
            if "missing" in folder:
                raise OSError("no tokenizer there")
            return lambda prompts, **_: {"prompts": prompts}

    class CLIPTextModelWithProjection(torch.nn.Module):
        @classmethod
        def from_pretrained(cls, folder, **options):
            assert options == {"local_files_only": True, "use_safetensors": True}
            return cls()

        def forward(self, prompts):
            rows = [[len(p), ord(p[-1])] for p in prompts]
            return type("Out", (), {"text_embeds": torch.tensor(rows, dtype=torch.float64)})


def test_embeddings_from_a_text_encoder(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", Text)
    found = encoded_class_names("clip", ["cat", "horse"])
    assert torch.equal(
        found, torch.tensor([[len("a image of cat"), ord("t")], [len("a image of horse"), ord("e")]]).float()
    )
    with pytest.raises(WeightsError, match="no tokenizer there"):
        encoded_class_names("missing", ["cat"])
    view = teacher_view()
    view.class_names = list("abcdefghij")
    warnings: list[str] = []
    built = NAYER(
        NAYERConfig(**SMALL, student="convnet_d1_w8_bn", text_encoder="clip"),
        task(teachers=[view], warn=warnings.append),
    )
    assert built.embeddings.shape == (10, 2) and not warnings
    assert built.facts().identity["embeddings"]["kind"] == "text"


def test_a_text_encoder_needs_names_and_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for names, what in ((None, "names of the classes"), (["cat"], "package transformers")):
        with pytest.raises(RequirementError, match=what):
            encoded_class_names("clip", names)


# ---- settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"bn_mmt": 1.0}, "bn_mmt must be below 1"),
        ({"views": "crop_flop"}, "did you mean 'crop_flip'"),
        ({"embeddings": "a.npy", "text_encoder": "b"}, "exclude each other"),
        ({"generator": "cud"}, "layers of small"),
        ({"g_life": 0}, "g_life must be at least 1"),
        ({"warmup": 1.5}, "warmup must be in"),
    ],
)
def test_settings_out_of_range(settings, what):
    with pytest.raises(SynthkitError, match=what):
        NAYERConfig(**settings)
