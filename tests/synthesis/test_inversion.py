"""The inversion loop: views, starts, committees, weights, plans; what the golden trajectories do not show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from synthesis.test_contract_random_real import real_data
from synthesis.tiny import task, teacher_view
from synthkit.config.schema import RuntimeConfig
from synthkit.errors import ConfigError, DataError, NonFiniteError, RequirementError
from synthkit.models.view import TeacherView
from synthkit.runtime import Runtime
from synthkit.synthesis.base import makes_of, requirements
from synthkit.synthesis.curriculum import Curriculum
from synthkit.synthesis.inversion.deepinversion import DeepInversion, DeepInversionConfig
from synthkit.synthesis.inversion.job import Job, even_parts
from synthkit.synthesis.inversion.loop import bn_penalty
from synthkit.synthesis.inversion.views import Views, crop_boxes, draw_views


def method(settings: dict | None = None, **of_task) -> DeepInversion:
    config = DeepInversionConfig(**{"iterations": 3, "batch_size": 8, "bn": 1.0, **(settings or {})})
    return DeepInversion(config, task(**{"images": 16, **of_task}))


def job(found: DeepInversion, count: int = 8) -> Job:
    labels = found.inverter.labels(0, count)
    return Job(found.inverter, 0, labels, found.inverter.start(0, labels))


def close(a, b, tolerance: float = 1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- views -----------------------------------------------------------------------------------------------------------

PIXELS = torch.randn(6, 3, 12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
BOXES = np.array([[0, 0, 12, 10], [2, 1, 7, 6], [5, 3, 4, 7], [11, 0, 1, 10], [0, 9, 12, 1], [3, 2, 8, 8]])
ROLLS = np.array([[0, 0], [1, -2], [-3, 0], [0, 4], [2, 2], [-1, -1]])
FLIPS = np.array([False, True, False, True, True, False])


def one_by_one(image: torch.Tensor, box, roll, flip) -> torch.Tensor:
    """Crop, resize, roll, flip by torch's own functions."""
    top, left, height, width = map(int, box)
    view = F.interpolate(
        image[None, :, top : top + height, left : left + width], image.shape[1:], mode="bilinear", align_corners=False
    )
    view = view.roll((int(roll[0]), int(roll[1])), (2, 3))
    return view.flip(3) if flip else view


def test_views_per_image_are_torchs_own_operations():
    expected = torch.cat([one_by_one(*parts) for parts in zip(PIXELS, BOXES, ROLLS, FLIPS, strict=True)])
    close(Views(roll=ROLLS, flip=FLIPS, box=BOXES)(PIXELS), expected, 1e-12)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_one_view_per_batch(memory):
    pixels = PIXELS.contiguous(memory_format=memory)
    for k in range(len(BOXES)):
        expected = torch.cat([one_by_one(image, BOXES[k], ROLLS[k], FLIPS[k]) for image in PIXELS])
        found = Views(roll=ROLLS[k : k + 1], flip=FLIPS[k : k + 1], box=BOXES[k : k + 1])(pixels)
        close(found, expected, 1e-12)
        assert found.is_contiguous(memory_format=memory)
    whole = Views(roll=ROLLS[1:2], flip=FLIPS[1:2])(pixels)
    same = Views(roll=np.repeat(ROLLS[1:2], 6, 0), flip=np.repeat(FLIPS[1:2], 6))(pixels)
    close(whole, same, 1e-12)


def test_views_send_the_gradient_back():
    views = Views(roll=ROLLS, flip=FLIPS, box=BOXES)
    assert torch.autograd.gradcheck(views, (PIXELS[:, :1].clone().requires_grad_(),))


def test_draws():
    drawn = draw_views(np.random.default_rng(0), 4000, (32, 32), jitter=2, flip=True, smallest=0.5)
    assert set(drawn.roll.flatten().tolist()) == {-2, -1, 0, 1, 2}
    assert 0.45 < drawn.flip.mean() < 0.55
    top, left, height, width = drawn.box.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 32).all() and (left + width <= 32).all()
    area, ratio = height * width / 1024, width / height
    assert area.min() > 0.45 and area.max() == 1 and 0.7 < ratio.min() < ratio.max() < 1.4
    assert 0.7 < np.median(area) < 0.8, "uniform between a half and the whole"
    assert (crop_boxes(np.random.default_rng(0), 50, (8, 8), 1.0)[:, 2:] >= 7).all()


