"""CRD: the original code's two steps, its negatives against the naive sampler, its memories."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from synthkit.distillation.contract import Batch, Setup, Shapes, Taps
from synthkit.distillation.losses.crd import CRD, contrast_scores, crd_loss, update_memory
from synthkit.distillation.losses.crd_draw import Classes, draw_negatives, draw_positives
from synthkit.errors import ConfigError

REFERENCE = Path(__file__).parents[2] / "reference"
LABELS = torch.tensor([0] * 5 + [3] * 12 + [7] * 3 + [0] * 4)  # 24 rows; class 0 lies in two pieces, 1 and 2 are empty


@pytest.fixture
def golden():
    with np.load(REFERENCE / "crd.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def built(labels: torch.Tensor, seed=0, widths=(8, 10), **options) -> CRD:
    loss = CRD(CRD.Config(**options))
    loss.setup(
        Setup(
            student=Shapes(pooled=widths[0]),
            teacher=Shapes(pooled=widths[1]),
            num_classes=8,
            batch_size=6,
            epochs=1,
            images=len(labels),
            bank_labels=labels,
            seed=seed,
        )
    )
    return loss


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_equals_two_steps_of_the_original_code(golden):
    loss = built(golden["labels"], negatives=9, width=12)
    aux = loss.aux
    assert aux is not None
    embeds = {
        f"{side}.{p}": golden[f"embed_{side[0]}.linear.{p}"]
        for side in ("student", "teacher")
        for p in ("weight", "bias")
    }
    memories = {"memory_student": golden["memory_v1"], "memory_teacher": golden["memory_v2"]}
    aux.double().load_state_dict({**aux.state_dict(), **embeds, **memories})
    weights = [p for name, p in aux.named_parameters() if name.endswith("weight")]
    for at in (1, 2):
        mine, theirs = (golden[f"f_{side}{at}"].requires_grad_() for side in "st")
        value = loss.contrast(mine, theirs, golden[f"idx{at}"], golden[f"cidx{at}"])
        assert value.shape == (6,)
        close(value.mean().detach(), golden[f"out_loss{at}"])
        gradients = torch.autograd.grad(value.mean(), [mine, theirs, *weights])
        names = (f"f_s{at}", f"f_t{at}", f"embed_s_w{at}", f"embed_t_w{at}")
        for found, name in zip(gradients, names, strict=True):
            close(found, golden[f"out_grad_{name}"])
        state = aux.state_dict()
        close(state["log_z"].exp(), golden["out_Z"])  # fixed on the first batch
        close(state["memory_student"], golden[f"out_mem_v1_{at}"])
        close(state["memory_teacher"], golden[f"out_mem_v2_{at}"])


def test_loss_by_a_loop():
    draw = generator()
    first, second = (3 * torch.randn(2, 5, dtype=torch.float64, generator=draw) for _ in range(2))
    log_z, c = torch.tensor([0.3, -0.7], dtype=torch.float64), 4 / 10
    for b in range(2):
        total = 0.0
        for side in range(2):
            p = [math.exp(float(x)) / math.exp(float(log_z[side])) for x in (first, second)[side][b]]
            total -= math.log(p[0] / (p[0] + c + 1e-7))
            total -= sum(math.log(c / (q + c + 1e-7)) for q in p[1:])
        assert float(crd_loss(first, second, log_z, 10, reduction="none")[b]) == pytest.approx(total, rel=1e-9)
    inputs = first.requires_grad_(), second.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: crd_loss(x, y, log_z, 10), inputs)


def test_scores_are_those_of_gathered_vectors():
    draw = generator()
    anchors, memory = torch.randn(3, 4, generator=draw), torch.randn(7, 4, generator=draw)
    rows = torch.randint(7, (3, 5), generator=draw)
    expected = torch.einsum("bke,be->bk", memory[rows], anchors) / 0.07
    torch.testing.assert_close(contrast_scores(anchors, memory, rows, 0.07), expected)


def naive_negatives(
    labels: torch.Tensor, row: int, count: int, rng: np.random.Generator, *, replacement: bool
) -> np.ndarray:
    """The source's sampler: a choice among the rows of all other classes."""
    others = np.nonzero((labels != labels[row]).numpy())[0]
    return rng.choice(others, count, replace=replacement)


@pytest.mark.parametrize(("count", "replacement"), [(8, False), (12, False), (8, True), (30, True)])
def test_negatives_are_distributed_as_by_the_naive_sampler(count, replacement):
    classes, trials = Classes.of(LABELS), 2000
    index = torch.tensor([0, 6, 18, 21])
    drawn = torch.stack(
        [draw_negatives(classes, index, count, generator(i), replacement=replacement) for i in range(trials)]
    )  # (trials, B, count)
    assert not bool((LABELS[drawn] == LABELS[index][None, :, None]).any())
    rng = np.random.default_rng(0)
    for at, row in enumerate(index.tolist()):
        mine = torch.bincount(drawn[:, at].flatten(), minlength=24).double() / trials
        others = (LABELS[row] != LABELS).double()
        expected = count * others / others.sum()  # draws of each row per trial
        deviation = (expected / trials).sqrt().amax()  # of a row's mean, at most
        assert float((mine - expected).abs().amax()) < 5 * float(deviation)
        naive = np.stack([naive_negatives(LABELS, row, count, rng, replacement=replacement) for _ in range(trials)])
        theirs = torch.bincount(torch.from_numpy(naive).flatten(), minlength=24).double() / trials
        assert float((mine - theirs).abs().amax()) < 7 * float(deviation)
        unique = [len(set(rows.tolist())) for rows in drawn[:50, at]]
        assert (min(unique) == count) == (not replacement)
        # how often two rows are drawn together
        a, b = np.nonzero(others.numpy())[0][:2]
        together = [float(np.mean([(a in x) and (b in x) for x in rows])) for rows in (drawn[:, at].numpy(), naive)]
        assert abs(together[0] - together[1]) < 0.06


