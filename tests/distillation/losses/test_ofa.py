"""OFA against the original code's numbers, the formula written out, and its projectors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synthkit.distillation.contract import Batch, Setup, Shapes, Taps
from synthkit.distillation.heads.token_projector import TokenProjector
from synthkit.distillation.losses.ofa import OFA, conv_projector, ofa_loss
from synthkit.errors import ConfigError
from synthkit.logits import soft_ce_per_sample

REFERENCE = Path(__file__).parents[2] / "reference"


def golden(case: str) -> dict[str, torch.Tensor]:
    with np.load(REFERENCE / f"{case}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def batch_of(labels: torch.Tensor) -> Batch:
    return Batch(images=torch.zeros(len(labels), 1, 2, 2), labels=labels)


def setup_of(maps, *, pooled=10, teacher=12, classes=10, seed=0) -> Setup:
    return Setup(
        student=Shapes(pooled=pooled, maps=maps),
        teacher=Shapes(pooled=teacher),
        num_classes=classes,
        batch_size=6,
        epochs=1,
        images=6,
        seed=seed,
    )


@pytest.mark.parametrize("gamma", [1.0, 1.2, 1.5])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_loss_equals_the_original_code(gamma, temperature):
    case = golden("ofa_loss")
    student = case["s"].clone().requires_grad_()
    loss = ofa_loss(student, case["t"], case["y"], gamma=gamma, temperature=temperature)
    key = f"out_e{gamma:g}_T{temperature:g}"
    close(loss.detach(), case[key])
    close(torch.autograd.grad(loss, student)[0], case[f"{key}_grad_s"])


def test_step_of_a_convolutional_student_equals_the_original_code():
    case = golden("ofa_cnn")
    loss = OFA(OFA.Config(gamma=(1.0, 1.1, 1.3, 1.5), stages=(2, 3, 4)))
    loss.setup(setup_of([(3, 16, 16), (4, 8, 8), (6, 4, 4), (8, 2, 2)]))
    assert loss.aux is not None
    loss.aux.double()
    state = {}
    for key, value in case.items():
        if key.startswith("proj."):
            stage, layer, rest = key.removeprefix("proj.").split(".", 2)
            state[f"{stage}.{layer}.{rest.removeprefix('op.')}"] = value
    found = loss.aux.load_state_dict(state, strict=False)
    assert not found.unexpected_keys and all(k.endswith("num_batches_tracked") for k in found.missing_keys)
    heads = dict(loss.aux.items())  # type: ignore[operator]  # a ModuleDict
    for k in ("2", "3", "4"):  # the loss itself casts logits to float32, so the sum is checked in float64 by hand
        heads[k].train()
    student = {k: case[k].clone().requires_grad_() for k in ("s", "f2", "f3", "f4")}
    logits = [heads[k](student[f"f{k}"]) for k in ("2", "3", "4")]
    for k, found in zip(("2", "3", "4"), logits, strict=True):
        close(found.detach(), case[f"out_logits_{k}"])
    stages = sum(ofa_loss(x, case["t"], case["y"], gamma=g) for x, g in zip(logits, (1.0, 1.1, 1.3), strict=True))
    last = ofa_loss(student["s"], case["t"], case["y"], gamma=1.5)
    close(stages.detach(), case["out_loss_ofa"])  # type: ignore[union-attr]
    close(last.detach(), case["out_loss_kd"])
    task = torch.nn.functional.cross_entropy(student["s"], case["y"], label_smoothing=0.1)
    close(task.detach(), case["out_loss_gt"])
    grads = torch.autograd.grad(stages + last + task, list(student.values()))
    for name, grad in zip(student, grads, strict=True):
        close(grad, case[f"out_grad_{name}"])
    # the class gives the same two values, to float32
    maps = [torch.zeros(6, 3, 16, 16, dtype=torch.float64), case["f2"], case["f3"], case["f4"]]
    parts = loss(Taps(logits=case["s"], maps=maps), Taps(logits=case["t"]), batch_of(case["y"]))
    assert all(value.shape == (6,) for value in parts.values())
    torch.testing.assert_close(parts["ofa"].mean(), case["out_loss_kd"], rtol=1e-6, atol=0)
    torch.testing.assert_close(parts["ofa_stages"].mean().double(), case["out_loss_ofa"], rtol=1e-5, atol=0)


def test_values_by_hand_and_identities():
    case = golden("ofa_loss")
    s, t, y = case["s"], case["t"], case["y"]
    close(ofa_loss(s, t, y, reduction="none"), soft_ce_per_sample(s, t))
    p, q = torch.softmax(t, dim=1), torch.softmax(s, dim=1)
    for i, value in enumerate(ofa_loss(s, t, y, gamma=1.5, reduction="none").tolist()):
        terms = []
        for c in range(10):
            target = float(c == int(y[i]))
            terms.append(-((float(p[i, c]) + target) ** 1.5 - target) * math.log(float(q[i, c])))
        assert value == pytest.approx(sum(terms), rel=1e-10)
    x = s[:3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ofa_loss(x, t[:3], y[:3], gamma=1.3, reduction="none"), x)
    extreme = torch.tensor([[1e4, -1e4]], requires_grad=True)
    ofa_loss(extreme, torch.zeros(1, 2), torch.tensor([1]), gamma=1.5).backward()
    assert extreme.grad is not None and bool(torch.isfinite(extreme.grad).all())


def test_convolutional_projector_halves_and_widens():
    head = conv_projector(4, 2, 12, 10)
    assert head(torch.randn(2, 4, 8, 8)).shape == (2, 10)
    first, second = head[0], head[1]
    assert first(torch.randn(2, 4, 8, 8)).shape == (2, 8, 4, 4)
    assert second(torch.randn(2, 8, 4, 4)).shape == (2, 12, 2, 2)
    separable = 4 * 9 + 4 * 4 + 2 * 4 + 4 * 9 + 4 * 8 + 2 * 8
    assert sum(p.numel() for p in first.parameters()) == separable


def test_three_stages_train_student_and_projectors():
    loss = OFA()
    loss.setup(setup_of([(4, 8, 8), (8, 4, 4), (16, 2, 2)], pooled=16, teacher=0, classes=5))
    assert loss.aux is not None
    assert list(loss.aux.state_dict())[0].startswith("1.0.0")
    assert len(loss.aux["1"]) == 2 + 3 and loss.aux["3"][-1].in_features == 16  # type: ignore[index]
    maps = [torch.randn(4, c, s, s, requires_grad=True) for c, s in ((4, 8), (8, 4), (16, 2))]
    logits = torch.randn(4, 5, requires_grad=True)
    parts = loss(Taps(logits=logits, maps=maps), Taps(logits=torch.randn(4, 5)), batch_of(torch.arange(4)))
    torch.stack([v.mean() for v in parts.values()]).sum().backward()
    assert all(x.grad is not None and float(x.grad.abs().sum()) > 0 for x in [*maps, logits])
    assert all(p.grad is not None for p in loss.aux.parameters())


def test_weights_hang_on_the_seed_only():
    def weights(seed: int) -> torch.Tensor:
        loss = OFA()
        loss.setup(setup_of([(4, 8, 8), (8, 4, 4)], seed=seed))
        assert loss.aux is not None
        return torch.cat([p.detach().flatten() for p in loss.aux.parameters()])

    before = torch.random.get_rng_state()
    assert torch.equal(weights(3), weights(3)) and not torch.equal(weights(3), weights(4))
    assert torch.equal(before, torch.random.get_rng_state())


def test_token_projector():
    loss = OFA()
    loss.setup(setup_of([(8, 14, 14)] * 4, pooled=8, classes=5))
    assert loss.aux is not None
    heads = dict(loss.aux.items())  # type: ignore[operator]  # a ModuleDict
    assert all(isinstance(head, TokenProjector) for head in heads.values())
    assert [len(heads[k].blocks) for k in "1234"] == [3, 2, 1, 1]
    x = torch.randn(2, 8, 14, 14)
    assert heads["1"].merge(x.permute(0, 2, 3, 1)).shape == (2, 7, 7, 8) and heads["1"](x).shape == (2, 5)
    block = 2 * 2 * 8 + 3 * 64 + (64 + 8) + (8 * 32 + 32) + (32 * 8 + 8)
    assert sum(p.numel() for p in heads["1"].blocks[0].parameters()) == block
    assert TokenProjector(6, 28, 8, 1, 5)(torch.randn(2, 6, 28, 28)).shape == (2, 5)
    assert TokenProjector(6, 4, 8, 1, 5)(torch.randn(2, 6, 4, 4)).shape == (2, 5)  # too small to merge
    tokens = TokenProjector(2, 14, 4, 1, 3).get_submodule("merge.0")
    image = torch.arange(2 * 14 * 14.0).view(1, 2, 14, 14).permute(0, 2, 3, 1)
    kept: list[torch.Tensor] = []
    tokens.get_submodule("norm").register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    tokens(image)
    corner = [image[0, r, c] for r, c in ((0, 0), (1, 0), (0, 1), (1, 1))]  # the order of a Swin patch merging
    assert torch.equal(kept[0][0, 0, 0], torch.cat(corner))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"stages": (4,)}, "loss.stages.*1 to 3"),
        ({"stages": (1, 1)}, "loss.stages"),
        ({"gamma": (1.0, 1.5)}, "loss.gamma needs 1 value, or 4"),
    ],
)
def test_misfits_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        OFA(OFA.Config(**config)).setup(setup_of([(4, 8, 8), (8, 4, 4), (16, 2, 2)]))


def test_bad_options_are_refused():
    options: list[dict[str, Any]] = [{"gamma": ()}, {"gamma": (0.0,)}, {"temperature": 0.0}, {"projector": "mlp"}]
    for bad in options:
        with pytest.raises(ConfigError, match=f"loss.{next(iter(bad))}"):
            OFA.Config(**bad)
    with pytest.raises(ConfigError, match="projector conv"):
        TokenProjector(6, 14, 6, 1, 5)