def test_views_depend_on_seed_row_and_iteration_alone():
    inverter = method({"per_image": True, "flip": True, "crop": 0.2}).inverter
    one, again = (inverter.views(5, 8, 3, (8, 8)) for _ in range(2))
    assert (one.box == again.box).all() and (one.roll == again.roll).all()
    others = [inverter.views(6, 8, 3, (8, 8)), inverter.views(5, 8, 4, (8, 8))]
    assert all((one.box != other.box).any() for other in others)
    assert len(one.roll) == 8 and len(method().inverter.views(0, 8, 0, (8, 8)).roll) == 1


@pytest.mark.parametrize("curriculum", ["easy2hard", "none"])
def test_the_curriculum_is_the_crop(curriculum):
    found = method({"crop": 0.08, "iterations": 200, "per_image": True}, curriculum=Curriculum.named(curriculum))
    smallest = [found.inverter.views(0, 2000, t, (32, 32)).box[:, 2:].prod(1).min() / 1024 for t in (0, 100, 199)]
    expected = [0.95, 0.5, 0.05] if curriculum == "easy2hard" else [0.05, 0.05, 0.05]
    assert all(low <= found <= low + 0.1 for found, low in zip(smallest, expected, strict=True))


def test_the_curriculum_counts_only_with_crops():
    assert requirements(DeepInversion, DeepInversionConfig(crop=0.5)).curriculum
    assert not requirements(DeepInversion, DeepInversionConfig()).curriculum
    plain = [list(method(curriculum=Curriculum.named(name)).generate()) for name in ("easy2hard", "none")]
    assert all(torch.equal(a.images, b.images) for a, b in zip(*plain, strict=True))


# ---- rows, shards, starts --------------------------------------------------------------------------------------------


def test_every_shard_is_balanced_and_cut_evenly():
    found = method(images=60, images_per_shard=20)
    batches = list(found.generate_shard(1, 20))
    assert [len(batch.images) for batch in batches] == [6, 7, 7]
    assert torch.bincount(torch.cat([batch.labels for batch in batches])).tolist() == [2] * 10
    assert even_parts(3, 9, 256) == [(3, 9)]


def test_small_batches_are_warned_of():
    told: list[str] = []
    method({"batch_size": 20}, images=60, images_per_shard=10, warn=told.append)
    assert len(told) == 1 and "--images_per_shard" in told[0]


def test_noise_start():
    loud, quiet = (method({"noise": std}).inverter for std in (1.0, 0.25))
    labels = loud.labels(0, 400)
    pixels = loud.start(0, labels)
    assert abs(float(pixels.std()) - 1) < 0.01 and abs(float(pixels.mean())) < 0.01
    assert torch.equal(quiet.start(0, labels), 0.25 * pixels)
    assert not torch.equal(loud.start(1, labels), pixels)


def test_real_start():
    data = real_data(per_class=3)
    inverter = method({"init": "real"}, data=data).inverter
    labels = inverter.labels(0, 60)
    images = inverter.images(inverter.start(0, labels))
    known = {image.numpy().tobytes(): int(label) for image, label in zip(data.images, data.labels, strict=True)}
    assert [known[image.numpy().tobytes()] for image in images] == labels.tolist()
    assert len({image.numpy().tobytes() for image in images[:30]}) == 30, "every image once before one comes again"
    assert torch.equal(inverter.start(20, labels[20:25]), inverter.start(0, labels)[20:25])


def test_mosaic_start():
    """Class c is the flat grey c: so are all tiles of its mosaics, whatever is cropped."""
    data = real_data(per_class=2)
    data.images[:] = (data.labels * 20).to(torch.uint8)[:, None, None, None]
    inverter = method({"init": "mosaic", "mosaic": 3}, data=data).inverter
    labels = inverter.labels(0, 20)
    images = inverter.images(inverter.start(0, labels))
    assert torch.equal(images, (labels * 20).to(torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8))
    own = method({"init": "mosaic"}, data=real_data(per_class=5)).inverter
    first = own.start(0, labels)
    assert first.flatten(1).unique(dim=0).shape[0] == 20
    assert torch.equal(own.start(0, labels), first)


def test_a_real_start_says_so():
    for init in ("real", "mosaic"):
        config = DeepInversionConfig(init=init)
        assert requirements(DeepInversion, config).real_data and makes_of(DeepInversion, config).contains_real
        with pytest.raises(RequirementError, match="--data"):
            method({"init": init})
    config = DeepInversionConfig()
    assert not requirements(DeepInversion, config).real_data and not makes_of(DeepInversion, config).contains_real
    lacking = real_data(per_class=1)
    lacking.labels[lacking.labels == 3] = 4
    with pytest.raises(DataError, match="'class 3'"):
        method({"init": "real"}, data=lacking)


