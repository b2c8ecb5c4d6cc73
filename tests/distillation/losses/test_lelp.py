"""LELP against a naive reference from the formula; what is deployed equals the sum of the subclasses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from synthkit.distillation.contract import Batch, Look, Setup, Shapes, Taps
from synthkit.distillation.losses.lelp import LELP, lelp_loss, lelp_targets, unseen_basis
from synthkit.errors import ConfigError, ModelError

K, D, OWN = 3, 8, 5


def student_net() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, OWN), nn.BatchNorm1d(OWN), nn.ReLU(), nn.Linear(OWN, K))


def made(*, width: int = D, classes: int = K, **options: Any) -> LELP:
    torch.manual_seed(0)
    loss = LELP(LELP.Config(**options))
    loss.setup(
        Setup(
            student=Shapes(pooled=OWN),
            teacher=Shapes(pooled=width),
            num_classes=classes,
            batch_size=8,
            epochs=1,
            images=60,
            teacher_classifier=nn.Linear(width, classes).requires_grad_(False),
        )
    )
    return loss


def bank():
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(0, K, (60,), generator=generator)
    features = torch.randn(60, D, generator=generator) * torch.linspace(0.3, 2, D) + labels.unsqueeze(1)
    return features, labels, torch.randn(60, K, generator=generator)


def looks_of(features, labels, logits):
    def looks():
        for start in range(0, len(features), 16):
            rows = torch.arange(start, min(start + 16, len(features)))
            yield Look(teacher=Taps(logits=logits[rows], pooled=features[rows]), labels=labels[rows], index=rows)

    return looks


def test_targets_equal_a_naive_reference():
    features, labels, logits = bank()
    loss = made(directions=2, temperature=0.7)
    loss.prepare(looks_of(features, labels, logits))
    assert loss.aux is not None
    torch.manual_seed(0)
    weight = nn.Linear(D, K).weight.detach().double()
    projector = torch.eye(D, dtype=torch.float64) - torch.linalg.pinv(weight) @ weight  # onto the null space
    expected = torch.zeros(60, K, 4, dtype=torch.float64)
    for c in range(K):
        of_class = features[labels == c].double() @ projector
        mean = of_class.mean(dim=0)
        _, spread, rows = torch.linalg.svd(of_class - mean, full_matrices=False)
        for i in range(60):
            along = []
            for r in range(2):
                v = rows[r] * rows[r][rows[r].abs().argmax()].sign()
                deviation = spread[r] / math.sqrt(len(of_class))
                along.append(float((features[i].double() @ projector - mean) @ v / deviation))
            within = [math.exp(a / 0.7) for a in along] + [math.exp(-a / 0.7) for a in along]
            share = float(logits[i].double().softmax(0)[c])
            for s in range(4):
                expected[i, c, s] = share * within[s] / sum(within)
    buffers = loss.aux.get_buffer("directions"), loss.aux.get_buffer("offsets")
    found = lelp_targets(logits, features, *buffers, 0.7).view(60, K, 4).double()
    # the sign of a direction only swaps two subclasses: compare pairs in order of size
    pairs = [torch.sort(torch.stack([x[..., :2], x[..., 2:]]), dim=0).values for x in (found, expected)]
    torch.testing.assert_close(pairs[0], pairs[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sum(dim=2), logits.double().softmax(dim=1), rtol=1e-5, atol=1e-7)
    own = torch.einsum("bd,krd->bkr", features, buffers[0]) - buffers[1]
    for c in range(K):  # unit variance and mean 0 within the class
        torch.testing.assert_close(own[labels == c, c].std(dim=0, correction=0), torch.ones(2), rtol=1e-4, atol=0)
        torch.testing.assert_close(own[labels == c, c].mean(dim=0), torch.zeros(2), rtol=0, atol=1e-4)
    assert float((buffers[0] @ weight.T.float()).abs().max()) < 1e-5  # the classifier does not see them
    again = made(directions=2, temperature=0.7)
    assert again.aux is not None
    again.aux.load_state_dict(loss.aux.state_dict())  # a resumed run does not prepare
    assert torch.equal(again.aux.get_buffer("offsets"), buffers[1])


def test_loss_and_gradients():
    z = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    targets = torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).softmax(dim=1)
    for i, value in enumerate(lelp_loss(z, targets, reduction="none").tolist()):
        powers = [math.exp(x) for x in z[i].tolist()]
        logs = [math.log(x / sum(powers)) for x in powers]
        expected = -sum(p * q for p, q in zip(targets[i].tolist(), logs, strict=True))
        assert value == pytest.approx(expected, rel=1e-10)
    assert torch.autograd.gradcheck(lambda x: lelp_loss(x, targets, reduction="none"), z)
    best = lelp_loss(targets.log(), targets)  # the least value: the entropy of the targets
    torch.testing.assert_close(best, -(targets * targets.log()).sum(dim=1).mean())


def test_unseen_basis():
    weight = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    weight[3] = weight[0] + weight[1]  # rank 3
    basis = unseen_basis(weight)
    assert basis.shape == (9, 6)
    torch.testing.assert_close(basis.T @ basis, torch.eye(6, dtype=torch.float64))
    assert float((weight.double() @ basis).abs().max()) < 1e-5


def test_a_class_that_cannot_be_split_stays_whole():
    features, labels, logits = bank()
    labels[labels == 2] = 1
    labels[0] = 2  # a single image
    loss = made()
    loss.prepare(looks_of(features, labels, logits))
    assert loss.aux is not None
    assert float(loss.aux.get_buffer("directions")[2].abs().max()) == 0
    buffers = loss.aux.get_buffer("directions"), loss.aux.get_buffer("offsets")
    targets = lelp_targets(logits, features, *buffers, 1.0).view(60, K, 4)
    torch.testing.assert_close(targets[:, 2], (logits.softmax(dim=1)[:, 2:] / 4).expand(-1, 4))


def test_step_and_deployed_network():
    features, labels, logits = bank()
    loss = made()
    loss.prepare(looks_of(features, labels, logits))
    assert loss.aux is not None
    student = student_net().train()
    images = torch.rand(8, 1, 4, 4)
    pooled = student[:4](images)  # type: ignore[index]  # a Sequential
    batch = Batch(images=images, labels=labels[:8])
    teacher = Taps(logits=logits[:8], pooled=features[:8])
    value = loss(Taps(logits=logits[:8], pooled=pooled), teacher, batch)["lelp"]
    assert value.shape == (8,)
    value.mean().backward()
    assert student[1].weight.grad is not None and float(student[1].weight.grad.abs().sum()) > 0  # type: ignore[index]
    assert sum(p.numel() for p in loss.aux.parameters()) == (OWN + 1) * K * 4
    assert all(p.grad is not None for p in loss.aux.parameters())

    deployed = loss.deploy(student)
    assert student.training and isinstance(student[4], nn.Linear) and not deployed.training  # type: ignore[index]
    student.eval()
    subclasses = loss.aux.get_submodule("head")(student[:4](images)).softmax(dim=1)  # type: ignore[index]
    torch.testing.assert_close(deployed(images).softmax(dim=1), subclasses.view(8, K, 4).sum(dim=2))
    with torch.no_grad():
        student[1].weight.mul_(2)  # type: ignore[index]
        student[2].running_mean.add_(0.1)  # type: ignore[index]
    torch.testing.assert_close(deployed.get_parameter("1.weight"), student[1].weight)  # type: ignore[index]
    assert deployed.get_buffer("2.running_mean").data_ptr() == student[2].running_mean.data_ptr()  # type: ignore[index]

    fresh = LELP.rebuild(student_net(), loss.deployed_settings())
    fresh.load_state_dict(deployed.state_dict())
    assert torch.equal(fresh(images), deployed(images))
    program = torch.export.export(deployed, (images,)).module()
    torch.testing.assert_close(program(images), deployed(images))


def test_misfits_are_refused():
    with pytest.raises(ConfigError, match="leaves 0 of 8.*null_space false"):
        made(classes=8)
    assert made(classes=8, null_space=False).aux is not None
    with pytest.raises(ConfigError, match="do not fit into memory"):
        made(width=2048, classes=40)
    options: list[dict[str, Any]] = [{"directions": 0}, {"temperature": 0.0}]
    for bad in options:
        with pytest.raises(ConfigError, match=f"loss.{next(iter(bad))}"):
            LELP.Config(**bad)
    with pytest.raises(ModelError, match="linear classifier"):
        LELP.rebuild(nn.Sequential(nn.Conv2d(1, 1, 1)), {"num_classes": 3, "subclasses": 4})
