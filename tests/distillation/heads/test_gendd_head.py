"""GenDD's schedule, head, sampling and deployed network against the original code's numbers."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from synthkit.distillation.heads.gaussian_diffusion import (
    GaussianDiffusion,
    binned_log_likelihood,
    cosine_betas,
    respaced,
)
from synthkit.distillation.heads.gendd import GenDDNetwork, SimpleMLPAdaLN, sample_features, time_embedding
from synthkit.errors import ConfigError
from synthkit.evaluation.cost import network_cost
from synthkit.models.build import build_model

GOLDEN = Path(__file__).parents[2] / "reference"


def golden(case: str, *, double: bool = False) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{case}.npz") as file:
        found = {key: torch.from_numpy(file[key]) for key in file.files}
    return {k: v.double() if double and v.dtype == torch.float32 else v for k, v in found.items()}


def golden_head(values: dict[str, torch.Tensor]) -> SimpleMLPAdaLN:
    """The stored head (width 16, 3 tokens of 8, condition of 6)."""
    prefix = "m.diffloss.net."
    state = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
    head = SimpleMLPAdaLN(8, 6, 3, width=16).to(values["x"].dtype)
    head.load_state_dict(state)
    return head


def golden_norm(values: dict[str, torch.Tensor]) -> nn.LayerNorm:
    norm = nn.LayerNorm(6).to(values["x"].dtype)
    norm.load_state_dict({"weight": values["m.cls_projector.0.weight"], "bias": values["m.cls_projector.0.bias"]})
    return norm


def golden_classifier(values: dict[str, torch.Tensor], name: str) -> nn.Linear:
    weight = values[f"{name}.weight"]
    layer = nn.Linear(weight.shape[1], weight.shape[0]).to(weight.dtype)
    layer.load_state_dict({"weight": weight, "bias": values[f"{name}.bias"]})
    return layer


def near(found: torch.Tensor, expected: torch.Tensor, relative: float):
    """Relative to the largest value: an untrained head at abar = 2.4e-9 amplifies rounding."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= relative * float(expected.abs().max())


# --- schedule ---------------------------------------------------------------------------------------------------------


def test_schedule_equals_the_original_code():
    values = np.load(GOLDEN / "gendd_schedule.npz")
    process = GaussianDiffusion(cosine_betas())
    for found, name in (
        (process.betas, "betas"),
        (process.abar, "alphas_cumprod"),
        (process.abar_before, "alphas_cumprod_prev"),
        (process.posterior_variance, "posterior_variance"),
        (process.posterior_log_variance, "posterior_log_variance_clipped"),
        (process.posterior_from_clean, "posterior_mean_coef1"),
        (process.posterior_from_state, "posterior_mean_coef2"),
    ):
        np.testing.assert_allclose(found, values[f"out_{name}"], rtol=1e-12, err_msg=name)
    assert process.betas[-1] == 0.999 and float((process.betas == 0.999).sum()) == 1  # one beta is clipped


@pytest.mark.parametrize("count", [100, 64, "ddim50"])
def test_respaced_processes_equal_the_original_code(count):
    values = np.load(GOLDEN / "gendd_schedule.npz")
    process = GaussianDiffusion(cosine_betas(), respaced(1000, count))
    assert process.times == values[f"out_rs{count}_timestep_map"].tolist()
    np.testing.assert_allclose(process.betas, values[f"out_rs{count}_betas"], rtol=1e-12)
    np.testing.assert_allclose(process.abar, values[f"out_rs{count}_alphas_cumprod"], rtol=1e-12)
    logs = values[f"out_rs{count}_posterior_log_variance_clipped"]
    np.testing.assert_allclose(process.posterior_log_variance, logs, rtol=1e-12)


def test_impossible_numbers_of_steps_are_refused():
    for count in (1, 1001, "ddim999"):
        with pytest.raises(ConfigError, match="sampling steps"):
            respaced(1000, count)
    assert respaced(1000, 1000) == list(range(1000)) and respaced(10, 2) == [0, 9]


# --- training terms ---------------------------------------------------------------------------------------------------