def test_a_coarse_stage_needs_a_network_that_takes_it():
    flat = TeacherView(
        torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Flatten(), torch.nn.Linear(192, 10)), [0.5] * 3,
        [0.5] * 3, input_size=(3, 8, 8), num_classes=10, name="flat",
    )  # fmt: skip
    with pytest.raises(RequirementError, match="4 x 4.*--method.coarse_iterations 0"):
        method({"coarse_iterations": 1}, teachers=[flat])
    assert method(teachers=[flat]).make_batch(0, 4).images.shape == (4, 3, 8, 8)


# ---- what is minimised -----------------------------------------------------------------------------------------------


def test_layer_weights():
    view = teacher_view()
    x = torch.randn(4, 3, 8, 8)
    with view.bn_statistics() as statistics:
        view.module(x)
    inputs = x, view.module.relu(view.module.bn1(view.module.conv1(x)))
    layers = [view.module.bn1, view.module.bn2]
    seen = view.module.conv1(inputs[0]), view.module.conv2(inputs[1])
    expected = torch.zeros(())
    for weight, layer, value in zip((3.0, 0.5), layers, seen, strict=True):
        mean, variance = value.mean((0, 2, 3)), value.var((0, 2, 3), correction=0)
        parts = (mean - layer.running_mean).norm() + 2 * (variance - layer.running_var).norm()
        expected = expected + weight * parts
    close(bn_penalty(statistics, torch.tensor([3.0, 0.5]), 2.0), expected)
    assert method({"bn_layers": (2.0, 5.0), "bn_first": 10.0}).inverter.bn_weights[0].tolist() == [20.0, 5.0]
    with pytest.raises(ConfigError, match="2 BatchNorm layers"):
        method({"bn_layers": (1.0,)})


def committee(**of_task) -> dict:
    return {"teachers": [teacher_view(seed=0), teacher_view(seed=1)], **of_task}


def single_terms(seed: int) -> dict[str, torch.Tensor]:
    found = method({"jitter": 0, "tv_l2": 0.0}, teachers=[teacher_view(seed=seed)])
    return job(found).step()


def test_committee_sum():
    found = method({"jitter": 0, "tv_l2": 0.0, "teacher_weights": (0.25, 2.0)}, **committee())
    terms, parts = job(found).step(), [single_terms(0), single_terms(1)]
    for name in ("ce", "bn"):
        close(terms[name], 0.25 * parts[0][name] + 2 * parts[1][name])
    batch = found.make_batch(0, 8)
    teachers = found.task.teachers
    with torch.no_grad():
        expected = (0.25 * teachers[0](batch.images) + 2 * teachers[1](batch.images)) / 2.25
    close(batch.logits, expected)
    with pytest.raises(ConfigError, match="one weight per teacher"):
        method({"teacher_weights": (1.0,)}, **committee())


def test_committee_cycle():
    found = method({"jitter": 0, "tv_l2": 0.0, "committee": "cycle"}, **committee())
    own = job(found)
    close(own.step()["ce"], single_terms(0)["ce"])
    with torch.no_grad():
        expected = F.cross_entropy(found.task.teachers[1].module(own.pixels), own.labels)
    close(own.step()["ce"], expected)


def test_a_network_with_other_constants_sees_the_same_image():
    inverter = method().inverter
    other = TeacherView(
        teacher_view(seed=5).module, [0.1, 0.2, 0.3], [0.5, 0.4, 0.3], input_size=(3, 8, 8), num_classes=10
    )
    images = torch.rand(5, 3, 8, 8)
    close(inverter.look(other, inverter.teachers[0].normalize(images)), other(images))


def test_without_batchnorm():
    bare = TeacherView(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)), [0.5] * 3, [0.5] * 3,
        input_size=(3, 8, 8), num_classes=10, name="bare",
    )  # fmt: skip
    with pytest.raises(RequirementError, match="--method.bn 0"):
        method(teachers=[bare])
    assert not requirements(DeepInversion, DeepInversionConfig(bn=0)).batchnorm
    assert len(method({"bn": 0.0}, teachers=[bare]).make_batch(0, 8).images) == 8


