"""ConvNet-D3 of dataset distillation against numbers of the original (tests/reference/convnet_d3_*.npz)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from synthkit.models.build import build_model

REFERENCE = Path(__file__).parents[1] / "reference"
OURS = {"0": "conv", "1": "norm"}  # their flat index within a block of four -> our name


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(REFERENCE / f"{name}.npz") as file:
        return {key: torch.as_tensor(file[key]) for key in file.files}


def our_name(theirs: str) -> str:
    """features.5.weight -> features.1.norm.weight."""
    if theirs.startswith("classifier"):
        return theirs
    _, index, rest = theirs.split(".", 2)
    return f"features.{int(index) // 4}.{OURS[str(int(index) % 4)]}.{rest}"


def network(case: dict[str, torch.Tensor], norm: str) -> torch.nn.Module:
    channels, side = case["x"].shape[1], case["x"].shape[-1]
    name = "convnet_w8" if norm == "instancenorm" else "convnet_w8_bn"
    net = build_model(name, num_classes=10, in_channels=channels, image_size=side).double()
    state = {our_name(key[2:]): value for key, value in case.items() if key.startswith("w/")}
    net.load_state_dict(state)
    return net


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("norm", "mode"), [("instancenorm", ""), ("batchnorm", "_eval"), ("batchnorm", "_train")])
def test_outputs_and_gradients(norm, channels, mode):
    case = golden(f"convnet_d3_{norm}_{channels}ch")
    net = network(case, norm).train(mode == "_train")
    x = case["x"].requires_grad_()
    embedded = net.get_submodule("flatten")(net.get_submodule("features")(x))
    logits = net.get_submodule("classifier")(embedded)
    loss = F.cross_entropy(logits, case["labels"])
    loss.backward()
    same = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(embedded, case[f"embed{mode}"], **same)
    torch.testing.assert_close(logits, case[f"logits{mode}"], **same)
    torch.testing.assert_close(loss, case[f"ce{mode}"], **same)
    torch.testing.assert_close(x.grad, case[f"dx{mode}"], **same)
    found = {name: p.grad for name, p in net.named_parameters()}
    for key, wanted in case.items():
        if key.startswith(f"dw{mode}/"):
            torch.testing.assert_close(found[our_name(key.split("/")[1])], wanted, **same)


@pytest.mark.parametrize("channels", [1, 3])
def test_running_statistics_after_one_step(channels):
    case = golden(f"convnet_d3_batchnorm_{channels}ch")
    net = network(case, "batchnorm").train()
    net(case["x"])
    state = net.state_dict()
    checked = [key for key in case if key.startswith("after/")]
    for key in checked:
        torch.testing.assert_close(state[our_name(key.removeprefix("after/"))], case[key], rtol=1e-9, atol=1e-11)
    assert len(checked) == 6
