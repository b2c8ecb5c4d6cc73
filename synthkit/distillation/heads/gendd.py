"""GenDD's networks: the conditioned MLP that predicts noise, and the student that is deployed with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from synthkit.distillation.heads import settings as settings_of
from synthkit.distillation.heads.gaussian_diffusion import GaussianDiffusion, cosine_betas, respaced
from synthkit.errors import ModelError

TRAINED = 1000  # steps of the process that the head is trained on
_FREQUENCIES = 128
_LONGEST = 10_000.0


def time_embedding(times: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, 256): cosines, then sines, of the times 0..999 at 128 frequencies from 1 down to 1/10000."""
    rates = torch.arange(_FREQUENCIES, device=times.device, dtype=dtype)
    angles = times.to(dtype)[:, None] * torch.exp(-math.log(_LONGEST) / _FREQUENCIES * rates)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """No autocast on the device of `like` (some, as "meta", know none)."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class _Time(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, times: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(time_embedding(times, dtype))


class _Block(nn.Module):
    """Residual MLP whose input, and whose share in the sum, depend on the condition."""

    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(condition).chunk(3, dim=-1)
        return x + gate * self.mlp(_modulated(self.in_ln(x), shift, scale))


class _Final(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(_modulated(self.norm_final(x), shift, scale))


class SimpleMLPAdaLN(nn.Module):
    """Noise and variance of one token, from its noisy state, the time, the student's feature and its position.

    `y = time(t) + cond(z) + pos[c]` modulates `depth` residual blocks and the output. Parameters keep the names of the
    released checkpoints (`diffloss.net.*`). Computed in the type of its weights also under autocast: bf16 would lose
    the small times.

    Args:
        token_dim: length of a token; the output has twice that.
        cond_dim: length of the student's feature.
        tokens: number of positions.
    """

    def __init__(self, token_dim: int, cond_dim: int, tokens: int, *, width: int = 1024, depth: int = 3):
        super().__init__()
        self.token_dim, self.cond_dim, self.tokens = token_dim, cond_dim, tokens
        self.time_embed = _Time(width)
        self.cond_embed = nn.Linear(cond_dim, width)
        self.pos_embed = nn.Embedding(tokens, width)  # stays at torch's N(0, 1)
        self.input_proj = nn.Linear(token_dim, width)
        self.res_blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.final_layer = _Final(width, 2 * token_dim)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for at in (0, 2):
            nn.init.normal_(self.time_embed.mlp[at].weight, std=0.02)  # type: ignore[arg-type]  # a Linear
        for part in [*self.res_blocks, self.final_layer]:  # every block starts as the identity, the output as 0
            nn.init.zeros_(part.adaLN_modulation[1].weight)  # type: ignore[index]  # a Sequential
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, state: Tensor, times: Tensor, condition: Tensor, position: Tensor) -> Tensor:
        """Noise and v of every row.

        Shapes: `state` (N, token_dim), `times` (N,) or (1,) for all rows, `condition` (N, cond_dim), `position` (N,)
        int64; returns (N, 2 token_dim).
        """
        dtype = self.input_proj.weight.dtype
        with full_precision(state):
            x = self.input_proj(state.to(dtype))
            y = self.time_embed(times, dtype) + self.cond_embed(condition.to(dtype)) + self.pos_embed(position)
            for block in self.res_blocks:
                x = block(x, y)
            return self.final_layer(x, y)

    def guided(self, state: Tensor, times: Tensor, condition: Tensor, position: Tensor, scale: float) -> Tensor:
        """As `forward` at one time (1,), with classifier-free guidance: the noise is `eps_0 + scale (eps_z - eps_0)`.

        The empty condition is z = 0, the variance is that of the conditional branch. At scale 1 the other branch drops
        out and is not computed.
        """
        if scale == 1.0:
            return self(state, times, condition, position)
        both = torch.cat([condition, torch.zeros_like(condition)])
        given, empty = self(state.repeat(2, 1), times, both, position.repeat(2)).unflatten(0, (2, -1)).unbind()
        noise, place = given.chunk(2, dim=-1)
        base = empty[:, : self.token_dim]
        return torch.cat([base + scale * (noise - base), place], dim=-1)


def sample_features(
    head: SimpleMLPAdaLN,
    process: GaussianDiffusion,
    condition: Tensor,
    start: Tensor,
    draws: Sequence[Tensor] | Tensor,
    *,
    scale: float = 2.0,
    eta: float | None = None,
) -> Tensor:
    """Teacher features from the student's: ancestral (`eta` none) or DDIM sampling with guidance.

    Shapes: `condition` (B, d) after the LayerNorm; `start` (S, B, C, tok) and `draws` (N, S, B, C, tok), standard
    normal, with S samples, C tokens and N steps (B may be 1: the same noise for every image); returns (S, B, C tok).
    """
    samples, tokens, size = start.shape[0], head.tokens, condition.shape[0]
    shape = (samples, size, tokens, head.token_dim)
    z = condition.expand(samples, size, -1).reshape(-1, condition.shape[-1]).repeat_interleave(tokens, dim=0)
    position = torch.arange(tokens, device=condition.device).repeat(samples * size)

    def predict(state: Tensor, time: Tensor) -> Tensor:
        return head.guided(state.reshape(-1, head.token_dim), time, z, position, scale)

    def rows(x: Tensor) -> Tensor:
        return x.to(z.dtype).expand(shape).reshape(-1, head.token_dim)

    state = rows(start)
    for step, draw in enumerate(draws):  # drawn noise is spread over the images one step at a time
        state = process.step(predict, state, len(process) - 1 - step, rows(draw), eta=eta)
    return state.view(samples, size, -1)


_SETTINGS = ("token_dim", "cond_dim", "feature_dim", "width", "depth", "num_classes", "steps", "samples")


def check_settings(settings: dict[str, Any]) -> None:
    """Raise `ModelError` unless these can be the settings of a deployed network."""
    settings_of.check_settings("gendd", settings, _SETTINGS, ("bias", "guidance", "eta", "seed"))
    numbers = {name: settings[name] for name in _SETTINGS}
    eta, seed = settings["eta"], settings["seed"]
    others = isinstance(settings["guidance"], int | float) and (eta is None or isinstance(eta, int | float))
    if not others or type(seed) is not int or not 0 <= seed < 2**63 or not isinstance(settings["bias"], bool):
        raise ModelError("head gendd: settings that are not numbers", got=settings)
    if settings["feature_dim"] % settings["token_dim"] or not 2 <= settings["steps"] <= TRAINED:
        raise ModelError("head gendd: token_dim divides feature_dim, steps are 2 to 1000", got=numbers)


class GenDDNetwork(nn.Module):
    """What GenDD deploys: normalised images -> student feature -> sampled teacher feature -> teacher classifier.

    `logits = W mean_s x^(s) + b`, `x^(s)` the s-th feature sampled from the head given `LN(f)`. The noise is drawn
    once, from `seed`, and is the same for every image: the network is a function of the image, whatever stands
    beside it in the batch, and can be exported. Another seed is another draw.

    Shapes: images (B, C, H, W); returns (B, K).

    Source: jiequancui/Generative-Distribution-Distillation@9246d0b (`forward_test_stage2`).
    Differs from source: there every image has noise of its own, drawn anew at every call.
    A head that was trained briefly gives features that are far too large: at t = 999 an error of the noise enters
    `x_0` 20,000-fold, and nothing is clipped (as published). The class survives that, the confidence does not.
    Cost: `steps` x 2 (guidance) x tokens x samples passes of the MLP for each image.
    """

    def __init__(
        self,
        student: nn.Module,
        norm: nn.LayerNorm,
        head: SimpleMLPAdaLN,
        classifier: nn.Linear,
        *,
        steps: int = 100,
        samples: int = 5,
        guidance: float = 2.0,
        eta: float | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.student, self.norm, self.head, self.classifier = student, norm, head, classifier
        self.process = GaussianDiffusion(cosine_betas(TRAINED), respaced(TRAINED, steps))
        self.guidance, self.eta = guidance, eta
        # the start and one draw per step; three dimensions: a fourth could be laid out channels-last with the images
        drawn = torch.randn(
            steps + 1, samples, head.tokens * head.token_dim, generator=torch.Generator().manual_seed(seed)
        )
        self.register_buffer("noise", drawn.to(head.input_proj.weight.device), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        feature = self.feature(images).to(self.norm.weight.dtype)
        with full_precision(feature):
            start, *draws = self.get_buffer("noise").unflatten(-1, (1, self.head.tokens, self.head.token_dim))
            sampled = sample_features(
                self.head, self.process, self.norm(feature), start, draws, scale=self.guidance, eta=self.eta
            )
            return self.classifier(sampled.mean(dim=0))

    def feature(self, images: Tensor) -> Tensor:
        """(B, d): what the student's last linear layer is given."""
        kept: list[Tensor] = []
        layers = [m for m in self.student.modules() if isinstance(m, nn.Linear)]
        handle = layers[-1].register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        try:
            self.student(images)
        finally:
            handle.remove()
        return kept[0].flatten(1)

    @classmethod
    def empty(cls, student: nn.Module, settings: dict[str, Any]) -> GenDDNetwork:
        """The network of `settings` (see `GenDD.deployed_settings`) with fresh weights around `student`.

        Raises:
            ModelError: a setting is missing or not possible (they come from a file).
        """
        check_settings(settings)
        head = SimpleMLPAdaLN(
            settings["token_dim"],
            settings["cond_dim"],
            settings["feature_dim"] // settings["token_dim"],
            width=settings["width"],
            depth=settings["depth"],
        )
        classifier = nn.Linear(settings["feature_dim"], settings["num_classes"], bias=settings["bias"])
        sampling = {key: settings[key] for key in ("steps", "samples", "guidance", "eta", "seed")}
        return cls(student, nn.LayerNorm(settings["cond_dim"]), head, classifier.requires_grad_(False), **sampling)
