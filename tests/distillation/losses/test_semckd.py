"""SemCKD against the original code's numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from synthkit.distillation.contract import Batch, Setup, Shapes, Taps
from synthkit.distillation.losses.semckd import SemCKD, attention_weights, semckd_loss
from synthkit.errors import ConfigError

REFERENCE = Path(__file__).parents[2] / "reference"


@pytest.fixture
def golden():
    with np.load(REFERENCE / "semckd.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def built(batch_size=8, **options) -> SemCKD:
    loss = SemCKD(SemCKD.Config(**options))
    student, teacher = Shapes(maps=[(4, 8, 8), (6, 4, 4)]), Shapes(maps=[(5, 8, 8), (4, 4, 4), (6, 2, 2)])
    loss.setup(Setup(student=student, teacher=teacher, num_classes=3, batch_size=batch_size, epochs=1, images=40))
    return loss


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_equals_the_original_code(golden):
    loss = built()
    state = {}
    for key, value in golden.items():
        head, _, rest = key.removeprefix("sa.").partition(".")
        if head.startswith(("query_", "key_")):
            name, number = head.split("_")
            state[f"{name}.{number}.{rest.replace('linear1', '0').replace('linear2', '2')}"] = value
        elif key.startswith("sa.regressor"):
            state[f"project.{head[-2]}_{head[-1]}.{rest.removeprefix('regressor.')}"] = value
    assert loss.aux is not None
    aux = loss.aux.double()
    aux.load_state_dict({**{k: v for k, v in aux.state_dict().items() if "num_batches" in k}, **state})
    students = [golden[f"s{i}"].requires_grad_() for i in range(2)]
    teachers = [golden[f"t{j}"] for j in range(3)]
    close(loss.attend(students, teachers).detach(), golden["out_attention"])
    zeros = torch.zeros(8, 3)
    value = loss(Taps(logits=zeros, maps=students), Taps(logits=zeros, maps=teachers), Batch(images=zeros))["semckd"]
    assert value.shape == (8,)
    close(value.mean().detach(), golden["out_loss"])
    errors = torch.stack([golden[f"out_ind_{i}{j}"] for i in range(2) for j in range(3)], dim=1).unflatten(1, (2, 3))
    close(value.detach(), semckd_loss(golden["out_attention"], errors, reduction="none"))
    weights = dict(aux.named_parameters())
    inputs = [*students, weights["query.0.0.weight"], weights["key.0.0.weight"]]
    gradients = torch.autograd.grad(value.mean(), inputs)
    for found, name in zip(gradients, ("s0", "s1", "query_0_w1", "key_0_w1"), strict=True):
        close(found, golden[f"out_grad_{name}"])


def test_attention_by_hand_and_gradients():
    queries, keys = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    expected = torch.tensor([[[0.7310585786, 0.2689414214]]])  # 1 / (1 + e^-1)
    torch.testing.assert_close(attention_weights(queries, keys), expected)
    torch.testing.assert_close(attention_weights(queries, keys, 1e6), torch.full((1, 1, 2), 0.5))
    weights, errors = (torch.rand(3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(semckd_loss, (weights, errors))


def test_networks_have_the_batch_size_as_width():
    loss = built(batch_size=64)
    assert loss.aux is not None
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in loss.aux.named_children()}
    mlp = 64 * 32 + 32 + 32 * 16 + 16  # without the network that the source holds but never calls
    assert sizes["query"] == 2 * mlp and sizes["key"] == 3 * mlp
    expected = sum(s * 2 * t + 9 * 4 * t * t + 2 * t * t + 8 * t for s in (4, 6) for t in (5, 4, 6))
    assert sizes["project"] == expected
    maps = [torch.zeros(8, 4, 8, 8), torch.zeros(8, 6, 4, 4)]
    taps = Taps(logits=torch.zeros(8, 3), maps=maps)
    with pytest.raises(ConfigError, match="batches of 64; got 8"):
        loss(taps, taps, Batch(images=torch.zeros(8, 1, 2, 2)))
    with pytest.raises(ConfigError, match="at least its factor"):
        built(batch_size=3)
    with pytest.raises(ConfigError, match="loss.factor"):
        SemCKD.Config(factor=0)
    assert SemCKD.requires.relational and SemCKD.beta == 400
