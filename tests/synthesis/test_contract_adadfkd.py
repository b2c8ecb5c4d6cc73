"""AdaDFKD under the contract of all synthesis methods, and its queue, window and difficulty."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contract import SynthesizerContract

from synthesis.tiny import task
from synthkit.errors import ConfigError
from synthkit.synthesis.curriculum import Curriculum
from synthkit.synthesis.generator.adadfkd import AdaDFKD, AdaDFKDConfig, infonce_per_sample, windowed_infonce

SMALL = {
    "epochs": 4, "ep_steps": 4, "kd_steps": 2, "batch_size": 16, "nz": 8, "width": 4, "depth": 1, "lr_g": 0.02,
    "negatives": 40, "length": 0.8,
}  # fmt: skip
WIDE = "convnet_d1_w8_bn"  # features of another width than the teacher's 8


class TestAdaDFKD(SynthesizerContract):
    name = "adadfkd"
    options = {**SMALL, "student": WIDE}
    engine_options = {**SMALL, "student": "lenet5_half", "snapshots": 2}
    inner = {"student_step": (7, 5, 2), "generator_step": (2, 4, 2)}
    falling = ("g_loss", "g_nce", "kd")
    longer = {"epochs": 6, "ep_steps": 20, "batch_size": 32, "lr": 0.05}


def build(curriculum: str = "easy2hard", **settings) -> AdaDFKD:
    config = AdaDFKDConfig(**{**SMALL, "student": WIDE, **settings})
    return AdaDFKD(config, task(curriculum=Curriculum.named(curriculum)))


def images(n: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


# ---- the window ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("curriculum", "slides"), [("easy2hard", True), ("ramp-only", True), ("none", False)])
def test_the_window_slides_with_the_ramp(curriculum, slides):
    method = build(curriculum, epochs=20, begin=0.25, end=0.75, length=0.8)
    found = [method.hard_factor(epoch) for epoch in (0, 5, 10, 15, 19)]
    assert found == pytest.approx([0, 0, 0.1, 0.2, 0.2] if slides else [0] * 5)


def test_window_against_a_loop_by_hand():
    draw = torch.Generator().manual_seed(1)
    q, k, queue = (torch.randn(n, 5, generator=draw, dtype=torch.float64) for n in (3, 3, 10))
    queue = F.normalize(queue, dim=1)
    total = 0.0
    for i in range(3):
        query = q[i] / q[i].norm()
        positive = float(query @ (k[i] / k[i].norm())) / 0.1
        products = sorted(float(query @ n) for n in queue)[3:9]
        parts = torch.tensor([positive, *(p / 0.1 for p in products)], dtype=torch.float64).exp()
        total -= float((parts[0] / parts.sum()).log()) / 3
    assert float(windowed_infonce(q, k, queue, 0.3, 0.6, 0.1)) == pytest.approx(total)


def test_harder_windows_cost_more():
    draw = torch.Generator().manual_seed(2)
    q, queue = torch.randn(8, 5, generator=draw), F.normalize(torch.randn(50, 5, generator=draw), dim=1)
    found = [float(windowed_infonce(q, q, queue, h, 0.5, 0.2)) for h in (0.0, 0.25, 0.5)]
    assert found == sorted(found) and found[0] < found[-1]


# ---- the queue -------------------------------------------------------------------------------------------------


def test_the_queue_is_a_ring_of_student_features():
    method = build(negatives=24)
    start = method.queue.clone()
    torch.testing.assert_close(start.norm(dim=1), torch.ones(24))
    method.set_modes(generating=True)
    keys = []
    for seed in range(2):  # 32 keys into 24 places
        with torch.no_grad():
            keys.append(F.normalize(method._key(method.student_view.features(images(seed=seed))[1]), dim=1))
        method.generator_terms(images(seed=seed).requires_grad_(True))
        if seed == 0:
            torch.testing.assert_close(method.queue[:16], keys[0])
            torch.testing.assert_close(method.queue[16:], start[16:])
    torch.testing.assert_close(method.queue[16:], keys[1][:8])
    torch.testing.assert_close(method.queue[:8], keys[1][8:])
    assert method.place == 8


def test_a_batch_larger_than_the_queue_leaves_its_last_keys():
    method = build(negatives=10)
    method._remember(torch.eye(16, 8))
    torch.testing.assert_close(method.queue, torch.eye(16, 8)[6:])


def test_the_projection_is_one_and_comes_from_the_seed():
    """The released code draws another Linear in every iteration: two calls on the same features would differ."""
    method, same = build(), build()
    assert method.projection is not None and same.projection is not None
    assert torch.equal(method.projection, same.projection)
    feature = torch.randn(4, method.projection.shape[0], generator=torch.Generator().manual_seed(0))
    before = method._key(feature)
    list(method.generate())
    assert torch.equal(method._key(feature), before)
    assert build(student="resnet8").projection is not None
    assert build(student="convnet_d3_w8_bn", negatives=5).projection is None, "equal widths need none"


def test_the_term_reaches_the_images_but_no_gradient_passes_through_the_student():
    method = build(adv=0.0)
    method.set_modes(generating=True)
    x = images().requires_grad_(True)
    loss = method.generator_terms(x)["nce"]
    assert (torch.autograd.grad(loss, x)[0] != 0).any()
    assert all(p.grad is None for p in method.student_view.module.parameters())


def test_without_its_terms_it_is_cudfkd():
    method = build(nce=0.0, s_nce=0.0)
    method.set_modes(generating=True)
    assert sorted(method.generator_terms(images().requires_grad_(True))) == ["adversarial", "bn", "entropy", "one_hot"]


# ---- the student -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["sample", "batch"])
def test_student_loss_weighs_kd_and_infonce_together(granularity):
    method = build(granularity=granularity, s_nce=0.5, lambda_0=1.5)
    x = images()
    method.student_view.module.eval()
    found = method.distil(x)
    teacher, query = method.teacher.features(x)
    student, key = method.student_view.features(x)
    losses = method.kd_per_sample(student, teacher) + 0.5 * infonce_per_sample(query, method._key(key), 0.07)
    if granularity == "batch":
        losses = losses.mean()
    weights = (1 + 2.718281828**-1.5) / (1 + (losses.detach() - 1.5).exp())
    torch.testing.assert_close(found.loss, (weights * losses).mean())


def test_the_student_term_falls_towards_the_teachers_features():
    draw = torch.Generator().manual_seed(0)
    t, other = torch.randn(2, 6, 8, generator=draw)
    found = [float(infonce_per_sample(t, t + share * (other - t), 0.07).mean()) for share in (1.0, 0.5, 0.0)]
    assert found == sorted(found, reverse=True) and found[-1] < 0.1


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"length": 0.0}, "length"),
        ({"length": 0.1, "negatives": 5}, "one negative"),
        ({"tau": 0.0}, "tau must be positive"),
        ({"nce": -0.1}, "nce must not be negative"),
        ({"negatives": 0}, "negatives must be at least 1"),
    ],
)
def test_settings_out_of_range(settings, what):
    with pytest.raises(ConfigError, match=what):
        AdaDFKDConfig(**settings)
