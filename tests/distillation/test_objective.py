"""From a batch to the number that is minimised: labels, pace, slices, looks before the first step, draws."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from torch import nn

from synthkit.distillation.contract import Batch, Loss, LossNeeds, Taps
from synthkit.distillation.objective import (
    LOOK_ROWS,
    Distillation,
    FromFunction,
    Seen,
    drawer,
    join_seen,
    map_batch,
    map_seen,
    map_taps,
    paced,
    plain_batches,
    split_batch,
    tensors_of,
)
from synthkit.distillation.sources import NoiseSource, RandomOrder, ResidentStore, StoreSource
from synthkit.distillation.weighted import weighted_sum
from synthkit.models.taps import TapSet
from synthkit.models.view import ModelView, TeacherView

CPU = torch.device("cpu")
CLASSES, ROWS = 3, 8


def view(seed: int, kind: type[ModelView] = ModelView) -> ModelView:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, CLASSES))
    return kind(network, [0.5], [0.25], input_size=(1, 4, 4), num_classes=CLASSES)


def batch(rows: int = ROWS) -> Batch:
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(rows, 1, 4, 4, generator=generator)
    logits = torch.randn(rows, CLASSES, generator=generator)
    return Batch(images=images, labels=torch.arange(rows) % 2, logits=logits, index=torch.arange(rows))


class Spy(Loss):
    """The distance of logits, and what the loss was given."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Nothing."""

    def __init__(self, needs: LossNeeds | None = None):
        super().__init__()
        self.requires = needs or LossNeeds()
        self.given: list[tuple[Taps, Taps, Batch]] = []

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, torch.Tensor]:
        self.given.append((student, teacher, batch))
        return {"spy": (student.logits - teacher.logits).square().mean(dim=1)}


def objective(loss: Loss | None = None, *, live: bool = True, **options) -> Distillation:
    student, teacher = view(1), view(2, TeacherView)
    needs = (loss := loss or Spy()).requires
    taught = TapSet(teacher, needs.teacher) if live else None
    return Distillation(loss, TapSet(student, needs.student), taught, **options)


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("policy", ["none", "stored", "argmax"])
def test_label_policies(live, policy):
    given = batch()
    made = objective(live=live, labels=policy)
    seen = made.look(given)
    assert seen.teacher is not None and seen.student is not None and seen.batch.labels is not None
    expected = made.teacher.view(given.images) if made.teacher is not None else given.logits
    torch.testing.assert_close(seen.teacher.logits, expected)
    assert expected is not None
    if policy == "argmax":
        assert torch.equal(seen.batch.labels, expected.argmax(1))
        assert not torch.equal(seen.batch.labels, torch.arange(ROWS) % 2)  # else nothing is tested
    else:
        assert torch.equal(seen.batch.labels, torch.arange(ROWS) % 2)
    assert not seen.teacher.logits.requires_grad and not seen.teacher.logits.is_inference()
    assert seen.student.logits.requires_grad


def test_labels_beside_the_loss():
    given = batch()
    made = objective(labels="stored", label_weight=0.25)
    figures = made.figures(made.look(given))
    assert made.teacher is not None and given.labels is not None
    student, teacher = made.student.view(given.images), made.teacher.view(given.images)
    cross = 0.25 * nn.functional.cross_entropy(student, given.labels)
    distance = (student - teacher).square().mean()
    torch.testing.assert_close(figures.loss, distance + cross)
    torch.testing.assert_close(figures.task, cross)
    assert list(figures.shown) == ["spy", "label_ce", "agreement"]
    torch.testing.assert_close(figures.shown["spy"], distance.detach())
    assert float(figures.shown["agreement"]) == float((student.argmax(1) == teacher.argmax(1)).float().mean())
    assert not any(value.requires_grad for value in figures.shown.values()) and figures.loss.requires_grad


def test_the_labels_part_of_a_sum_is_known():
    made = objective(weighted_sum("0.5*ce+kd")(), labels="stored")
    figures = made.figures(made.look(given := batch()))
    logits = made.student.view(given.images)
    assert given.labels is not None
    torch.testing.assert_close(figures.task, 0.5 * nn.functional.cross_entropy(logits, given.labels))


def test_one_term_is_not_shown_twice():
    figures = objective().figures(objective().look(batch()))
    assert list(figures.shown) == ["agreement"] and figures.task is None


def test_agreement_is_not_shown_where_another_network_is_deployed():
    made = objective(Spy(LossNeeds(deploys=True)))
    assert made.figures(made.look(batch())).shown == {}


def test_features_of_a_teacher_come_without_graph_and_can_be_saved_for_backward():
    made = objective(Spy(LossNeeds(student=("pooled",), teacher=("pooled",))))
    seen = made.look(batch())
    assert seen.teacher is not None and seen.student is not None
    assert seen.teacher.pooled is not None and not seen.teacher.pooled.requires_grad
    assert not seen.teacher.pooled.is_inference()
    assert seen.student.pooled is not None and seen.student.pooled.requires_grad
    (seen.student.pooled * seen.teacher.pooled).sum().backward()


