"""GenDD's loss against the original code's numbers, hand calculation and its contract."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from synthkit import tables
from synthkit.config.schema import DistillConfig, RuntimeConfig
from synthkit.distillation.contract import Batch, Setup, Shapes, Taps
from synthkit.distillation.distill import distill
from synthkit.distillation.heads.gaussian_diffusion import GaussianDiffusion, cosine_betas
from synthkit.distillation.heads.gendd import GenDDNetwork, SimpleMLPAdaLN
from synthkit.distillation.losses.gendd import GenDD
from synthkit.distillation.losses.gendd_rows import (
    beta2_at,
    contract,
    diffusion_loss,
    dropped,
    mixed,
    released_rate,
    tokenised,
)
from synthkit.errors import ConfigError, ModelError
from synthkit.logits import ce_per_sample
from synthkit.models.build import load_model

GOLDEN = Path(__file__).parents[2] / "reference"
SMALL = GenDD.Config(token_dim=8, width=16, depth=2, repeats=3, steps=4, samples=2)


def golden(case: str, *, double: bool = False) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{case}.npz") as file:
        found = {key: torch.from_numpy(file[key]) for key in file.files}
    return {k: v.double() if double and v.dtype == torch.float32 else v for k, v in found.items()}


def make(config: GenDD.Config = SMALL, *, student: int = 6, teacher: int = 24, seed: int = 0) -> GenDD:
    """A loss that is set up; its head is moved away from the zeros it starts from."""
    torch.manual_seed(5)
    loss = GenDD(config)
    loss.setup(
        Setup(
            student=Shapes(pooled=student),
            teacher=Shapes(pooled=teacher),
            num_classes=5,
            batch_size=4,
            epochs=10,
            images=100,
            student_classifier=nn.Linear(student, 5),
            teacher_classifier=nn.Linear(teacher, 5).requires_grad_(False),
            seed=seed,
        )
    )
    for parameter in loss.aux["head"].parameters():
        nn.init.normal_(parameter, std=0.2)
    return loss


def batch(labels: torch.Tensor | None = None, seed: int = 0) -> Batch:
    labels = torch.tensor([2, 0, 2, 4]) if labels is None else labels
    return Batch(images=torch.zeros(4, 3, 2, 2), labels=labels, draw=lambda name: torch.Generator().manual_seed(seed))


def taps(size: int, seed: int) -> Taps:
    pooled = torch.randn(4, size, generator=torch.Generator().manual_seed(seed))
    return Taps(logits=torch.zeros(4, 5), pooled=pooled)


# --- targets and rows -------------------------------------------------------------------------------------------------


def test_contraction_equals_the_original_code():
    values = golden("gendd_tokens")
    x, rows = values["target"], values["m.classifier.weight"]
    for name, labels in (("hard", values["y"]), ("soft", values["q"]), ("none", None)):
        torch.testing.assert_close(contract(x, rows, labels, 0.7), values[f"out_contract_{name}"], rtol=1e-5, atol=1e-6)


def test_one_hot_labels_are_hard_labels():
    values = golden("gendd_tokens", double=True)
    rows, y = values["m.classifier.weight"], values["y"]
    one_hot = torch.nn.functional.one_hot(y, 5)
    torch.testing.assert_close(
        contract(values["target"], rows, one_hot, 0.3), contract(values["target"], rows, y, 0.3), rtol=1e-12, atol=0
    )
    assert torch.equal(contract(values["target"], rows, y, 0.0), values["target"])
    torch.testing.assert_close(contract(values["target"], rows, y, 1.0), rows[y])


def test_tokens_mixing_and_dropping_equal_the_original_code():
    values = golden("gendd_tokens")
    z = torch.nn.functional.layer_norm(
        values["x"], (6,), values["m.cls_projector.0.weight"], values["m.cls_projector.0.bias"]
    )
    target = contract(values["target"], values["m.classifier.weight"], values["y"], 0.7)
    tokens, beside, position = tokenised(target, z, 8, 2)
    torch.testing.assert_close(tokens, values["out_tok_plain"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(beside, values["out_z_plain"], rtol=1e-5, atol=1e-6)
    assert torch.equal(position, values["out_chunk"])
    share, order = values["mix_m"], values["perm"]
    tokens, beside, _ = tokenised(mixed(target, share, order), mixed(z, share, order), 8, 2)
    torch.testing.assert_close(tokens, values["out_tok_mix"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dropped(beside, values["u"], 0.2), values["out_z_mix_drop"], rtol=1e-5, atol=1e-6)
    assert bool((values["u"] < 0.2).any()) and bool((values["u"] >= 0.2).any())


def test_row_order_by_hand():
    feature, condition = torch.arange(8.0).view(2, 4), torch.tensor([[10.0], [20.0]])
    tokens, beside, position = tokenised(feature, condition, 2, 3)
    for r in range(3):
        for b in range(2):
            for c in range(2):
                row = (r * 2 + b) * 2 + c
                assert torch.equal(tokens[row], feature[b, 2 * c : 2 * c + 2])
                assert float(beside[row]) == float(condition[b]) and int(position[row]) == c


# --- training loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [True, False])
def test_training_equals_the_original_code(double):
    values = golden("gendd_train", double=double)
    out, how = ("out64_", {"rtol": 1e-9, "atol": 1e-12}) if double else ("out_", {"rtol": 2e-4, "atol": 2e-5})
    kind = values["x"].dtype
    prefix = "m.diffloss.net."
    head = SimpleMLPAdaLN(8, 6, 3, width=16).to(kind)
    head.load_state_dict({k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)})
    norm = nn.LayerNorm(6).to(kind)
    norm.load_state_dict({k: values[f"m.cls_projector.0.{k}"] for k in ("weight", "bias")})
    x = values["x"].clone().requires_grad_()
    fc = {k: values[f"m.model.fc.{k}"].clone().requires_grad_() for k in ("weight", "bias")}
    target = contract(values["target"], values["m.classifier.weight"], values["y"], 0.7)
    process = GaussianDiffusion(cosine_betas())
    rows = tokenised(target, norm(x), 8, 2)
    state = process.noised(rows[0], values["t"], values["noise"])
    output = head(state, values["t"], rows[1], rows[2])
    squared, bits = process.terms(output, rows[0], state, values["noise"], values["t"])
    for found, name in ((squared, "mse"), (bits, "vb"), (state, "xt"), (output, "model_out")):
        torch.testing.assert_close(found.detach(), values[out + name], **how)
    found = diffusion_loss(head, process, rows, values["t"], values["noise"])
    torch.testing.assert_close(found, squared + bits)
    loss = found.mean()
    torch.testing.assert_close(loss.detach(), values[f"{out}loss"], **how)
    logits = nn.functional.linear(x.detach(), fc["weight"], fc["bias"])
    ce = ce_per_sample(logits, values["y"]).mean()
    torch.testing.assert_close(logits.detach(), values[f"{out}logits"], **how)
    torch.testing.assert_close(ce.detach(), values[f"{out}ce"], **how)
    (loss + ce).backward()
    for found, name in (
        (x.grad, "x_total"),
        (x.grad, "x"),  # the cross-entropy adds nothing to the backbone
        (norm.weight.grad, "ln_w"),
        (norm.bias.grad, "ln_b"),
        (fc["weight"].grad, "fc_w"),
        (head.final_layer.linear.weight.grad, "final_w"),
        (head.pos_embed.weight.grad, "pos"),
        (head.input_proj.weight.grad, "input_w"),
        (head.res_blocks[0].adaLN_modulation[1].weight.grad, "ada0_w"),
        (head.time_embed.mlp[0].bias.grad, "time0_b"),
    ):
        torch.testing.assert_close(found, values[f"{out}grad_{name}"], **how)


def test_gradients_of_the_pure_function():
    torch.manual_seed(0)
    head = SimpleMLPAdaLN(2, 3, 2, width=4, depth=1).double()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    process = GaussianDiffusion(cosine_betas())
    index, noise = torch.tensor([0, 3, 200, 700]), torch.randn(4, 2, dtype=torch.float64)
    target = torch.randn(2, 4, dtype=torch.float64)

    def loss(condition: torch.Tensor) -> torch.Tensor:
        return process.terms(*_run(condition), noise, index)[0]

    def _run(condition: torch.Tensor):
        tokens, beside, position = tokenised(target, condition, 2, 1)
        state = process.noised(tokens, index, noise)
        return head(state, index, beside, position), tokens, state

    # the whole loss has a frozen part, of which finite differences know nothing: its error term, then its variance
    condition = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, condition)
    output, tokens, state = (v.detach() for v in _run(condition))
    place = output[:, 2:].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: process.terms(torch.cat([output[:, :2], v], dim=1), tokens, state, noise, index)[1], place
    )


def test_schedules_equal_the_original_code():
    values = np.load(GOLDEN / "gendd_schedules_opt.npz")
    found = [beta2_at(step / 9999, 0.95, 0.999) for step in (0, 1, 10, 5000, 9999)]
    np.testing.assert_allclose(found, values["out_beta2"], rtol=1e-9)
    for name, schedule in (("out_lr", "step"), ("out_lr_cos", "cosine")):
        found = [1e-3 * released_rate(epoch, 240, schedule, 50) for epoch in range(1, 241)]
        np.testing.assert_allclose(found, values[name], rtol=1e-9, atol=1e-18)
    # the released quirk, beside what was meant: the full rate once the warm-up is over
    assert released_rate(100, 240, "step", 50) == 0.98
    assert released_rate(100, 240, "step", 1) == 1.0


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_values_by_a_naive_loop():
    loss, student, teacher, given = make(), taps(6, 1), taps(24, 2), batch()
    found = loss(student, teacher, given)
    draw = torch.Generator().manual_seed(0)
    index = torch.randint(1000, (36,), generator=draw)
    here = torch.Generator().manual_seed(int(torch.randint(2**62, (1,), generator=draw)))
    noise, uniform = torch.randn(36, 8, generator=here), torch.rand(36, generator=here)
    z = loss.aux["norm"](student.pooled)
    assert 0 < int((uniform < 0.2).sum()) < 36
    for b in range(4):
        target = 0.1 * teacher.pooled[b] + 0.9 * loss.classifier.weight[given.labels[b]]
        values = []
        for r in range(3):
            for c in range(3):
                row = (r * 4 + b) * 3 + c
                token, t = target[None, 8 * c : 8 * c + 8], index[row : row + 1]
                condition = z[b : b + 1] * (uniform[row] >= 0.2)
                state = loss.process.noised(token, t, noise[row : row + 1])
                output = loss.aux["head"](state, t, condition, torch.tensor([c]))
                squared, bits = loss.process.terms(output, token, state, noise[row : row + 1], t)
                values.append(squared + bits)
        torch.testing.assert_close(found["gendd"][b], torch.cat(values).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["gendd_ce"], ce_per_sample(loss.plain(student.pooled), given.labels))


def test_the_backbone_learns_from_the_diffusion_alone():
    loss = make()
    student = taps(6, 1)
    student.pooled.requires_grad_()
    found = loss(student, taps(24, 2), batch())
    assert {name: value.shape for name, value in found.items()} == {"gendd": (4,), "gendd_ce": (4,)}
    found["gendd_ce"].sum().backward()
    assert student.pooled.grad is None and float(loss.plain.weight.grad.abs().sum()) > 0
    loss.plain.zero_grad()
    found["gendd"].sum().backward()
    assert float(student.pooled.grad.abs().sum()) > 0 and loss.plain.weight.grad is None
    assert loss.classifier.weight.grad is None
    assert all(p.grad is not None for p in loss.aux.parameters())


def test_draws_hang_on_the_step_alone():
    loss, student, teacher = make(), taps(6, 1), taps(24, 2)
    state = torch.random.get_rng_state()
    first, again = (loss(student, teacher, batch())["gendd"] for _ in range(2))
    assert torch.equal(first, again) and torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(first, loss(student, teacher, batch(seed=1))["gendd"])
    for a, b in zip(make().aux["norm"].parameters(), make(seed=1).aux["norm"].parameters(), strict=True):
        assert torch.equal(a, b)  # a LayerNorm starts from ones and zeros


def test_without_labels():
    config = dataclasses.replace(SMALL, supervised=False)
    loss, student, teacher = make(config), taps(6, 1), taps(24, 2)
    assert GenDD.requires.labels and not loss.requires.labels and loss.requires.relational
    found = loss(student, teacher, batch())
    assert list(found) == ["gendd"]
    without = loss(student, teacher, dataclasses.replace(batch(), labels=None))
    assert torch.equal(found["gendd"], without["gendd"])
    contracted = make(dataclasses.replace(SMALL, contraction=0.0))(student, teacher, batch())["gendd"]
    assert torch.equal(found["gendd"], contracted)  # lambda 0 is the same target
    assert not torch.equal(found["gendd"], make()(student, teacher, batch())["gendd"])


def test_mixing_pairs_samples():
    student, teacher = taps(6, 1), taps(24, 2)
    plain = make(dataclasses.replace(SMALL, drop=0.0))(student, teacher, batch())["gendd"]
    loss = make(dataclasses.replace(SMALL, drop=0.0, mix=1.0))
    found = loss(student, teacher, batch())["gendd"]
    assert torch.equal(found, loss(student, teacher, batch())["gendd"]) and not torch.equal(found, plain)
    same = Taps(logits=student.logits, pooled=student.pooled[:1].expand(4, -1))
    target = Taps(logits=student.logits, pooled=teacher.pooled[:1].expand(4, -1))
    one = batch(labels=torch.zeros(4, dtype=torch.int64))
    assert bool(torch.isfinite(loss(same, target, one)["gendd"]).all())


def test_optimiser_groups_and_schedules():
    loss = make(dataclasses.replace(SMALL, lr="step", lr_warmup=4, beta2=(0.9, 0.99)))
    student = nn.Sequential(nn.Linear(6, 6), loss.plain)
    optimizer = torch.optim.AdamW(loss.parameter_groups(student), lr=1.0, weight_decay=0.05)
    decayed, free = optimizer.param_groups
    assert decayed["weight_decay"] == 0.05 and free["weight_decay"] == 0.0
    assert {id(p) for p in free["params"]} == {id(p) for p in loss.aux["head"].parameters()}
    assert {id(p) for p in decayed["params"]} == {
        id(p) for p in (*student.parameters(), *loss.aux["norm"].parameters())
    }
    for progress, rate in ((0.0, 0.25), (0.15, 0.5), (0.55, 0.75), (0.65, 0.1), (0.99, 0.001)):
        for group in optimizer.param_groups:
            group["lr"] = 1.0
        loss.on_step(optimizer, progress)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate, rate])
        assert free["betas"] == (0.9, beta2_at(progress, 0.9, 0.99))
    frozen = make(dataclasses.replace(SMALL, supervised=False))
    groups = frozen.parameter_groups(nn.Sequential(nn.Linear(6, 6), frozen.plain))
    assert len(groups[0]["params"]) == 4  # the backbone's two and the LayerNorm's two
    sgd = torch.optim.SGD(frozen.parameter_groups(student), lr=0.5)
    frozen.on_step(sgd, 0.5)
    assert sgd.param_groups[0]["lr"] == 0.5 and "betas" not in sgd.param_groups[0]


class _Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Linear(12, 6), nn.Linear(6, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(images.flatten(1)).relu())


def test_deployed_and_rebuilt():
    loss, student = make(), _Student().train()
    images = torch.randn(3, 3, 2, 2)
    network = loss.deploy(student)
    assert not network.training and student.training and loss.aux.training
    logits = network(images)
    assert logits.shape == (3, 5)
    with torch.no_grad():
        student.body.weight.mul_(2.0)
    assert not torch.equal(network(images), logits)  # it follows the training
    again = GenDD.rebuild(_Student(), loss.deployed_settings())
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(images), network(images)) and not again.training
    assert network.state_dict().keys() >= {"student.fc.weight", "norm.weight", "classifier.weight"}


def test_it_learns_to_give_the_teacher_back():
    """Five well separated features: after some steps the sampled ones classify as the teacher does."""
    torch.manual_seed(1)
    config = GenDD.Config(token_dim=4, width=32, depth=1, repeats=8, steps=16, samples=4, guidance=1.0)
    loss = GenDD(config)
    teacher, student = nn.Linear(4, 5).requires_grad_(False), _Student()
    nn.init.orthogonal_(teacher.weight, gain=2.0)
    loss.setup(
        Setup(
            student=Shapes(pooled=6),
            teacher=Shapes(pooled=4),
            num_classes=5,
            batch_size=32,
            epochs=1,
            images=32,
            student_classifier=student.fc,
            teacher_classifier=teacher,
        )
    )
    images = torch.randn(5, 12)[torch.arange(32) % 5] + 0.05 * torch.randn(32, 12)
    labels = torch.arange(32) % 5
    pooled = teacher.weight[labels]
    optimizer = torch.optim.AdamW(loss.parameter_groups(student), lr=3e-3)
    figures = []
    for step in range(300):
        feature = student.body(images).relu()
        given = Batch(images=images, labels=labels, draw=lambda name, step=step: torch.Generator().manual_seed(step))
        found = loss(
            Taps(logits=student.fc(feature), pooled=feature), Taps(logits=teacher(pooled), pooled=pooled), given
        )
        total = sum(value.mean() for value in found.values())
        optimizer.zero_grad()
        total.backward()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * 0.5 * (1 + np.cos(np.pi * step / 300))
        loss.on_step(optimizer, step / 300)
        optimizer.step()
        figures.append(float(found["gendd"].detach().median()))
    assert np.mean(figures[-30:]) < 0.3 * np.mean(figures[:30])
    with torch.no_grad():
        network, seen = loss.deploy(student), images.view(32, 3, 2, 2)
        agreement = (network(seen).argmax(1) == teacher(pooled).argmax(1)).float().mean()
    assert float(agreement) > 0.8


@pytest.mark.parametrize("supervised", [True, False])
def test_a_whole_run(workshop, tmp_path, supervised):
    """Distilled, deployed, priced, saved and loaded: the run directory is the network with its head."""
    config = GenDD.Config(
        supervised=supervised, token_dim=14, width=16, depth=1, repeats=4, steps=8, samples=2, guidance=1.5
    )
    given = DistillConfig(
        bank=str(workshop.bank), student="lenet5_half_bn", epochs=2, batch_size=32, optimizer="adamw", lr=4e-3,
        augment="none", loss_name="gendd", loss=config, labels="argmax" if supervised else "none",
        eval_data=workshop.data, out=str(tmp_path / "run"), runtime=RuntimeConfig(device="cpu"),
    )  # fmt: skip
    result = distill(given)
    loaded = load_model(str(result.path))
    assert isinstance(loaded.module, GenDDNetwork) and loaded.card.extra["head"]["loss"] == "gendd"
    images = torch.rand(3, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.module(images), load_model(str(result.path)).module(images))
        plain = load_model(str(result.path / "plain")).module
        torch.testing.assert_close(plain(images), loaded.module.student(images))
    assert bool((loaded.module.head.final_layer.linear.weight != 0).any())


def test_micro_batches_change_nothing(workshop, tmp_path):
    """Noise, times and dropped rows belong to rows of the global batch, however it is cut (no BatchNorm here)."""
    found = []
    for parts in (1, 4):
        given = DistillConfig(
            bank=str(workshop.bank), student="lenet5_half", epochs=1, batch_size=32, optimizer="sgd", lr=1e-3,
            augment="none", loss_name="gendd", labels="argmax", accumulate=parts, out=str(tmp_path / f"run{parts}"),
            loss=GenDD.Config(token_dim=14, width=16, depth=1, repeats=2, steps=2, samples=1, mix=1.0),
            runtime=RuntimeConfig(device="cpu"),
        )  # fmt: skip
        found.append(load_model(str(distill(given).path)).module.state_dict())
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=1e-5)


def test_autocast_changes_nothing():
    loss, student, teacher = make(), taps(6, 1), taps(24, 2)
    expected = loss(student, teacher, batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(student, teacher, batch())
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_settings_from_a_file_are_checked():
    settings = make().deployed_settings()
    for changed in ({"width": 10**9}, {"steps": 1}, {"token_dim": 7}, {"seed": "x"}, {"guidance": None}, {"bias": 1}):
        with pytest.raises(ModelError, match="head gendd"):
            GenDD.rebuild(_Student(), {**settings, **changed})
    with pytest.raises(ModelError, match="missing; got .'eta'."):
        GenDD.rebuild(_Student(), {k: v for k, v in settings.items() if k != "eta"})


def test_wrong_options_are_refused():
    for field, value in (
        ("contraction", 1.5),
        ("drop", -0.1),
        ("repeats", 0),
        ("steps", 1),
        ("mix", -1.0),
        ("eta", 2.0),
        ("beta2", (0.9, 1.0)),
        ("lr", "stepp"),
    ):
        with pytest.raises(ConfigError, match=f"loss.{field}"):
            dataclasses.replace(SMALL, **{field: value})
    with pytest.raises(ConfigError, match="use 42"):
        make(GenDD.Config(), teacher=84)


def test_in_the_table():
    assert tables.lookup("loss", "gendd") is GenDD