def test_negatives_of_neighbouring_samples_differ():
    classes = Classes.of(torch.arange(200) % 10)
    drawn = draw_negatives(classes, torch.tensor([0, 10, 20]), 30, generator(), replacement=False)  # one class
    assert len({tuple(sorted(rows.tolist())) for rows in drawn}) == 3


def test_relaxed_positives_are_of_the_class():
    classes = Classes.of(LABELS)
    index = torch.tensor([0, 6, 18, 21]).repeat(500)
    drawn = draw_positives(classes, index, generator())
    assert torch.equal(LABELS[drawn], LABELS[index])
    assert set(drawn[index == 18].tolist()) == {17, 18, 19}


def batch_of(index: torch.Tensor, seed=0) -> Batch:
    return Batch(images=torch.zeros(len(index), 1, 2, 2), index=index, draw=lambda name: generator(seed))


def test_rows_of_a_step():
    index = torch.tensor([0, 6, 18, 21, 3, 9])
    for positive in ("exact", "relax"):
        loss = built(LABELS, negatives=10, width=4, positive=positive)
        rows = loss.rows(batch_of(index))
        assert rows.shape == (6, 11) and torch.equal(rows, loss.rows(batch_of(index)))
        assert not torch.equal(rows, loss.rows(batch_of(index, seed=1)))
        assert torch.equal(LABELS[rows[:, 0]], LABELS[index])
        assert torch.equal(rows[:, 0], index) == (positive == "exact")
    assert not built(LABELS, negatives=12).replacement and built(LABELS, negatives=13).replacement  # 12 rows of class 3


def test_a_step_trains_embeddings_and_moves_memories():
    loss = built(LABELS, negatives=10, width=4)
    aux = loss.aux
    assert aux is not None
    before = {name: value.clone() for name, value in aux.state_dict().items()}
    assert float(before["memory_student"].abs().max()) <= (3 / 4) ** 0.5 and float(before["known"]) == 0
    index, draw = torch.tensor([0, 6, 18, 21, 3, 9]), generator()
    student = torch.randn(6, 8, generator=draw, requires_grad=True)
    taps = (
        Taps(logits=torch.zeros(6, 8), pooled=student),
        Taps(logits=torch.zeros(6, 8), pooled=torch.randn(6, 10, generator=draw)),
    )
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*taps, batch_of(index))["crd"]
    assert value.dtype == torch.float32 and value.shape == (6,)
    value.mean().backward()  # the memories were moved meanwhile: the scores must hold the old ones
    assert student.grad is not None and bool(torch.isfinite(student.grad).all())
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in aux.parameters())
    after = aux.state_dict()
    for side in ("memory_student", "memory_teacher"):
        moved = (after[side] != before[side]).any(dim=1).nonzero().flatten().tolist()
        assert moved == sorted(index.tolist())
        torch.testing.assert_close(after[side][index].norm(dim=1), torch.ones(6))
    again = built(LABELS, seed=5, negatives=10, width=4)
    assert again.aux is not None
    again.aux.load_state_dict(after)  # a resumed run goes on with the same memories and normalisers
    with torch.no_grad():
        assert torch.equal(again(*taps, batch_of(index))["crd"], loss(*taps, batch_of(index))["crd"])
    assert set(after) == {
        "student.weight", "student.bias", "teacher.weight", "teacher.bias", "memory_student", "memory_teacher", "log_z",
        "known",
    }  # fmt: skip


def test_an_image_that_is_twice_in_a_batch_moves_once():
    memory, new = torch.eye(3), torch.nn.functional.normalize(torch.tensor([[1.0, 1, 0], [0, 1, 1], [5, 0, 0]]), dim=1)
    update_memory(memory, torch.tensor([2, 0, 2]), new, momentum=0.5)
    expected = torch.nn.functional.normalize(0.5 * torch.tensor([0.0, 0, 1]) + 0.5 * new[0], dim=0)
    torch.testing.assert_close(memory[2], expected)
    assert torch.equal(memory[1], torch.eye(3)[1])


def test_what_cannot_work_is_refused():
    with pytest.raises(ConfigError, match="two classes"):
        built(torch.zeros(9, dtype=torch.int64))
    with pytest.raises(ConfigError, match="every image needs a label"):
        CRD().setup(Setup(student=Shapes(), teacher=Shapes(), num_classes=2, batch_size=2, epochs=1, images=9))
    for options, match in (
        ({"negatives": 0}, "loss.negatives"),
        ({"temperature": 0.0}, "temperature"),
        ({"momentum": 1.0}, "loss.momentum"),
        ({"positive": "relaxed"}, "did you mean 'relax'"),
    ):
        with pytest.raises(ConfigError, match=match):
            CRD.Config(**options)  # type: ignore[arg-type]
    needs = CRD.requires
    assert needs.index and needs.labels and needs.relational and CRD.beta == 0.8
