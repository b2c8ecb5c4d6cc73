"""Factor transfer against the original code, and its phase before the student."""

from __future__ import annotations

import pytest
import torch

from distillation.losses.map_cases import (
    build,
    check_reproducible,
    close,
    count,
    fill,
    golden,
    random_maps,
    run,
    taps,
)
from synthkit.distillation.contract import Look
from synthkit.distillation.losses.ft import FT, ft_loss
from synthkit.errors import ConfigError, NonFiniteError


def test_original_code():
    case = golden("ft")
    student = case["f_s"].clone().requires_grad_()
    loss = build(FT(), taps([student]), taps([case["f_t"]]))
    for name in ("encoder", "decoder"):  # theirs counts an empty place for BatchNorm
        fill(loss.aux[name], case, {"0": f"para.{name}.0", "2": f"para.{name}.3", "4": f"para.{name}.6"})
    fill(loss.aux["translator"], case, {str(i): f"trans.encoder.{i}" for i in (0, 1, 3, 4, 6, 7)})
    factor = loss.aux["encoder"](case["f_t"])
    close(factor, case["out_factor_t"])
    rebuilt = loss.aux["decoder"](factor)
    close(rebuilt, case["out_rec"])
    close(torch.nn.functional.mse_loss(rebuilt, case["f_t"]), case["out_rec_loss"])
    close(loss.aux["translator"](student), case["out_factor_s"])
    values = run(loss, taps([student]), taps([case["f_t"]]))
    assert values.shape == (6,)
    close(values.mean(), case["out_loss"])
    close(torch.autograd.grad(values.mean(), student)[0], case["out_grad_f_s"])
    close(run(loss, taps([student]), taps([case["f_t2"]])).mean(), case["out_loss_mismatch"])


