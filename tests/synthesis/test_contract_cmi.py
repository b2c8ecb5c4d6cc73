"""CMI: the inherited contract, its views, its features and its bank."""

from __future__ import annotations

import pytest
import torch
from contract import SynthesizerContract

from synthesis.tiny import task, teacher_view
from synthkit.errors import ConfigError, RequirementError
from synthkit.models.build import build_model
from synthkit.models.view import TeacherView
from synthkit.synthesis.base import flatten_state
from synthkit.synthesis.curriculum import Curriculum
from synthkit.synthesis.generator.cmi import CMI, CMIConfig, contrast_head, contrastive_loss
from synthkit.synthesis.generator.features import FeatureBank, instance_means, tap_layers
from synthkit.synthesis.generator.inverting import Best

SMALL = {
    "epochs": 4,
    "ep_steps": 4,
    "batch_size": 16,
    "synthesis_batch": 8,
    "g_steps": 3,
    "nz": 8,
    "width": 4,
    "lr_g": 0.02,
    "head_dim": 6,
    "bank_size": 20,  # the third call wraps around
    "negatives": 9,
}


class TestCMI(SynthesizerContract):
    name = "cmi"
    options = {**SMALL, "student": "convnet_d1_w8_bn"}
    engine_options = {**SMALL, "student": "lenet5_half", "epochs": 2, "batch_size": 8}
    inner = {"synthesise": (3, 2), "learn": (5,)}
    arrivals = (3, 2)
    falling = ("kd",)  # every call starts anew, so its own loss need not fall from call to call
    longer = {"epochs": 3, "ep_steps": 10, "lr": 0.05}


def method(**options) -> CMI:
    of_task = {k: options.pop(k) for k in ("teachers", "images", "curriculum", "seed") if k in options}
    return CMI(CMIConfig(**{**SMALL, "student": "convnet_d1_w8_bn", **options}), task(**of_task))


def lenet(name: str) -> TeacherView:
    module = build_model(name, num_classes=10, in_channels=1, image_size=32)
    return TeacherView(module, [0.1], [0.3], input_size=(1, 32, 32), num_classes=10, name=name)


def test_loss_of_a_call_falls():
    """Within one call, on the first and the last quarter of its iterations."""
    found = method(g_steps=40, lr_g=5e-3)
    losses: list[torch.Tensor] = []
    found.note_generator = lambda terms, loss: losses.append(loss.detach())
    found.synthesise(0)
    assert torch.stack(losses[-10:]).mean() < torch.stack(losses[:10]).mean()


def test_best_keeps_copies():
    """What came with the lowest loss, however the tensor is written on later."""
    best, image = Best(), torch.zeros(2, 3)
    for loss in (3.0, 1.0, 2.0):
        image.fill_(loss)
        best.offer(torch.tensor(loss), image, image[0])
    image.fill_(9.0)
    assert [t.unique().tolist() for t in best.kept] == [[1.0], [1.0]] and float(best.loss) == 1.0


def test_labels_are_the_sorted_targets():
    """Not what the teacher thinks of the images."""
    batches = [batch for batch in method(images=16).generate() if batch is not None]
    labels = torch.cat([batch.labels for batch in batches])
    assert torch.equal(labels[:8], labels[:8].sort().values) and torch.equal(labels[8:], labels[8:].sort().values)
    assert (labels != torch.cat([batch.logits for batch in batches]).argmax(1)).any()


def test_every_call_starts_from_nothing():
    """Call 1 alone gives the images that it gives after call 0, where nothing links them (no contrast, no student)."""
    after = method(cr=0.0)
    after.synthesise(0)
    torch.testing.assert_close(after.synthesise(1)[0], method(cr=0.0).synthesise(1)[0], rtol=0, atol=0)
    linked = method()
    linked.synthesise(0)
    assert not torch.equal(linked.synthesise(1)[0], method().synthesise(1)[0])


def test_views():
    """The global view is a shift (zero filled) and a flip, the local one a part that is enlarged; gradient flows."""
    found = method()
    images = torch.rand(64, 3, 8, 8).requires_grad_()
    draw = found.views(0)
    whole, part = draw(images)
    assert whole.shape == part.shape == images.shape
    black = (whole == 0).all(1).flatten(1).any(1)
    assert black.any() and not black.all(), "some images are shifted, the others stay"
    assert (part.detach() > 0).all(), "a resized part shows no border"
    (gradient,) = torch.autograd.grad(whole.sum() + part.sum(), images)
    assert torch.isfinite(gradient).all() and (gradient > 0).any()
    again, _ = draw(images)
    assert not torch.equal(again, whole), "every iteration has views of its own"
    assert torch.equal(found.views(0)(images)[0], whole), "a pure function of the call"


def test_adversary_is_there_and_acts():
    """Negative where student and teacher decide alike, and with a gradient; without weight there is no term at all."""
    found = method(adv=0.5)
    student = teacher_view().module
    student.linear.weight.data *= 0.5  # decides alike, less sure
    found.student_view.module = student.eval()
    views = torch.rand(16, 3, 8, 8).requires_grad_()
    terms, features = found.terms(views, views, torch.zeros(16, dtype=torch.int64), 0.5)
    assert set(terms) == {"one_hot", "bn", "adversarial"} and features is not None
    assert float(terms["adversarial"].detach()) < 0
    (gradient,) = torch.autograd.grad(terms["adversarial"], views)
    assert gradient.abs().sum() > 0
    off, none = method(cr=0.0).terms(views, views, torch.zeros(16, dtype=torch.int64), 0.0)
    assert set(off) == {"one_hot", "bn"} and none is None


