"""NAYER against numbers that the original implementation produced (tests/reference/nayer_*.npz)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from synthesis.tiny import TinyNet, task, teacher_view
from synthkit.errors import ModelError
from synthkit.models.noisy_generator import NoisyGenerator
from synthkit.models.weights import count_parameters
from synthkit.synthesis.generator.nayer import NAYER, NAYERConfig

REFERENCE = Path(__file__).parents[1] / "reference"
CLASSES, HIDDEN, BATCH = 4, 6, 10


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(REFERENCE / f"{name}.npz") as file:
        return {key: torch.as_tensor(file[key]) for key in file.files}


def close(a, b, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=rtol, atol=atol)


def state_of(case: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The stored state under our names: norm, all noisy layers in one tensor, the rest in order."""
    stored = {k.removeprefix(prefix): v for k, v in case.items() if k.startswith(prefix)}
    layers = range(len([k for k in stored if k.startswith("le1.") and k.endswith("weight")]))
    state = {k.replace("n1.", "norm."): v for k, v in stored.items() if k.startswith("n1.")}
    state |= {part: torch.stack([stored[f"le1.{j}.{part}"] for j in layers]) for part in ("weight", "bias")}
    body = {k: v for k, v in stored.items() if k.startswith(("l1.", "conv_blocks."))}
    names = {"l1.0.": "body.project.1."}
    for key, value in body.items():
        place, _, rest = key.partition(".")
        state[names["l1.0."] + rest[2:] if place == "l1" else f"body.main.{rest}"] = value
    return state


def generator_of(case: dict[str, torch.Tensor]) -> NoisyGenerator:
    net = NoisyGenerator(case["emb"], layers=3, hidden=HIDDEN, width=2, image_size=8, channels=3).double()
    net.load_state_dict(state_of(case, "G."))
    return net


def test_noisy_layer_forward():
    case = golden("nayer_noisy_layer_forward")
    net = generator_of(case).train()
    kept = []
    noisy = net.noisy
    net.noisy = lambda x: kept.append(noisy(x)) or kept[-1]  # type: ignore[method-assign]
    close(net(case["targets"]), case["img_train"])
    close(kept[0], case["noisy"])
    close(net.eval()(case["targets"]), case["img_eval"])


def test_each_slice_has_its_own_layer():
    """Against a loop over samples: sample i goes through layer i // K."""
    case = golden("nayer_noisy_layer_forward")
    net = generator_of(case)
    x = torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    naive = [net.weight[i // CLASSES] @ x[i] + net.bias[i // CLASSES] for i in range(BATCH)]
    close(net.noisy(x), torch.stack(naive))
    with pytest.raises(ModelError, match="3 layers serve 12 samples"):
        net.noisy(x.repeat(2, 1))


@pytest.mark.parametrize(
    ("classes", "batch", "side", "parameters"),
    [(10, 400, 32, 28_944_771), (100, 400, 32, 10_476_771), (200, 200, 64, 33_538_347)],
)
def test_parameter_counts(classes, batch, side, parameters):
    with torch.device("meta"):
        net = NoisyGenerator(
            torch.empty(classes, 512), layers=-(-batch // classes), hidden=1000, width=64, image_size=side, channels=3
        )
    assert count_parameters(net) == parameters


def golden_net(case: dict[str, torch.Tensor], prefix: str) -> TinyNet:
    net = TinyNet(width=len(case[f"{prefix}.conv1.weight"]), classes=CLASSES).double()
    net.load_state_dict({k[2:]: v for k, v in case.items() if k.startswith(f"{prefix}.")})
    return net


def test_synthesis(monkeypatch):
    """Two calls with the adversary on: losses, best images and the generator after 2 x 2 Adam steps."""
    case = golden("nayer_synthesize")
    teacher = teacher_view(golden_net(case, "T"))
    teacher.num_classes = CLASSES
    config = NAYERConfig(
        student="resnet8", synthesis_batch=BATCH, g_steps=2, warmup=0, nz=HIDDEN, width=2, g_life=1000,
        views="none",
    )  # fmt: skip
    method = NAYER(config, task(teachers=[teacher], images=100))
    method.generator = generator_of(case)
    method.student_view.module = golden_net(case, "S").eval().requires_grad_(False)
    for view in (teacher, method.student_view):
        std = torch.tensor(view.std, dtype=torch.float64).view(1, -1, 1, 1)
        view._scale, view._shift = 1 / std, -torch.tensor(view.mean, dtype=torch.float64).view(1, -1, 1, 1) / std
    losses: list[torch.Tensor] = []
    monkeypatch.setattr(method, "note_generator", lambda terms, loss: losses.append(loss.detach()))
    for number in (0, 1):
        rest = case["remainder"][number]
        monkeypatch.setattr(torch, "randint", lambda *args, rest=rest, **kwargs: rest)

        def redraw(rng, number=number):
            drawn = torch.stack([case[f"le.{number}.{j}.weight"] for j in range(3)])
            method.generator.weight.data.copy_(drawn)
            method.generator.bias.data.zero_()

        monkeypatch.setattr(method.generator, "redraw", redraw)
        images, targets = method.synthesise(number + 1)
        close(targets, case["targets"][number])
        close(images, case["best"][number], rtol=1e-7, atol=1e-9)
    close(torch.stack(losses), case["losses"].flatten(), rtol=1e-7, atol=1e-9)
    after = state_of(case, "after.")
    for name, value in method.generator.state_dict().items():
        close(value, after[name], rtol=1e-7, atol=1e-9)