def test_naive_loop_and_gradient():
    (s,) = random_maps((2, 2, 2, 2), grad=True)
    (t,) = random_maps((2, 3, 2, 2), seed=1)
    expected = []
    for i in range(2):
        factors = []
        for f in (s.detach(), t):
            q = [sum(float(v) ** 2 for v in f[i, :, y, x]) / f.shape[1] for y in range(2) for x in range(2)]
            factors.append([v / sum(w * w for w in q) ** 0.5 for v in q])
        expected.append(sum(abs(a - b) for a, b in zip(*factors, strict=True)) / 4)
    close(ft_loss(s, t, reduction="none"), torch.tensor(expected, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x: ft_loss(x, t, reduction="none"), s)


def test_parameters():
    """Convolutions 3x3 with bias; the translator's first one keeps the student's channels."""
    student, teacher = random_maps((4, 3, 4, 4), (4, 8, 4, 4))
    aux = build(FT(FT.Config(ratio=0.25)), taps([student]), taps([teacher])).aux
    factor = 2

    def conv(a, b):
        return 9 * a * b + b

    assert count(aux["encoder"]) == conv(8, 8) + conv(8, factor) + conv(factor, factor)
    assert count(aux["decoder"]) == conv(factor, factor) + conv(factor, 8) + conv(8, 8)
    assert count(aux["translator"]) == sum(conv(*p) + 2 * p[1] for p in ((3, 3), (3, factor), (factor, factor)))


@pytest.fixture
def prepared():
    """(loss, teacher maps of a bank in batches, number of passes)."""
    student, teacher = random_maps((4, 3, 4, 4), (100, 6, 4, 4))
    teacher = teacher.relu()
    passes = []

    def looks():
        passes.append(1)
        for part in teacher.split(80):
            with torch.no_grad():  # held between two looks, as a careless source would
                yield Look(teacher=taps([part]), labels=None, index=torch.arange(len(part)))

    loss = build(FT(FT.Config(epochs=8, lr=0.3)), taps([student]), taps([teacher[:4]]))
    return loss, looks, teacher, passes


def error_of(loss, maps):
    with torch.no_grad():
        return float(torch.nn.functional.mse_loss(loss.aux["decoder"](loss.aux["encoder"](maps)), maps))


def test_the_paraphraser_learns_first_and_is_frozen(prepared):
    loss, looks, teacher, passes = prepared
    before, start = error_of(loss, teacher), {k: v.clone() for k, v in loss.aux.state_dict().items()}
    loss.prepare(looks)
    assert len(passes) == 8 and error_of(loss, teacher) < 0.9 * before
    assert all(torch.equal(v, start[k]) for k, v in loss.aux.state_dict().items() if k.startswith("translator"))
    trained = [name for name, p in loss.aux.named_parameters() if p.requires_grad]
    assert trained and all(name.startswith("translator") for name in trained)
    assert all(p.grad is None for p in loss.aux.parameters())
    (student,) = random_maps((4, 3, 4, 4), seed=3, grad=True)
    run(loss, taps([student]), taps([teacher[:4]])).mean().backward()
    assert student.grad is not None
    assert {name for name, p in loss.aux.named_parameters() if p.grad is not None} == set(trained)


def test_the_first_pass_by_hand(prepared):
    """Two batches of 80 and 20 make the steps 64, 16 and 20: SGD, momentum 0.9, weight decay 5e-4, rate 0.01."""
    loss, looks, teacher, _ = prepared
    loss.config = FT.Config(epochs=1)
    weights = {k: v.detach().clone().requires_grad_() for k, v in loss.aux.named_parameters() if "translator" not in k}
    buffers = {k: torch.zeros_like(v) for k, v in weights.items()}

    def rebuilt(x):
        for part, move in (("encoder", torch.nn.functional.conv2d), ("decoder", torch.nn.functional.conv_transpose2d)):
            for i in (0, 2, 4):
                weight, bias = weights[f"{part}.{i}.weight"], weights[f"{part}.{i}.bias"]
                x = torch.nn.functional.leaky_relu(move(x, weight, bias, padding=1), 0.1)
        return x

    for part in (teacher[:64], teacher[64:80], teacher[80:]):
        error = (rebuilt(part) - part).square().mean()
        for (name, w), g in zip(weights.items(), torch.autograd.grad(error, list(weights.values())), strict=True):
            buffers[name] = 0.9 * buffers[name] + g + 5e-4 * w.detach()
            w.data -= 0.01 * buffers[name]
    loss.prepare(looks)
    for name, expected in weights.items():
        close(loss.aux.get_parameter(name), expected.detach(), rtol=1e-8)


def test_divergence_is_told(prepared):
    loss, looks, _, _ = prepared
    loss.config = FT.Config(epochs=30, lr=1e6)
    with pytest.raises(NonFiniteError, match="paraphraser.*lower loss.lr"):
        loss.prepare(looks)


def test_a_resumed_run_needs_no_phase(prepared):
    """All that the phase found is in the state of `aux`; the paraphraser is frozen without it as well."""
    loss, looks, teacher, _ = prepared
    loss.prepare(looks)
    (f,) = random_maps((4, 3, 4, 4), seed=3)
    resumed = build(FT(), taps([f]), taps([teacher[:4]]), seed=7)
    student, target = taps([f]), taps([teacher[:4]])
    assert not torch.equal(run(resumed, student, target), run(loss, student, target))
    resumed.aux.load_state_dict(loss.aux.state_dict())
    close(run(resumed, student, target), run(loss, student, target).detach())
    assert not any(p.requires_grad for n, p in resumed.aux.named_parameters() if not n.startswith("translator"))
    check_reproducible(FT, taps([f]), taps([teacher[:4]]))


@pytest.mark.parametrize(("field", "value"), [("ratio", 0.0), ("ratio", 1.5), ("epochs", -1), ("lr", 0.0)])
def test_bad_options_are_refused(field, value):
    with pytest.raises(ConfigError, match=f"loss.{field}"):
        FT.Config(**{field: value})
