"""SpaceshipNet against numbers that the original implementation produced (tests/reference/spaceship_*.npz)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from synthesis.tiny import MEAN, STD, task
from synthkit.models.generators import build_generator
from synthkit.models.stages import decode, generate_with_maps
from synthkit.models.view import TeacherView
from synthkit.synthesis.curriculum import Curriculum
from synthkit.synthesis.generator.spaceshipnet import SpaceshipNet, SpaceshipNetConfig, exchange_channels

REFERENCE = Path(__file__).parents[1] / "reference"


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(REFERENCE / f"{name}.npz") as file:
        return {key: torch.as_tensor(file[key]) for key in file.files}


def close(a, b, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=rtol, atol=atol)


def test_channel_exchange_and_decoding():
    case = golden("spaceship_channel_exchange")
    net = build_generator("small", latent_dim=5, image_size=8, channels=3, width=2, seed=0).double().eval()
    values = [v for k, v in case.items() if k.startswith("G.")]
    own = net.state_dict()
    assert [v.shape for v in own.values()] == [v.shape for v in values]
    net.load_state_dict(dict(zip(own, values, strict=True)))
    with torch.no_grad():
        images, maps = generate_with_maps(net, case["z"])
        close(images, case["img_eval"])
        close(net(case["z"]), images)
        assert len(maps) == 3
        for depth, found in enumerate(maps):
            close(found, case[f"feat_{depth}"])
            close(decode(net, found, depth), images)
            mixed = exchange_channels(found, case[f"picks_{depth}"])
            close(mixed, case[f"mixed_{depth}"])
            close(decode(net, mixed, depth), case[f"decoded_{depth}"])


class Net(nn.Module):
    """The net of the golden case: three convolutions, each with its ReLU, spatial mean, linear."""

    def __init__(self, width: int):
        super().__init__()
        self.c1, self.r1 = nn.Conv2d(3, width, 3, 1, 1), nn.ReLU()
        self.c2, self.r2 = nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU()
        self.c3, self.r3 = nn.Conv2d(2 * width, 2 * width, 3, 2, 1), nn.ReLU()
        self.linear = nn.Linear(2 * width, 10)

    def forward(self, x):
        x = self.r3(self.c3(self.r2(self.c2(self.r1(self.c1(x))))))
        return self.linear(x.mean((2, 3)))


def golden_method(case: dict[str, torch.Tensor], **weights: Any) -> SpaceshipNet:
    """The method in float64 on the stored networks, which take their input as it is."""
    nets = []
    for prefix in ("T.", "S."):
        net = Net(len(case[f"{prefix}c1.weight"])).double()
        net.load_state_dict({k.removeprefix(prefix): v for k, v in case.items() if k.startswith(prefix)})
        nets.append(net)
    teacher = TeacherView(nets[0], MEAN, STD, input_size=(3, 8, 8), num_classes=10)
    config = SpaceshipNetConfig(
        student="convnet_d1_w8_bn", synthesis_batch=4, g_steps=1, nz=5, width=2, bn=0, feature_memory=4, **weights
    )
    method = SpaceshipNet(config, task(images=4, curriculum=Curriculum.named("none")))
    method.teacher, method.student_view.module = teacher, nets[1]
    for view in (method.teacher, method.student_view):
        view._scale = torch.ones(1, 3, 1, 1, dtype=torch.float64)
        view._shift = torch.zeros(1, 3, 1, 1, dtype=torch.float64)
    return method


@pytest.mark.parametrize(
    ("cam", "gradcam", "parts"), [(0, 0, ["kl"]), (1, 0, ["kl", "cam"]), (0, 1, ["kl", "gradcam"])]
)
def test_each_student_loss(cam, gradcam, parts):
    case = golden("spaceship_student_losses")
    method = golden_method(case, cam=cam, gradcam=gradcam)
    found = method.distil(case["x"])
    close(found.loss.detach(), sum(case[part] for part in parts), rtol=1e-7, atol=1e-9)
    assert found.per_sample.shape == (len(case["x"]),)


def test_student_gradients():
    case = golden("spaceship_student_losses")
    method = golden_method(case)
    method.distil(case["x"]).loss.backward()
    for name, parameter in method.student_view.module.named_parameters():
        close(parameter.grad, case[f"grad_s.{name}"], rtol=1e-7, atol=1e-9)
    assert all(parameter.grad is None for parameter in method.teacher.module.parameters())
