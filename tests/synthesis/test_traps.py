"""Traps of data-free distillation: mistakes that train something, only not what was meant."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from workshop import save_teacher

from synthesis.tiny import MEAN, STD, TinyNet, runtime, task, teacher_view
from synthkit.config.parse import parse_config
from synthkit.errors import NonFiniteError, SynthkitError
from synthkit.models.view import TeacherView
from synthkit.synthesis import engine
from synthkit.synthesis.base import to_uint8, widened
from synthkit.synthesis.generator.cudfkd import CuDFKD, CuDFKDConfig
from synthkit.synthesis.losses import class_entropy

SMALL: dict[str, Any] = {
    "epochs": 4, "ep_steps": 4, "kd_steps": 2, "batch_size": 16, "nz": 8, "width": 4, "depth": 1, "lr_g": 0.02,
    "student": "convnet_d1_w8_bn",
}  # fmt: skip


def build(*, of_task: dict[str, Any] | None = None, **settings: Any) -> CuDFKD:
    return CuDFKD(CuDFKDConfig(**{**SMALL, **settings}), task(**(of_task or {})))


# ---- the teacher -----------------------------------------------------------------------------------------------


def test_a_teacher_handed_over_in_train_mode_is_frozen():
    """In train mode its BatchNorm would normalise by the batch and drift: the knowledge would leak away."""
    module = copy.deepcopy(teacher_view().module).train().requires_grad_(True)
    view = TeacherView(module, MEAN, STD, input_size=(3, 8, 8), num_classes=10, name="careless")
    before = {key: value.clone() for key, value in module.state_dict().items()}
    list(build(of_task={"teachers": [view]}).generate())
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_images_are_normalised_once():
    """The teacher sees (x - mean) / std of what the bank stores, not of something normalised already."""
    view = teacher_view()
    for batch in build(of_task={"teachers": [view]}).generate():
        x = batch.images.double() / 255
        x = (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
        with torch.no_grad():
            logits = view.module(x.float())
        torch.testing.assert_close(batch.logits, logits, rtol=1e-3, atol=1e-3)


def test_logits_belong_to_the_stored_bytes_not_to_the_floats_before():
    """Rounding to bytes moves logits by more than fp16 does; the stored ones must be of the bytes."""
    method = build(of_task={"images": 60})
    seen: list[torch.Tensor] = []
    honest = method.generator.forward
    method.generator.forward = lambda z: (seen.append(honest(z)), seen[-1])[1]
    batch = method._collect(60)
    with torch.no_grad():
        of_bytes, of_floats = method.teacher(to_uint8(seen[-1])), method.teacher(seen[-1])
    assert torch.equal(batch.images, to_uint8(seen[-1]))
    assert float((of_floats - of_bytes).abs().max()) > 1e-3
    torch.testing.assert_close(batch.logits, of_bytes, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inplace", [False, True])
def test_in_place_activations_do_not_spoil_the_bn_gradient(inplace):
    """The gradient of the BN term against plain autograd through the same statistics."""
    view = teacher_view(copy.deepcopy(teacher_view().module).double())
    view.module.relu.inplace = inplace
    view._scale, view._shift = view._scale.double(), view._shift.double()
    x = torch.rand(6, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with view.bn_statistics() as statistics:
        ours = x.clone().requires_grad_(True)
        view(ours)
        loss = statistics.loss()
    loss.backward()
    net, plain = view.module, x.clone().requires_grad_(True)
    first = net.conv1(view.normalize(plain))
    second = net.conv2(torch.relu(net.bn1(first)))
    naive = sum(
        (v.mean((0, 2, 3)) - bn.running_mean).norm() + (v.var((0, 2, 3), unbiased=False) - bn.running_var).norm()
        for v, bn in ((first, net.bn1), (second, net.bn2))
    )
    naive.backward()
    torch.testing.assert_close(loss, naive)
    torch.testing.assert_close(ours.grad, plain.grad)


def test_a_failed_step_leaves_no_hook_on_the_teacher(monkeypatch):
    view = teacher_view()
    method = build(act=0.1, of_task={"teachers": [view]})

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle of the forward")

    handle = view.module.linear.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        method.generator_step()
    handle.remove()
    for module in view.module.modules():
        assert "forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks


# ---- the adversary and the student -----------------------------------------------------------------------------


def test_the_adversary_reaches_the_generator_but_not_the_student():
    """Its gradient flows through the student to the images, while no student weight gathers one."""
    method = build(adv=1.0, bn=0.0, oh=0.0, lambda_ent=0.0)
    method.set_modes(generating=True)
    before = {k: v.clone() for k, v in method.generator.state_dict().items()}
    # Student and teacher must agree somewhere for the masked KL to be more than zero: let one copy the other.
    method.student_view.module = copy.deepcopy(method.teacher.module).requires_grad_(False)
    with torch.no_grad():
        method.student_view.module.linear.weight.mul_(0.5)
    terms = method.generator_step()
    assert float(terms["adversarial"].detach()) < 0
    assert any(not torch.equal(before[k], v) for k, v in method.generator.state_dict().items() if "num_b" not in k)
    assert all(p.grad is None for p in method.student_view.module.parameters())


def test_the_student_is_in_eval_mode_for_the_adversary_and_in_train_mode_for_its_own_step():
    method = build(adv=1.0)
    modes: list[bool] = []
    honest = method.student_view.module.forward
    method.student_view.module.forward = lambda x: (modes.append(method.student_view.module.training), honest(x))[1]
    method.cycle()
    assert modes == [False, True, True]


def test_gradients_of_one_kind_of_step_do_not_pile_up_for_the_other():
    """Two student steps with a generator step between equal the same two with it left out."""
    first, second = build(adv=1.0), build(adv=1.0)
    for method in (first, second):
        method.set_modes(generating=False)
        method.student_step()
    frozen = {k: v.clone() for k, v in first.generator.state_dict().items()}
    state = first.noise.get_state()
    first.set_modes(generating=True)
    first.generator_step()
    first.generator.load_state_dict(frozen)
    first.noise.set_state(state)
    for method in (first, second):
        method.set_modes(generating=False)
        method.student_step()
    left, right = first.student_view.module.state_dict(), second.student_view.module.state_dict()
    assert all(torch.equal(left[k], right[k]) for k in left)


# ---- numbers ---------------------------------------------------------------------------------------------------


def test_entropy_of_a_class_that_never_occurs_has_a_finite_gradient():
    """Its probability is exactly 0 in float32: 0 log 0 is 0, and so is the gradient through a vanished softmax."""
    logits = torch.tensor([[500.0, 500.0, -500.0]], requires_grad=True)
    entropy = class_entropy(logits)
    entropy.backward()
    assert float(entropy.detach()) == pytest.approx(math.log(2)) and torch.isfinite(logits.grad).all()


def test_to_uint8_rounds_and_clamps():
    x = torch.tensor([-0.3, 0.0, 0.4 / 255, 0.6 / 255, 127.5 / 255, 254.4 / 255, 1.0, 1.7])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 128, 254, 255, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(every.float() / 255), every)


@pytest.mark.parametrize(
    ("given", "result"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_losses_are_summed_in_full_precision(given, result):
    assert widened(torch.ones(2, dtype=given)).dtype == result


def test_bf16_runs_on_the_cpu_and_stores_finite_columns():
    from synthkit.config.schema import RuntimeConfig
    from synthkit.runtime import Runtime

    low = Runtime.create(RuntimeConfig(device="cpu", precision="bf16"))
    try:
        batches = list(build(adv=1.0, act=0.1, of_task={"runtime": low}).generate())
    finally:
        runtime()  # the tests after this one want float32 again
    assert batches[0].logits.dtype == batches[0].difficulty.dtype == torch.float32
    assert all(torch.isfinite(b.logits).all() and torch.isfinite(b.difficulty).all() for b in batches)


@pytest.mark.filterwarnings("ignore:overflow")
def test_logits_beyond_half_precision_are_an_error_not_an_infinity(tmp_path):
    """The bank stores fp16: 65504 is the largest."""
    card = save_teacher(tmp_path / "teacher")
    from synthkit.models.build import load_model
    from synthkit.models.weights import save_weights

    loaded = load_model(str(card))
    last = [m for m in loaded.module.modules() if isinstance(m, nn.Linear)][-1]
    last.weight.data.mul_(1e5)
    loaded.card.sha256 = save_weights(loaded.module, card.with_name("teacher.safetensors"))
    loaded.card.save(card)
    with pytest.raises(NonFiniteError, match="logits"):
        engine.synthesize(run_config(card, tmp_path / "bank"))


# ---- small and odd runs ----------------------------------------------------------------------------------------


def run_config(teacher: Path, out: Path, **changes: Any) -> Any:
    options = {**SMALL, "student": "lenet5_half", "snapshots": 2}
    options |= {k.removeprefix("method_"): changes.pop(k) for k in list(changes) if k.startswith("method_")}
    values = {"teacher": str(teacher), "method": {"name": "cudfkd", **options}, "images": 20, "out": str(out)}
    return parse_config("synthesize", {**values, "runtime": {"device": "cpu"}, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"images": 1},
        {"images": 20, "images_per_shard": 500},
        {"images": 3, "images_per_shard": 1, "method_snapshots": 8},
        {"images": 500},
        {"method_kd_steps": 100},
        {"method_kd_steps": 3, "method_g_steps": 2},
        {"method_epochs": 1, "method_ep_steps": 1},
        {"method_store_from": 0.0},
        {"method_store_from": 0.95},
        {"method_snapshots": 0},
        {"method_loss": "kl", "method_adv_type": "js", "method_adv": 1.0, "method_act": 0.1},
        {"method_granularity": "batch", "curriculum": "easy2hard-hard"},
    ],
)
def test_odd_runs_end_well(changes, tmp_path):
    card = save_teacher(tmp_path / "teacher")
    asked = changes.get("images", 20)
    bank = engine.synthesize(run_config(card, tmp_path / "bank", **changes))
    assert len(bank) == asked and bank.complete and bank.verify(deep=True).ok
    if changes.get("method_snapshots") != 0:
        assert bank.generators()


def test_a_batch_of_one_is_possible_or_refused_clearly(tmp_path):
    card = save_teacher(tmp_path / "teacher")
    try:
        bank = engine.synthesize(run_config(card, tmp_path / "bank", method_batch_size=1))
    except SynthkitError as error:
        assert "batch_size" in str(error)
    else:
        assert len(bank) == 20


def test_two_classes(tmp_path):
    card = save_teacher(tmp_path / "teacher", classes=2)
    bank = engine.synthesize(run_config(card, tmp_path / "bank"))
    assert set(np.unique(bank.column("labels"))) <= {0, 1} and bank.column("logits").shape == (20, 2)


def test_difficulty_is_the_loss_of_the_student_of_that_moment():
    method = build(of_task={"images": 30})
    for batch in method.generate():
        method.student_view.module.eval()
        with torch.no_grad():
            student = method.student_view(batch.images)
        expected = (student - batch.logits).abs().mean(1)
        method.student_view.module.train()
        torch.testing.assert_close(batch.difficulty, expected, rtol=1e-4, atol=1e-5)


def test_a_student_that_needs_more_than_it_gets_is_refused_before_any_work(tmp_path):
    """resnet18_tiny is made for 64 pixels; whatever the table says, nothing may be written when it cannot be built."""
    card = save_teacher(tmp_path / "teacher")
    out = tmp_path / "bank"
    with pytest.raises(SynthkitError):
        engine.synthesize(run_config(card, out, method_student="convnet_d6"))
    assert not out.exists()


def test_tiny_net_is_the_net_of_the_golden_cases():
    """The contract's teacher keeps the order of layers that the stored cases were written for."""
    names = [name for name, _ in TinyNet().named_children()]
    assert names == ["conv1", "bn1", "conv2", "bn2", "relu", "linear"]
