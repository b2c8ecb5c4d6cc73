"""The generator loop: order of steps, schedules, what each step may change, health, estimates."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from synthesis.tiny import MEAN, STD, TinyNet, runtime, task, teacher_view
from synthkit.errors import ConfigError, ModelError, NonFiniteError, RequirementError
from synthkit.models.view import TeacherView
from synthkit.synthesis.curriculum import Curriculum
from synthkit.synthesis.generator.cudfkd import CuDFKD, CuDFKDConfig
from synthkit.synthesis.generator.loop import STUDENTS, GeneratorConfig, GeneratorLoop

SMALL: dict[str, Any] = {
    "epochs": 4, "ep_steps": 4, "kd_steps": 2, "batch_size": 16, "nz": 8, "width": 4, "depth": 1,
    "student": "convnet_d1_w8_bn",
}  # fmt: skip


def build(*, of_task: dict[str, Any] | None = None, **settings: Any) -> CuDFKD:
    return CuDFKD(CuDFKDConfig(**{**SMALL, **settings}), task(**(of_task or {})))


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[k], right[k]) for k in left)


# ---- the order of steps ----------------------------------------------------------------------------------------


def test_order_of_steps(monkeypatch):
    """One g step then three s steps; the epoch of four cuts the second cycle short (as published)."""
    method = build(epochs=2, kd_steps=3, g_steps=1)
    order = []
    monkeypatch.setattr(method, "generator_step", lambda: order.append("g"))
    monkeypatch.setattr(method, "student_step", lambda: order.append("s"))
    monkeypatch.setattr(method, "_end_epoch", lambda epoch, lr: order.append(f"|{epoch}"))
    while method.step < method.total_steps:
        method.cycle()
    assert "".join(order) == "gsssgs|0gsssgs|1"


def test_learning_rate_is_cosine_per_epoch(monkeypatch):
    method = build(lr=0.4)
    rates = []
    honest = method.student_step
    monkeypatch.setattr(
        method, "student_step", lambda: (rates.append(method.optimizer_s.param_groups[0]["lr"]), honest())
    )
    while method.step < method.total_steps:
        method.cycle()
    expected = [0.4 * 0.5 * (1 + math.cos(math.pi * epoch / 4)) for epoch in (0, 1, 2, 3) for _ in range(4)]
    assert rates == pytest.approx(expected)


def test_a_generator_step_changes_the_generator_alone():
    method = build(adv=1.0)
    method.set_modes(generating=True)
    student, teacher = weights(method.student_view.module), weights(method.teacher.module)
    generator = weights(method.generator)
    method.generator_step()
    assert same(student, weights(method.student_view.module)) and same(teacher, weights(method.teacher.module))
    after = weights(method.generator)
    trained = [name for name, _ in method.generator.named_parameters()]
    assert all(not torch.equal(generator[k], after[k]) for k in trained)
    assert all(p.grad is None for p in method.student_view.module.parameters())


def test_a_student_step_changes_the_student_alone():
    method = build()
    method.set_modes(generating=False)
    teacher, generator = weights(method.teacher.module), weights(method.generator)
    student = weights(method.student_view.module)
    method.student_step()
    assert same(teacher, weights(method.teacher.module))
    assert same(generator, weights(method.generator)), "BN statistics of the generator moved in a student step"
    after = weights(method.student_view.module)
    assert all(not torch.equal(student[k], after[k]) for k in student)


def test_collecting_changes_nothing():
    method = build()
    method.cycle()
    before = weights(method.student_view.module), weights(method.generator)
    modes = method.student_view.module.training, method.generator.training
    noise = method.noise.get_state()
    method._collect(5)
    assert same(before[0], weights(method.student_view.module)) and same(before[1], weights(method.generator))
    assert modes == (method.student_view.module.training, method.generator.training)
    assert torch.equal(noise, method.noise.get_state())


@pytest.mark.parametrize("images", [3, 40, 400])
def test_how_many_images_are_stored_does_not_change_the_training(images):
    reference, method = build(of_task={"images": 17}), build(of_task={"images": images})
    for found in (reference, method):
        list(found.generate())
    assert same(weights(reference.student_view.module), weights(method.student_view.module))
    assert same(weights(reference.generator), weights(method.generator))


# ---- when images are stored ------------------------------------------------------------------------------------


def test_images_are_spread_evenly_over_the_rest_of_the_run():
    """From 25 % on: 16 steps, so 60 images over 12 steps, five per step; a cycle of two steps stores ten."""
    method = build(store_from=0.25, of_task={"images": 60})
    stored: dict[int, int] = {}
    for batch in method.generate():
        stored[batch.step] = stored.get(batch.step, 0) + len(batch.images)
    assert stored == {6: 10, 8: 10, 10: 10, 12: 10, 14: 10, 16: 10}


def test_due_follows_its_formula():
    method = build(store_from=0.5, of_task={"images": 100})
    due = []
    for step in (0, 4, 8, 10, 12, 16):
        method.step = step
        due.append(method._due())
    assert due == [0, 0, 0, 25, 50, 100]


# ---- construction ----------------------------------------------------------------------------------------------


def test_the_usual_student_of_a_teacher():
    teacher = TeacherView(nn.Flatten(), [0.5], [0.5], input_size=(1, 32, 32), num_classes=10)
    config = CuDFKDConfig(**{**SMALL, "student": "auto", "bn": 0.0})
    for arch, partner in (("lenet5_bn", "lenet5_half_bn"), ("lenet5_half", "lenet5_half")):
        found = CuDFKD(config, task(teachers=[teacher], extra={"teacher_arch": arch}))
        assert found.student_arch == partner


def test_the_usual_students_are_architectures():
    from synthkit.models.names import ARCHITECTURES

    assert STUDENTS.keys() <= ARCHITECTURES.keys() and set(STUDENTS.values()) <= ARCHITECTURES.keys()


def test_unknown_student_or_generator_offers_the_nearest():
    with pytest.raises(ModelError, match="resnet18"):
        build(student="resnet188")
    with pytest.raises(ModelError, match="dcgan"):
        build(generator="dcgam")


def test_a_size_that_the_generator_cannot_make():
    with pytest.raises(RequirementError, match="multiple of 2.depth = 16.*method.depth"):
        build(depth=4)
    oblong = TeacherView(TinyNet(), MEAN, STD, input_size=(3, 8, 16), num_classes=10)
    with pytest.raises(RequirementError, match="square"):
        build(of_task={"teachers": [oblong]})


def test_several_processes_are_refused():
    several = SimpleNamespace(**{**vars(runtime()), "world": 4})
    with pytest.raises(RequirementError, match="4 processes"):
        build(of_task={"runtime": several})


@pytest.mark.parametrize("generator", ["small", "large", "dafl", "dfad_a", "zskt"])
def test_other_generators(generator):
    """Those that paint in the teacher's normalised space get its mean and std; what is stored is in [0, 255]."""
    method = build(generator=generator, epochs=2)
    batches = list(method.generate())
    assert sum(len(b.images) for b in batches) == 40 and batches[0].images.dtype == torch.uint8


