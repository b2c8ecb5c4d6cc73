"""Tiny networks and tasks for tests of the synthesis room."""

from __future__ import annotations

import torch
from torch import nn

from synthkit.config.schema import RuntimeConfig
from synthkit.models.view import TeacherView
from synthkit.runtime import Runtime
from synthkit.synthesis.base import Task
from synthkit.synthesis.curriculum import Curriculum

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.201]


class TinyNet(nn.Module):
    """The net of the golden cases: conv-BN-ReLU, strided conv-BN-ReLU, spatial mean, linear."""

    def __init__(self, width: int = 4, classes: int = 10, channels: int = 3):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.relu = nn.ReLU()
        self.linear = nn.Linear(2 * width, classes)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.linear(x.mean((2, 3)))


def runtime() -> Runtime:
    return Runtime.create(RuntimeConfig(device="cpu", precision="fp32"))


def teacher_view(module: nn.Module | None = None, size: int = 8, seed: int = 0) -> TeacherView:
    if module is None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = TinyNet()
            for layer in (module.bn1, module.bn2):
                layer.running_mean.normal_(0, 0.3)
                layer.running_var.uniform_(0.5, 1.5)
            nn.init.normal_(module.linear.weight, 0, 1)
    return TeacherView(module, MEAN, STD, input_size=(3, size, size), num_classes=10, name="tiny")


def task(**overrides) -> Task:
    arguments = {
        "teachers": [teacher_view()],
        "images": 40,
        "curriculum": Curriculum.named("easy2hard"),
        "seed": 0,
        "runtime": runtime(),
    }
    return Task(**{**arguments, **overrides})
