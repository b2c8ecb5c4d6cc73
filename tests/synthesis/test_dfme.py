"""What DFME promises: no gradient from the teacher, every query counted, the estimate, the answers."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from workshop import save_teacher

from synthesis.test_contract_dfme import ENGINE, SMALL
from synthesis.tiny import MEAN, STD, TinyNet, task, teacher_view
from synthkit.config.parse import parse_config
from synthkit.errors import ConfigError
from synthkit.models.view import TeacherView
from synthkit.synthesis import engine
from synthkit.synthesis.curriculum import Curriculum
from synthkit.synthesis.generator import dfme
from synthkit.synthesis.generator.dfme import (
    DFME,
    BlackBox,
    DFMEConfig,
    answered,
    full_precision,
    zeroth_order_gradient,
)


def build(*, of_task: dict[str, Any] | None = None, **settings: Any) -> DFME:
    arguments = {"curriculum": Curriculum.named("none"), **(of_task or {})}
    return DFME(DFMEConfig(**{**SMALL, **settings}), task(**arguments))


class NoGradient(TinyNet):
    """A teacher that refuses to be differentiated, and counts what it is shown."""

    seen = 0

    def forward(self, x):
        assert not torch.is_grad_enabled() and not x.requires_grad, "a black box has no gradient"
        self.seen += len(x)
        return super().forward(x)


def strict_view() -> TeacherView:
    module = NoGradient()
    module.load_state_dict(teacher_view().module.state_dict())
    return TeacherView(module, MEAN, STD, input_size=(3, 8, 8), num_classes=10, name="strict")


# ---- the black box ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "g_steps"), [(1, 1), (3, 2)])
def test_no_gradient_and_every_image_is_counted(monkeypatch, m, g_steps):
    view, records, lines = strict_view(), [], []
    method = build(m=m, g_steps=g_steps, of_task={"teachers": [view], "log": records.append})
    monkeypatch.setattr(method.task.runtime, "say", lines.append)
    batches = list(method.generate())
    c = method.config
    steps = c.epochs * c.ep_steps
    learning = c.batch_size * (steps // c.kd_steps * g_steps * (m + 1) + steps)
    stored = sum(len(batch.images) for batch in batches)
    assert method.teacher.queries == learning + stored == view.module.seen
    counts = [record["queries"] for record in records]
    assert "adv_weight" not in records[0]
    assert counts == sorted(counts) and counts[0] >= learning / c.epochs
    assert batches[-1].meta["queries"] == learning + stored
    assert lines == [f"dfme sent {learning + stored} images to the teacher"]


def test_its_requirements_say_so():
    assert DFME.requires.grad is False


def test_the_black_box_hides_features_and_statistics():
    box = BlackBox(teacher_view())
    assert not box.has_batchnorm and not hasattr(box, "features") and not hasattr(box, "bn_statistics")
    x = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    assert not box(x).requires_grad and box.queries == 5


def test_the_time_estimate_is_not_in_the_count():
    method = build()
    method.estimate()
    assert method.teacher.queries == 0


def test_a_resumed_run_goes_on_counting():
    method = build()
    for batch in method.generate():
        state, asked = method.state_dict(), batch.meta["queries"]
        break
    again = build()
    again.load_state_dict(state)
    assert again.teacher.queries == asked > 0


def test_the_bank_records_the_queries(tmp_path, capsys):
    save_teacher(tmp_path / "teacher")
    values = {
        "teacher": str(tmp_path / "teacher" / "card.yaml"),
        "method": {"name": "dfme", **ENGINE},
        "images": 20,
        "images_per_shard": 10,
        "out": str(tmp_path / "bank"),
        "runtime": {"device": "cpu", "threads": torch.get_num_threads()},
    }
    bank = engine.synthesize(parse_config("synthesize", values))
    expected = 12 * (8 * 2 + 16) + 20
    assert f"dfme sent {expected} images to the teacher" in capsys.readouterr().err
    metrics = [json.loads(line) for line in (bank.path / "metrics.jsonl").read_text().splitlines()]
    assert 0 < metrics[0]["queries"] < metrics[-1]["queries"] <= expected
    sidecars = [json.loads(path.read_text()) for path in sorted(bank.path.glob("shards/*.json"))]
    assert len(sidecars) == 2 and sidecars[-1]["meta"]["queries"] == expected


# ---- the estimate ----------------------------------------------------------------------------------------------


def test_estimate_approaches_the_gradient():
    """For many directions the mean of u u^T is I / d: the estimate tends to the gradient of the summed objective."""
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 12, 4, generator=draw, dtype=torch.float64)
    x = torch.randn(2, 3, 2, 2, generator=draw, dtype=torch.float64)
    victim, clone = lambda p: (p.flatten(1) @ a).sin(), lambda p: (p.flatten(1) @ b).sin()
    directions = torch.randn(2, 3000, 3, 2, 2, generator=draw, dtype=torch.float64)
    gradient, value = zeroth_order_gradient(victim, clone, x, directions, epsilon=1e-5, classes=4, squash="none")
    points = x.clone().requires_grad_(True)
    objective = -(victim(points) - clone(points)).abs().mean(1)
    objective.sum().backward()
    torch.testing.assert_close(value, objective.detach().mean())
    torch.testing.assert_close(gradient * 2 * 4, points.grad, rtol=0.0, atol=0.15)


def test_l1_is_divided_by_batch_and_classes_and_kl_is_not():
    x = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = torch.randn(4, 1, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    victim, clone = lambda p: p.flatten(1)[:, :5], lambda p: 0.5 * p.flatten(1)[:, 5:10]
    for loss, changes in (("l1", True), ("kl", False)):
        options: dict[str, Any] = {"epsilon": 1e-4, "loss": loss}
        five, ten = (zeroth_order_gradient(victim, clone, x, u, classes=k, **options)[0] for k in (5, 10))
        torch.testing.assert_close(five, 2 * ten if changes else ten)


@pytest.mark.parametrize("squash", ["tanh", "none"])
def test_tanh_is_in_the_generators_objective_alone(monkeypatch, squash):
    method, view = build(squash=squash), teacher_view()
    shown: list[torch.Tensor] = []
    made: list[torch.Tensor] = []
    monkeypatch.setattr(method, "teacher", Recorder(method.teacher, shown))
    handle = method.generator.register_forward_hook(lambda _module, _args, images: made.append(images.detach()))
    method.set_modes(generating=True)
    method.generator_step()
    method.set_modes(generating=False)
    method.student_step()
    handle.remove()
    expected = view.normalize(made[0])
    expected = expected.tanh() if squash == "tanh" else expected
    torch.testing.assert_close(view.normalize(shown[0]), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(shown[-1], made[1]), "the student's images are as they are, normalised once by the view"


class Recorder:
    def __init__(self, box: BlackBox, images: list[torch.Tensor]):
        self.box, self.images = box, images

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.images.append(images)
        return self.box(images)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.box, name)


def test_the_estimate_is_made_in_full_precision():
    """On a GPU the runtime allows TF32, whose ten bits would round the small steps away."""
    switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [switch.allow_tf32 for switch in switches]
    try:
        for value in (True, False):
            for switch in switches:
                switch.allow_tf32 = value
            with full_precision():
                assert not any(switch.allow_tf32 for switch in switches)
            assert [switch.allow_tf32 for switch in switches] == [value, value]
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def test_the_generators_objective_is_evaluated_in_it(monkeypatch):
    method, inside = build(), []
    monkeypatch.setattr(dfme, "full_precision", lambda: inside.append(True) or nullcontext())
    method.set_modes(generating=True)
    method.generator_step()
    assert inside == [True]


def test_the_generator_moves_towards_disagreement():
    """A frozen student: steps on the estimate alone raise the disagreement of the two networks."""
    method = build(lr_g=0.01, m=4, batch_size=32, loss="l1", squash="none")
    method.set_modes(generating=True)
    values = [float(method.generator_step()["disagreement"]) for _ in range(25)]
    assert sum(values[-5:]) < sum(values[:5])


# ---- the answers -----------------------------------------------------------------------------------------------


def test_recovered_logits_are_the_logits_less_their_mean():
    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(answered(logits, "l1", "recovered"), logits - logits.mean(1, keepdim=True))
    assert answered(logits, "l1", "raw") is logits and answered(logits, "kl", "recovered") is logits


@pytest.mark.parametrize("logits", ["recovered", "raw"])
def test_the_student_learns_from_the_answers(logits):
    method = build(loss="l1", logits=logits)
    s, t = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(0)) + 3
    expected = t if logits == "raw" else t - t.mean(1, keepdim=True)
    torch.testing.assert_close(method.kd_per_sample(s, t), (s - expected).abs().mean(1))


@pytest.mark.parametrize(
    ("settings", "what"), [({"m": 0}, "m must be at least 1"), ({"epsilon": 0.0}, "epsilon must be positive")]
)
def test_settings_out_of_range(settings, what):
    with pytest.raises(ConfigError, match=what):
        DFMEConfig(**settings)