@pytest.mark.parametrize("generator", ["dcgan", "deep", "dfad_b"])
def test_generators_of_larger_images(generator):
    method = build(generator=generator, epochs=1, of_task={"teachers": [teacher_view(size=16)]})
    assert sum(len(b.images) for b in method.generate()) == 40


def test_generator_terms_must_be_defined():
    loop = GeneratorLoop(GeneratorConfig(**SMALL), task())
    with pytest.raises(TypeError, match="must define generator_terms"):
        loop.cycle()


# ---- health ----------------------------------------------------------------------------------------------------


def ended(counts: list[int], *, kd: float = 1.0, **of_task: Any) -> CuDFKD:
    """A method whose epoch ends with this class histogram."""
    method = build(of_task=of_task)
    method.step = method.total_steps
    method.histogram = torch.tensor(counts)
    method._add({"g_loss": torch.tensor(2.0)}, "g")
    method._add({"kd": torch.tensor(kd)}, "s")
    method._end_epoch(3, 0.1)
    return method


@pytest.mark.parametrize(
    ("counts", "balance"),
    [([7] * 10, 1.0), ([0, 9] + [0] * 8, 0.0), ([5, 5] + [0] * 8, math.log10(2)), ([3, 1] + [0] * 8, 0.24422)],
)
def test_class_balance(counts, balance):
    """Entropy over log 10; of (3/4, 1/4) it is 0.56234 nats."""
    method = build()
    method.histogram = torch.tensor(counts)
    assert method.class_balance() == pytest.approx(balance, abs=1e-4)
    assert math.copysign(1, method.class_balance()) == 1


def test_collapse_names_the_absent_classes():
    said: list[str] = []
    ended([50, 47, 0, 0, 0, 0, 0, 0, 0, 3], warn=said.append)
    assert len(said) == 1 and "epoch 3" in said[0] and "[2, 3, 4, 5, 6, 7, 8]" in said[0]
    ended([9, 10, 11, 10, 10, 10, 10, 10, 10, 10], warn=said.append)
    assert len(said) == 1, "a balanced epoch is no collapse"