def test_the_batchnorm_term_brings_the_statistics_nearer():
    settings = {"iterations": 80, "batch_size": 32, "jitter": 0, "tv_l2": 0.0, "clamp": True}
    left = {}
    for bn in (0.0, 100.0):
        found = method({**settings, "bn": bn}, images=32)
        images = found.make_batch(0, 32).images
        with torch.no_grad(), found.task.teacher.bn_statistics() as statistics:
            found.task.teacher(images)
        left[bn] = float(statistics.loss())
    assert left[100.0] < 0.7 * left[0.0]


def test_clamped_pixels_are_images():
    for clamp in (True, False):
        own = job(method({"clamp": clamp, "lr": 2.0}))
        while not own.done:
            own.step()
        low, high = own.bounds
        outside = (own.pixels < low - 1e-6) | (own.pixels > high + 1e-6)
        assert bool(outside.any()) != clamp


def test_bf16():
    """Networks in bf16, statistics and losses in fp32, and the same picture within bf16's accuracy."""
    runs = {}
    for precision in ("fp32", "bf16"):
        runtime = Runtime.create(RuntimeConfig(device="cpu", precision=precision))
        own = job(method({"lr": 0.01}, runtime=runtime))
        terms = own.step()
        assert all(term.dtype == torch.float32 for term in terms.values())
        runs[precision] = terms, own.run(lambda images: 0).pixels.detach()
    Runtime.create(RuntimeConfig(device="cpu", precision="fp32"))
    for name, term in runs["fp32"][0].items():
        close(runs["bf16"][0][name], term, 0.02)
    assert (runs["bf16"][1] - runs["fp32"][1]).abs().mean() < 0.01


# ---- plans, figures, errors ------------------------------------------------------------------------------------------


def test_stages():
    found = method({"coarse_iterations": 4, "iterations": 6, "jitter": 5, "schedule": "cosine", "warmup": 2, "lr": 1.0})
    inverter = found.inverter
    assert found.work_per_image == 10
    assert [inverter.stage_of(t).pool for t in range(10)] == [2] * 4 + [1] * 6
    assert [inverter.learning_rate(t) for t in (0, 1, 2, 4, 5, 6)] == [0.5, 1.0, 1.0, 0.5, 1.0, 1.0]
    rolls = [inverter.views(0, 1, t, (8, 8)).roll for t in range(4)]
    assert max(abs(roll).max() for roll in rolls) <= 2
    with pytest.raises(ConfigError, match="divide"):
        method({"coarse_iterations": 1, "coarse": 3})


def test_verifier():
    verifier = teacher_view(seed=3)
    records: list[dict] = []
    found = method(networks={"verifier": verifier}, log=records.append)
    batch = found.make_batch(0, 8)
    with torch.no_grad():
        expected = float((verifier(batch.images).argmax(1) == batch.labels).float().mean())
    assert batch.meta["verifier_top1"] == records[-1]["verifier_top1"] == pytest.approx(expected)
    assert records[-1]["iteration"] == 3 and {"loss", "ce", "bn", "teacher_top1"} <= records[-1].keys()


def test_difficulty():
    plain = method().make_batch(0, 8)
    close(plain.difficulty, F.cross_entropy(plain.logits, plain.labels, reduction="none"))
    student = teacher_view(seed=4)
    found = method({"competitor": "S", "competition": 1.0}, networks={"competitor": student})
    batch = found.make_batch(0, 8)
    log_s, log_t = ((x / 3).log_softmax(1) for x in (student(batch.images), batch.logits))
    close(batch.difficulty, 9 * (log_t.exp() * (log_t - log_s)).sum(1).detach(), 1e-4)


def test_divergence_is_an_error():
    with pytest.raises(NonFiniteError, match="--method.lr"):
        method({"lr": 1e30}).make_batch(0, 8)
    with pytest.raises(NonFiniteError, match="--method.lr"):
        method({"lr": 1e30, "iterations": 20}, log=lambda record: None).make_batch(0, 8)


@pytest.mark.parametrize(
    "settings",
    [{"iterations": 0}, {"batch_size": 0}, {"jitter": -1}, {"lr": 0}, {"crop": 0}, {"crop": 1.5}, {"crop_milestone": 2},
     {"competition": 1.0}, {"competitor": "resnet8"}, {"competition_T": 0}, {"noise": 0}],
)  # fmt: skip
def test_wrong_settings(settings):
    with pytest.raises(ConfigError, match="method"):
        DeepInversionConfig(**settings)