# --- pace -------------------------------------------------------------------------------------------------------------


def test_paced_keeps_the_easiest_share():
    values = {
        "a": torch.tensor([1.0, 4.0, 2.0, 0.5], requires_grad=True),
        "b": torch.tensor([1.0, 0.0, 5.0, 1.0]),
        "whole": torch.tensor(7.0),
    }
    found = paced(values, 0.5)
    # sums 2, 4, 7, 1.5: the first and the last count, twice each, so that the mean is theirs
    assert found["a"].tolist() == [2.0, 0.0, 0.0, 1.0] and found["b"].tolist() == [2.0, 0.0, 0.0, 2.0]
    assert found["whole"] is values["whole"]
    found["a"].mean().backward()
    assert values["a"].grad is not None and values["a"].grad.tolist() == [0.5, 0.0, 0.0, 0.5]


@pytest.mark.parametrize(("share", "kept"), [(0.0, 1), (0.2, 1), (0.4, 2), (0.99, 5)])
def test_paced_counts(share, kept):
    values = {"a": torch.arange(5.0) + 1}
    found = paced(values, share)["a"]
    assert int((found > 0).sum()) == kept
    assert float(found.mean()) == pytest.approx(float(values["a"][:kept].mean()), rel=1e-6)


def test_pace_that_takes_all_or_has_nothing_to_choose_changes_nothing():
    values = {"a": torch.arange(4.0)}
    assert paced(values, 1.0) is values
    whole = {"b": torch.tensor(1.0)}
    assert paced(whole, 0.3) is whole


def test_a_paced_objective_sees_whole_batches_and_asks_by_epoch():
    asked: list[int] = []
    made = objective(pace=lambda epoch: asked.append(epoch) or 0.25)
    assert made.relational and not objective().relational
    seen = made.look(replace(batch(), epoch=2.5))
    figures = made.figures(seen)
    assert seen.student is not None and seen.teacher is not None
    easiest = (seen.student.logits - seen.teacher.logits).square().mean(dim=1).sort().values[:2]
    torch.testing.assert_close(figures.loss, easiest.mean())
    assert asked == [2]


# --- slices -----------------------------------------------------------------------------------------------------------


def many_taps(rows: int, grad: bool) -> Taps:
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(rows, *shape, generator=generator, requires_grad=grad)

    return Taps(logits=draw(3), pooled=draw(5), maps=[draw(2, 4, 4), draw(3, 2, 2)], preact=[draw(2, 4, 4)],
                members=[draw(3), draw(3)])  # fmt: skip


def test_map_taps_changes_every_tensor_and_keeps_what_is_missing():
    taps = many_taps(4, False)
    doubled = map_taps(taps, lambda tensor: 2 * tensor)
    assert len(tensors_of(taps)) == len(tensors_of(doubled)) == 7
    assert all(torch.equal(2 * a, b) for a, b in zip(tensors_of(taps), tensors_of(doubled), strict=True))
    assert doubled.maps is not None and [m.shape for m in doubled.maps] == [(4, 2, 4, 4), (4, 3, 2, 2)]
    bare = map_taps(Taps(logits=torch.ones(2, 3)), lambda tensor: tensor)
    assert [getattr(bare, f.name) is None for f in fields(Taps)] == [False, True, True, True, True]


def test_batches_are_split_and_joined_in_order():
    whole = replace(batch(), epoch=1.5, progress=0.5, draw=drawer(0, 1))
    parts = split_batch(whole, 4)
    assert [len(part.images) for part in parts] == [2, 2, 2, 2]
    assert all(p.epoch == 1.5 and p.progress == 0.5 and p.draw is whole.draw for p in parts)
    assert parts[1].index is not None and parts[1].index.tolist() == [2, 3]
    joined = join_seen([Seen(batch=part) for part in parts])
    assert joined.student is None and joined.teacher is None
    for name in ("images", "labels", "logits", "index"):
        assert torch.equal(getattr(joined.batch, name), getattr(whole, name))
    bare = Batch(images=whole.images)
    again = join_seen([Seen(batch=part) for part in split_batch(bare, 2)]).batch
    assert torch.equal(again.images, bare.images) and again.labels is None and again.index is None


def test_joined_tensors_of_the_student_are_leaves_whose_gradients_can_be_handed_back():
    student, teacher = many_taps(ROWS, True), many_taps(ROWS, False)
    parts = []
    for number, part in enumerate(split_batch(batch(), 2)):
        rows = slice(4 * number, 4 * number + 4)
        parts.append(
            Seen(
                batch=part,
                student=map_taps(student, lambda t, rows=rows: t[rows]),
                teacher=map_taps(teacher, lambda t, rows=rows: t[rows]),
            )
        )
    joined = join_seen(parts)
    assert joined.student is not None and joined.teacher is not None
    for mine, theirs in ((joined.student, student), (joined.teacher, teacher)):
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(mine), tensors_of(theirs), strict=True))
    assert all(t.is_leaf and t.requires_grad for t in tensors_of(joined.student))
    assert not any(t.requires_grad for t in tensors_of(joined.teacher))
    torch.stack([t.square().sum() for t in tensors_of(joined.student)]).sum().backward()
    assert all(torch.equal(t.grad, 2 * t.detach()) for t in tensors_of(joined.student) if t.grad is not None)
    assert all(t.grad is None for t in tensors_of(student))  # nothing went through