def test_terms_by_hand():
    process = GaussianDiffusion(cosine_betas(10))
    draw = torch.Generator().manual_seed(0)
    clean, noise, output = (torch.randn(3, n, generator=draw, dtype=torch.float64) for n in (2, 2, 4))
    index = torch.tensor([0, 4, 9])
    clean[0] = torch.tensor([0.5, 1.5])  # an inner bin, and the outermost
    state = process.noised(clean, index, noise)
    squared, bits = process.terms(output, clean, state, noise, index)
    for row in range(3):
        t = int(index[row])
        beta, abar, before = process.betas[t], process.abar[t], process.abar[t - 1] if t else 1.0
        spread = beta * (1 - before) / (1 - abar) if t else process.posterior_variance[1]
        total = 0.0
        for k in range(2):
            x0, xt, eps, v = (float(a) for a in (clean[row, k], state[row, k], output[row, k], output[row, 2 + k]))
            assert xt == pytest.approx(math.sqrt(abar) * x0 + math.sqrt(1 - abar) * float(noise[row, k]))
            guess = (xt - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
            scale = 1 - abar
            from_clean, from_state = math.sqrt(before) * beta / scale, math.sqrt(1 - beta) * (1 - before) / scale
            mean, true = from_clean * guess + from_state * xt, from_clean * x0 + from_state * xt
            log_variance = (v + 1) / 2 * math.log(beta) + (1 - v) / 2 * math.log(spread)
            if t:
                ratio = spread / math.exp(log_variance)
                kl = 0.5 * (-math.log(ratio) - 1 + ratio + (true - mean) ** 2 / math.exp(log_variance))
                total += kl
                continue

            def below(x: float) -> float:
                return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

            deviation = math.exp(log_variance / 2)
            upper, lower = ((below((x0 + s / 255 - mean) / deviation)) for s in (1, -1))
            total -= math.log(max(1 - lower if x0 > 0.999 else upper - lower, 1e-12))
        assert float(bits[row]) == pytest.approx(total / 2 / math.log(2), rel=1e-9)
        assert float(squared[row]) == pytest.approx(float((output[row, :2] - noise[row]).square().mean()))


def test_the_bins_add_up_to_one():
    middles = torch.linspace(-1, 1, 256, dtype=torch.float64)
    likelihood = binned_log_likelihood(middles, torch.tensor(0.2), torch.tensor(-1.0)).exp()
    assert float(likelihood.sum()) == pytest.approx(1.0, rel=1e-9)


def test_the_bound_teaches_the_variance_alone():
    process = GaussianDiffusion(cosine_betas())
    draw = torch.Generator().manual_seed(1)
    output = torch.randn(5, 4, generator=draw, dtype=torch.float64, requires_grad=True)
    clean, noise = (torch.randn(5, 2, generator=draw, dtype=torch.float64) for _ in range(2))
    index = torch.tensor([0, 1, 500, 900, 990])
    state = process.noised(clean, index, noise)
    squared, bits = process.terms(output, clean, state, noise, index)
    (of_bits,) = torch.autograd.grad(bits.sum(), output, retain_graph=True)
    (of_squared,) = torch.autograd.grad(squared.sum(), output)
    assert bool((of_bits[:, :2] == 0).all()) and bool((of_bits[1:, 2:] != 0).all())
    assert bool((of_squared[:, 2:] == 0).all()) and bool((of_squared[:, :2] != 0).all())


# --- head -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "millions"), [(64, 19.43), (128, 19.49), (256, 19.63), (512, 19.89)])
def test_parameters_of_the_head(dim, millions):
    with torch.device("meta"):
        head = SimpleMLPAdaLN(64, dim, dim // 64)
    assert round(sum(p.numel() for p in head.parameters()) / 1e6, 2) == millions


def test_a_fresh_head_says_nothing_yet():
    head = SimpleMLPAdaLN(8, 6, 3, width=16)
    found = head(torch.randn(4, 8), torch.tensor([0, 1, 2, 999]), torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))
    assert found.shape == (4, 16) and bool((found == 0).all())
    assert 0.5 < float(head.pos_embed.weight.detach().std()) < 1.5  # N(0, 1), not 0.02
    assert float(head.time_embed.mlp[0].weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_time_embedding_equals_the_original_code():
    values = golden("gendd_train", double=True)
    found = time_embedding(values["t"][:4], torch.float64)
    torch.testing.assert_close(found, values["out64_time_emb"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("double", [True, False])
def test_guidance_and_steps_equal_the_original_code(double):
    """The conditional half of the original's doubled batch; the other half is thrown away there."""
    values = golden("gendd_sample", double=double)
    out, relative = ("out64_", 1e-8) if double else ("out_", 1e-4)
    head, process = golden_head(values), GaussianDiffusion(cosine_betas(), respaced(1000, 10))
    half = 12
    z = golden_norm(values)(values["x"]).repeat_interleave(3, dim=0)
    position, index = torch.arange(3).repeat(4), values["step"][:half]
    times = torch.tensor(process.times)[index]

    def guided(state: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        rows = [
            head.guided(state[i : i + 1], at[i : i + 1], z[i : i + 1], position[i : i + 1], 2.0) for i in range(half)
        ]
        return torch.cat(rows)

    state, noise = values["xt"][:half], values["noise"][:half]
    with torch.no_grad():
        output = guided(state, times)
        near(output, values[f"{out}cfg"][:half], relative)
        near(process.ancestral_step(state, output, index, noise), values[f"{out}anc"][:half], relative)
        near(process._prediction(state, output, index)[0], values[f"{out}anc_pred_x0"][:half], relative)
        near(process.ddim_step(state, output, index, noise), values[f"{out}ddim0"][:half], relative)
        near(process.ddim_step(state, output, index, noise, 0.5), values[f"{out}ddim05"][:half], relative)
        last, zero = values["xt2"][:half], torch.zeros(half, dtype=torch.int64)
        output = guided(last, torch.zeros(half, dtype=torch.int64))
        near(process.ancestral_step(last, output, zero, noise), values[f"{out}anc0"][:half], relative)


@pytest.mark.parametrize("double", [True, False])
def test_the_whole_path_equals_the_original_code(double):
    values = golden("gendd_sample", double=double)
    out, relative = ("out64_", 1e-8) if double else ("out_", 1e-4)
    head, process = golden_head(values), GaussianDiffusion(cosine_betas(), respaced(1000, 10))
    shape = (2, 4, 3, 8)  # draws, images, tokens, length
    start = values["start"].view(shape)
    draws = values["path_noise"][:, :24].reshape(10, *shape)
    with torch.no_grad():
        found = sample_features(head, process, golden_norm(values)(values["x"]), start, draws, scale=2.0)
        near(found.reshape(8, 24), values[f"{out}path_feature"], relative)
        logits = golden_classifier(values, "m.classifier")(found.mean(dim=0))
        near(logits, values[f"{out}path_logits"], relative)
        near(golden_classifier(values, "m.model.fc")(values["x"]), values[f"{out}fc_logits"], 1e-6)


def test_one_index_for_all_rows_is_the_same_as_an_index_for_each():
    process = GaussianDiffusion(cosine_betas(), respaced(1000, 10))
    draw = torch.Generator().manual_seed(2)
    state, noise = (torch.randn(4, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    output = torch.randn(4, 6, generator=draw, dtype=torch.float64)
    for at in (0, 3, 9):
        rows = torch.full((4,), at)
        for step in (process.ancestral_step, process.ddim_step):
            torch.testing.assert_close(step(state, output, at, noise), step(state, output, rows, noise))


def test_guidance_one_needs_no_second_branch():
    head = golden_head(golden("gendd_train"))
    calls: list[int] = []
    head.input_proj.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    state, z, position = torch.randn(6, 8), torch.randn(6, 6), torch.arange(3).repeat(2)
    one, two = (head.guided(state, torch.tensor([7]), z, position, scale) for scale in (1.0, 2.0))
    assert calls == [6, 12]
    empty = head(state, torch.tensor([7]), torch.zeros_like(z), position)
    torch.testing.assert_close(two[:, :8], 2 * one[:, :8] - empty[:, :8])
    torch.testing.assert_close(two[:, 8:], one[:, 8:])


def test_autocast_does_not_touch_the_head():
    head = golden_head(golden("gendd_train"))
    given = torch.randn(6, 8), torch.tensor([7]), torch.randn(6, 6), torch.arange(3).repeat(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(*given)
    assert torch.equal(found, head(*given)) and found.dtype == torch.float32


# --- deployed network -------------------------------------------------------------------------------------------------


SETTINGS = {
    "token_dim": 8, "cond_dim": 64, "feature_dim": 24, "width": 16, "depth": 1, "num_classes": 5, "bias": True,
    "steps": 4, "samples": 2, "guidance": 2.0, "eta": None, "seed": 3,
}  # fmt: skip


@pytest.fixture
def network():
    torch.manual_seed(0)
    made = GenDDNetwork.empty(build_model("resnet8", num_classes=5), SETTINGS).eval()
    for parameter in made.head.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made.requires_grad_(False)


def test_the_deployed_network_is_a_function_of_the_image(network):
    images = torch.randn(4, 3, 32, 32)
    before = torch.random.get_rng_state()
    logits = network(images)
    assert torch.equal(before, torch.random.get_rng_state()) and not network.student.fc._forward_pre_hooks
    assert logits.shape == (4, 5) and not torch.equal(logits[0], logits[1])
    near(network(images[2:3]), logits[2:3], 1e-5)
    copied = copy.deepcopy(network)
    assert torch.equal(copied(images), logits)
    other = GenDDNetwork.empty(network.student, {**SETTINGS, "seed": 4}).eval()
    other.load_state_dict(network.state_dict())
    assert not torch.equal(other(images), logits)


def test_the_deployed_network_by_its_parts(network):
    images = torch.randn(2, 3, 32, 32)
    kept = []
    handle = network.student.fc.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    network.student(images)
    handle.remove()
    z = network.norm(kept[0])
    draw = torch.Generator().manual_seed(3)
    start, *draws = torch.randn(5, 2, 24, generator=draw).view(5, 2, 1, 3, 8)
    logits = torch.zeros(2, 5)
    for image in range(2):
        for sample in range(2):
            tokens = []
            for c in range(3):
                state, position = start[sample, :, c], torch.tensor([c])
                for step, at in enumerate(reversed(range(4))):
                    times = torch.tensor([network.process.times[at]])
                    output = network.head.guided(state, times, z[image : image + 1], position, 2.0)
                    state = network.process.ancestral_step(state, output, at, draws[step][sample, :, c])
                tokens.append(state)
            logits[image] += network.classifier(torch.cat(tokens, dim=1))[0] / 2
    near(network(images), logits, 1e-4)


def test_rebuilt_from_settings_and_state(network):
    images = torch.randn(2, 3, 32, 32)
    again = GenDDNetwork.empty(build_model("resnet8", num_classes=5), dict(SETTINGS)).eval()
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(images), network(images))
    assert "noise" not in network.state_dict()


def test_images_may_be_laid_out_channels_last(network):
    images = torch.randn(2, 3, 32, 32)
    logits = network(images)
    moved = network.to(memory_format=torch.channels_last)
    near(moved(images.contiguous(memory_format=torch.channels_last)), logits, 1e-4)


def test_the_deployed_network_can_be_exported(network):
    """For any number of images: nothing in it hangs on the size of the batch."""
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    with torch.no_grad():
        program = torch.export.export(network, (torch.randn(2, 3, 32, 32),), dynamic_shapes=shapes).module()
        for count in (1, 5):
            images = torch.randn(count, 3, 32, 32)
            near(program(images), network(images), 1e-5)


# --- cost -------------------------------------------------------------------------------------------------------------


def test_cost_of_a_network_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 7)).train()
    state = copy.deepcopy(net.state_dict())
    assert network_cost(net, (3, 8, 8)) == {
        "params": 4 * 27 + 4 + 8 + 7 * 256 + 7,
        "flops": 2 * (64 * 4 * 27 + 256 * 7),
    }
    assert net.training and all(
        torch.equal(a, b) for a, b in zip(state.values(), net.state_dict().values(), strict=True)
    )


def test_cost_of_the_deployed_network_counts_every_pass(network):
    alone, whole = network_cost(network.student, (3, 32, 32)), network_cost(network, (3, 32, 32))
    head, rows, width = network.head, 2 * 3 * 2, 16  # samples x tokens x branches of the guidance
    per_row = 2 * (64 * width + 8 * width + 2 * width**2 + 3 * width**2 + 2 * width**2 + 16 * width)
    per_step = rows * per_row + 2 * (256 * width + width**2)  # the time is embedded once for all rows
    assert whole["flops"] == alone["flops"] + 4 * per_step + 2 * 24 * 5
    extra = sum(p.numel() for part in (head, network.norm, network.classifier) for p in part.parameters())
    assert whole["params"] == alone["params"] + extra