def test_warm_up_has_no_adversary():
    """The published start from pre-inverted images: calls before the student's first step, without adversary."""
    found = method(warmup=0.4, images=40)
    order: list[tuple[str, float]] = []
    found.synthesise = note(found.synthesise, order, lambda: ("call", found.adversarial_weight(found.epoch)))
    found.learn = note(found.learn, order, lambda: ("step", 0.0))
    list(found.generate())
    assert [w for kind, w in order if kind == "call"] == [0, 0, 0.5, 0.5, 0.5]
    assert [kind for kind, _ in order[:4]] == ["call", "call", "call", "step"]


def note(work, order, what):
    def noting(*args):
        order.append(what())
        return work(*args)

    return noting


def test_curriculum_raises_the_adversary():
    found = method(curriculum=Curriculum.named("ramp-only"), epochs=8, adv=0.5, grad_adv=0.25)
    assert [found.adversarial_weight(e) for e in range(8)] == [0.5, 0.5, 0.5, 0.5, 0.75, 1.0, 1.25, 1.25]
    assert method(curriculum=Curriculum.named("none")).adversarial_weight(7) == 0.5


# ---- features ------------------------------------------------------------------------------------------------


def test_instance_means_are_the_inputs_of_the_layers():
    view = teacher_view()
    net, images = view.module, torch.rand(5, 3, 8, 8)
    with instance_means(tap_layers(view, "bn")) as means:
        view(images)
        found = means()
    first = net.conv1(view.normalize(images))
    second = net.conv2(net.relu(net.bn1(first)))
    torch.testing.assert_close(found, torch.cat([first.mean((2, 3)), second.mean((2, 3))], 1))
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_taps_of_stages_and_of_plain_networks():
    net = build_model("resnet20", num_classes=10, in_channels=3, image_size=32)
    view = TeacherView(net, [0.5] * 3, [0.2] * 3, input_size=(3, 32, 32), num_classes=10)
    with torch.no_grad(), instance_means(tap_layers(view, "stages")) as means:
        view(torch.rand(2, 3, 32, 32))
        assert means().shape == (2, 16 + 16 + 32)  # inputs of layer1, layer2, layer3
    plain = lenet("lenet5")
    with torch.no_grad(), instance_means(tap_layers(plain, "bn")) as means:
        plain(torch.rand(2, 1, 32, 32))
        assert means().shape == (2, 6 + 16 + 120 + 84)  # all layers but the first
    with pytest.raises(RequirementError, match="taps bn"):
        tap_layers(plain, "stages")


def test_a_teacher_without_batchnorm():
    warnings: list[str] = []
    config = CMIConfig(**{**SMALL, "student": "lenet5_half", "epochs": 1})
    found = CMI(config, task(teachers=[lenet("lenet5")], images=16, warn=warnings.append))
    batches = [batch for batch in found.generate() if batch is not None]
    assert sum(len(b.images) for b in batches) == 16
    assert any("BN-statistics term is off" in text for text in warnings)


# ---- the feature bank ----------------------------------------------------------------------------------------


def test_bank_keeps_the_newest_rows():
    bank = FeatureBank(5, 2)
    rows = torch.arange(16.0).view(8, 2)
    bank.add(rows[:3])
    assert bank.filled == 3 and torch.equal(bank.draw(9, rng()).sort(0).values, rows[:3])
    bank.add(rows[3:6])
    bank.add(rows[6:])
    assert bank.filled == 5 and torch.equal(bank.draw(9, rng()).sort(0).values, rows[3:])
    drawn = bank.draw(3, rng())
    assert len(torch.unique(drawn, dim=0)) == 3


def test_a_full_bank_offers_its_rows():
    """The released bank offers none when it is exactly full: the mean over no earlier image, hence the loss, is NaN."""
    bank = FeatureBank(4, 6)
    bank.add(torch.randn(4, 6, generator=rng()))
    assert len(bank.draw(4096, rng())) == 4
    head, features = contrast_head(3, 2), torch.randn(2, 2, 3, generator=rng())
    ours = contrastive_loss(head, *features, bank.draw(4096, rng()), 0.1)
    none = contrastive_loss(head, *features, bank.rows[:0], 0.1)
    assert torch.isfinite(ours) and torch.isfinite(none)
    assert torch.isnan(none + torch.zeros(0).mean()), "released: the empty part is averaged all the same"


def test_the_state_holds_filled_rows_only():
    found = method(bank_size=40_960)
    found.synthesise(0)
    tensors, _ = flatten_state(found.extra_state()["bank"])
    assert tensors["rows"].shape == (8, 24)


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"bank_size": 7, "synthesis_batch": 8}, "bank_size must hold"),
        ({"cr_T": 0.0}, "cr_T must be positive"),
        ({"negatives": 0}, "negatives must be at least 1"),
        ({"cr": -1.0}, "cr must not be negative"),
    ],
)
def test_settings_out_of_range(settings, what):
    with pytest.raises(ConfigError, match=what):
        CMIConfig(**settings)