def test_map_seen_leaves_the_images_alone():
    seen = Seen(batch=batch(), student=many_taps(ROWS, True), teacher=many_taps(ROWS, False))
    found = map_seen(seen, lambda tensor: tensor[:3])
    assert len(found.batch.images) == ROWS and found.batch.labels is not None and len(found.batch.labels) == 3
    assert found.student is not None and len(found.student.logits) == 3
    assert found.teacher is not None and all(len(t) == 3 for t in tensors_of(found.teacher))
    assert map_seen(Seen(batch=batch()), lambda tensor: tensor).student is None
    named = map_batch(batch(), lambda tensor: tensor[:1], ("labels",))
    assert (
        named.labels is not None and len(named.labels) == 1 and named.logits is not None and len(named.logits) == ROWS
    )


# --- one function -----------------------------------------------------------------------------------------------------


def test_an_objective_of_one_function():
    student = view(1)
    made = FromFunction(student, lambda v, b: {"loss": v(b.images).square().mean(), "other": v(b.images).mean()})
    figures = made.figures(made.look(batch()))
    assert figures.loss.requires_grad and figures.task is None
    assert list(figures.shown) == ["other"] and not figures.shown["other"].requires_grad
    assert made.aux is None and not made.relational and made.parameter_groups(student.module) is None


# --- looks ------------------------------------------------------------------------------------------------------------


def source(count: int = 20, *, dtype: torch.dtype = torch.uint8, logits: bool = True) -> StoreSource:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (count, 1, 4, 4), generator=generator, dtype=torch.uint8)
    stored = torch.randn(count, CLASSES, generator=generator) if logits else None
    if dtype != torch.uint8:
        images = images.float() / 255
    store = ResidentStore(images, torch.arange(count) % CLASSES, stored, CPU)
    order = RandomOrder(np.arange(2, count), 0)  # two rows are held out
    return StoreSource(store, order, 6, policy="crop_flip", device=CPU)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_plain_batches_are_the_images_as_they_are_in_order(dtype, monkeypatch):
    monkeypatch.setattr("synthkit.distillation.objective.LOOK_ROWS", 8)
    given = source(dtype=dtype)
    found = list(plain_batches(given))
    assert [len(b.images) for b in found] == [8, 8, 2]
    rows = torch.cat([b.index for b in found if b.index is not None])
    assert rows.tolist() == list(range(2, 20))
    images = torch.cat([b.images for b in found])
    expected = source(dtype=dtype).store.gather(rows.numpy()).images
    expected = expected.float() / 255 if dtype == torch.uint8 else expected
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-7)
    assert LOOK_ROWS >= 64  # in use it is large


def test_plain_batches_of_noise_are_one_epoch_without_rows():
    given = NoiseSource((1, 4, 4), 6, 3, rank=0, world=1, policy="none", seed=1, device=CPU)
    found = list(plain_batches(given))
    assert [b.index.tolist() for b in found if b.index is not None] == [[-1] * 6] * 3
    for step, plain in enumerate(found):
        assert torch.equal(plain.images, given.batch(step).images)


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("policy", ["none", "argmax"])
def test_looks_pass_over_the_bank_as_often_as_asked(live, policy):
    made = objective(live=live, labels=policy)
    given = source()
    looks = made.looks(given)
    first, again = list(looks()), list(looks())
    assert len(first) == len(again) == 1 and torch.equal(first[0].index, torch.arange(2, 20))
    look, plain = first[0], next(plain_batches(given))
    expected = made.teacher.view(plain.images) if made.teacher is not None else plain.logits
    assert expected is not None and look.labels is not None and plain.labels is not None
    torch.testing.assert_close(look.teacher.logits, expected)
    assert torch.equal(look.labels, expected.argmax(1) if policy == "argmax" else plain.labels)
    assert torch.equal(again[0].teacher.logits, look.teacher.logits)
    assert not look.teacher.logits.requires_grad


# --- draws ------------------------------------------------------------------------------------------------------------


def numbers(seed: int, step: int, name: str) -> list[float]:
    return torch.rand(4, generator=drawer(seed, step)(name)).tolist()


def test_draws_depend_on_seed_step_and_name_alone(monkeypatch):
    first = numbers(1, 5, "negatives")
    before = torch.random.get_rng_state()
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert numbers(1, 5, "negatives") == first
    assert torch.equal(before, torch.random.get_rng_state())
    others = [numbers(2, 5, "negatives"), numbers(1, 6, "negatives"), numbers(1, 5, "noise")]
    assert all(other != first for other in others)
    draw = drawer(1, 5)
    assert torch.rand(4, generator=draw("negatives")).tolist() == first  # every call starts anew
    assert torch.rand(4, generator=draw("negatives")).tolist() == first
