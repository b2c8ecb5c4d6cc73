"""The student that LELP deploys: its classifier is replaced by one over pseudo-subclasses."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn

from synthkit.errors import ModelError


class SubclassHead(nn.Module):
    """Features (B, D) to class logits (B, K): `logsumexp` over the subclasses of each class, so that the softmax of
    the result sums the subclasses' probabilities."""

    def __init__(self, linear: nn.Linear, num_classes: int):
        super().__init__()
        self.linear = linear
        self.num_classes = num_classes

    def forward(self, features: Tensor) -> Tensor:
        return torch.logsumexp(self.linear(features).unflatten(1, (self.num_classes, -1)), dim=2)


def classifier_of(student: nn.Module) -> tuple[str, nn.Linear]:
    """Dotted path of the last linear layer of a network, and the layer.

    Raises:
        ModelError: there is none, or the network is nothing else.
    """
    linears = [(name, m) for name, m in student.named_modules() if isinstance(m, nn.Linear)]
    if not linears or not linears[-1][0]:
        raise ModelError("lelp: the student needs a linear classifier behind other layers", hint="use another loss")
    return linears[-1]


def with_classifier(student: nn.Module, head: nn.Module) -> nn.Module:
    """A copy of `student` in eval mode whose last linear layer is `head`. All tensors are shared; the student itself,
    its mode and its layers stay as they are."""
    path, _ = classifier_of(student)
    tensors = itertools.chain(student.parameters(), student.buffers())
    clone = copy.deepcopy(student, {id(t): t for t in tensors})
    clone.set_submodule(path, head)
    return clone.eval()