def test_a_young_generator_may_be_one_sided():
    said: list[str] = []
    method = build(store_from=0.5, of_task={"warn": said.append})
    for step, warnings in ((4, 0), (8, 1)):
        method.step, method.histogram = step, torch.tensor([99] + [0] * 9)
        method._add({"g_loss": torch.tensor(2.0)}, "g")
        method._add({"kd": torch.tensor(1.0)}, "s")
        method._end_epoch(0, 0.1)
        assert len(said) == warnings


def test_kd_floor_is_said():
    said: list[str] = []
    ended([10] * 10, kd=1e-4, warn=said.append)
    assert len(said) == 1 and "floor" in said[0] and "curriculum" in said[0]


def test_nan_names_the_term():
    with pytest.raises(NonFiniteError, match="epoch 3.*kd is NaN.*lower --method.lr"):
        ended([10] * 10, kd=float("nan"))


def test_figures_are_means_of_the_epoch_alone():
    records: list[dict[str, float]] = []
    method = build(of_task={"log": records.append})
    method._add({"g_loss": torch.tensor(1.0)}, "g")
    for value in (1.0, 2.0, 6.0):
        method._add({"kd": torch.tensor(value)}, "s")
    method.histogram += 1
    method._end_epoch(0, 0.1)
    assert records[0]["kd"] == 3.0 and records[0]["g_loss"] == 1.0 and records[0]["class_balance"] == pytest.approx(1)
    assert method.figures() == {} and int(method.histogram.sum()) == 0


def test_infinite_logits_of_an_image_stop_the_run():
    method = build()
    with torch.no_grad():
        next(iter(method.student_view.module.parameters())).fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="diverged"):
        method._collect(4)


# ---- randomness of modules -------------------------------------------------------------------------------------


class WithDropout(CuDFKD):
    """Its student drops inputs, which torch can only draw from the global generator."""

    def __init__(self, config, of_task):
        super().__init__(config, of_task)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            student = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(192, 10))
        self.student_view.module = student
        self.optimizer_s = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)


def test_dropout_is_seeded_and_resumes_exactly():
    def make() -> WithDropout:
        return WithDropout(CuDFKDConfig(**SMALL), task())

    torch.manual_seed(1)
    whole = make()
    for number, _ in enumerate(whole.generate()):
        if number == 9:
            state = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in whole.state_dict().items()}
            for part in ("generator", "student"):
                state[part] = {k: v.clone() for k, v in state[part].items()}
            for part in ("optimizer_g", "optimizer_s"):
                inner = state[part]["state"].items()
                state[part]["state"] = {i: {k: _cloned(v) for k, v in entry.items()} for i, entry in inner}
    torch.manual_seed(2)
    before = torch.get_rng_state()
    resumed = make()
    resumed.load_state_dict(state)
    resumed.estimate()
    list(resumed.generate())
    assert same(weights(whole.student_view.module), weights(resumed.student_view.module))
    assert torch.equal(before, torch.get_rng_state())


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


# ---- estimate --------------------------------------------------------------------------------------------------


def test_estimate_grows_with_the_run(monkeypatch):
    """On a clock that the steps move: a second per generator step, half a second per student step."""
    clock = [0.0]
    monkeypatch.setattr("synthkit.synthesis.generator.cost.time.perf_counter", lambda: clock[0])

    def seconds(**settings: Any) -> float:
        method = build(epochs=5, kd_steps=2, g_steps=3, **settings)

        def steps(count: int) -> None:
            clock[0] += 3 + 0.5 * count

        monkeypatch.setattr(method, "run_cycle", steps)
        return method.estimate()["seconds"]

    assert seconds(batch_size=32) == 10 * 3 + 20 * 0.5  # 10 cycles of 3 generator steps, 20 student steps
    assert seconds(batch_size=64) == 2 * 40  # timed at 32 images, twice as many per step


def test_estimate_of_memory_grows_with_the_batch():
    small, large = (build(batch_size=n).estimate()["memory_bytes"] for n in (64, 256))
    assert 2 < large / small < 4.5


# ---- settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["epochs", "ep_steps", "kd_steps", "g_steps", "batch_size", "nz", "depth", "width"])
def test_counts_must_be_positive(name):
    with pytest.raises(ConfigError, match=f"method.{name} must be at least 1"):
        CuDFKDConfig(**{name: 0})


def test_snapshots_must_not_be_negative():
    with pytest.raises(ConfigError, match="snapshots"):
        CuDFKDConfig(snapshots=-1)


def test_none_is_no_curriculum_at_all():
    """Without curriculum the student loss is the plain mean and the generator sees no adversary."""
    method = build(of_task={"curriculum": Curriculum.named("none")}, grad_adv=9.0)
    method.step = method.total_steps - 1
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert sorted(method.generator_terms(images)) == ["bn", "entropy", "one_hot"]
    losses = torch.tensor([1.0, 2.0, 6.0])
    assert float(method.student_loss(losses)) == 3.0
