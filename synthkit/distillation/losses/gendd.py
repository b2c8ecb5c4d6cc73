"""GenDD: the student's feature conditions a diffusion model of the teacher's feature."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from synthkit.distillation.contract import Batch, Loss, LossNeeds, Setup, Taps
from synthkit.distillation.losses import gendd_rows as rows
from synthkit.distillation.losses.simkd import sharing
from synthkit.errors import ConfigError
from synthkit.lazy import np, torch
from synthkit.logits import ce_per_sample

if TYPE_CHECKING:
    from torch import Tensor, nn


class GenDD(Loss):
    """Generative distribution distillation (`--loss gendd`; deploys its head and the teacher's classifier).

    `L = mean_r [ |eps^ - eps|^2 / n + VB ] + CE(fc(sg f), y)`. The head predicts, from a token of n numbers noised to
    x_t (t uniform, cosine schedule, T = 1000), t, the token's position and `z = LN(f)` of the student's feature f, the
    noise and its variance (VB: variational bound in bits). Tokens are cut from the contracted teacher feature
    `(1 - lambda) x + lambda W_y`, W the teacher's classifier; each is taken R times; z is 0 with probability `drop`.
    The cross-entropy teaches the student's own classifier only: the backbone learns from the diffusion alone.

    Shapes: pooled features (B, d) of the student, (B, D) of the teacher, D a multiple of `token_dim`; both values (B,).

    Source: jiequancui/Generative-Distribution-Distillation@9246d0b (GenDD_cifar: models/diff_model.py, diffloss.py).
    Differs from source: the noise of sampling is drawn once, the same for all images (see `GenDDNetwork`); 5 samples
    are averaged at every evaluation (released: 1 while training); beta2 follows the share of the run. `lr: step` has
    the released warm-up and its quirk, the default leaves the rate to the protocol. As released: no weight decay on
    the head, the plan's on the LayerNorm. Stage 1 of the source trains the backbone through the teacher's frozen
    classifier; here the student may come from any file.
    Cost: R D / n passes of the 19.5 M-parameter head (`width` 1024) for each image and step; with several processes
    each computes those of the whole batch, so that any number of them gives the same student.
    """

    requires = LossNeeds(
        labels=True,
        live_teacher=True,
        student=("pooled",),
        teacher=("pooled",),
        teacher_classifier=True,
        relational=True,  # its draws belong to rows of the global batch, and `mix` pairs them
        deploys=True,
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of GenDD."""

        supervised: bool = True
        """Contract by the labels and train the student's classifier on them; false needs no labels, does neither and
        leaves the student's classifier as it is (CC3M)."""
        contraction: float = 0.9
        """lambda: share of the label's row of the teacher's classifier in the target (0.7 to 0.9 by pair)."""
        repeats: int = 30
        """R: times and noises drawn for every sample (10 on ImageNet)."""
        drop: float = 0.2
        """Probability with which a row's condition is set to 0, for guidance."""
        mix: float = 0.0
        """beta: above 0, features and targets are mixed with another sample's by a share from Beta(beta, beta)."""
        token_dim: int = 64
        """Length of a token; divides the teacher's feature."""
        width: int = 1024
        """Width of the head."""
        depth: int = 3
        """Residual blocks of the head."""
        beta2: tuple[float, float] = (0.95, 0.999)
        """beta2 of Adam at the start and at the end, along a cosine (ImageNet starts at 0.96)."""
        lr: Literal["plan", "step", "cosine"] = "plan"
        """plan leaves the rate to the protocol; the others multiply it by `released_rate` (with schedule constant)."""
        lr_warmup: int = 50
        """Epochs of the released warm-up."""
        steps: int = 100
        """Sampling steps of the deployed network (64 on ImageNet)."""
        samples: int = 5
        """Sampled features that are averaged before the classifier."""
        guidance: float = 2.0
        """Scale of classifier-free guidance; 1 is none."""
        eta: float | None = None
        """none samples ancestrally, as published; a number is DDIM's eta."""
        sampling_seed: int = 0
        """Seed of the deployed network's noise."""

        def __post_init__(self):
            for name in ("contraction", "drop"):
                if not 0 <= getattr(self, name) <= 1:
                    raise ConfigError(f"loss.{name} must lie in [0, 1]", got=getattr(self, name))
            for name in ("repeats", "token_dim", "width", "depth", "samples", "lr_warmup"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"loss.{name} must be at least 1", got=getattr(self, name))
            if not 2 <= self.steps <= 1000:
                raise ConfigError("loss.steps must lie between 2 and 1000", got=self.steps)
            if not (self.mix >= 0 and (self.eta is None or 0 <= self.eta <= 1)):
                raise ConfigError("loss.mix must be 0 or more, loss.eta in [0, 1]", got=(self.mix, self.eta))
            if len(self.beta2) != 2 or not all(0 < value < 1 for value in self.beta2):
                raise ConfigError("loss.beta2 needs two numbers between 0 and 1", got=self.beta2)
            if self.lr not in ("plan", "step", "cosine"):
                raise ConfigError("loss.lr: not known", got=self.lr, allowed=["plan", "step", "cosine"])

    def __init__(self, config: Config | None = None):
        super().__init__(config)
        if not self.config.supervised:
            self.requires = replace(type(self).requires, labels=False)

    def setup(self, setup: Setup) -> None:
        from synthkit.distillation.heads.gaussian_diffusion import GaussianDiffusion, cosine_betas
        from synthkit.distillation.heads.gendd import SimpleMLPAdaLN
        from synthkit.models.init import seeded

        c, wide = self.config, setup.teacher.pooled
        if wide % c.token_dim:
            fits = max(n for n in range(1, min(c.token_dim, wide) + 1) if wide % n == 0)
            raise ConfigError(
                f"loss.token_dim must divide the teacher's feature of {wide}", got=c.token_dim, hint=f"use {fits}"
            )
        classifier, self.plain, self.epochs = setup.teacher_classifier, setup.student_classifier, setup.epochs
        if classifier is None or (c.supervised and self.plain is None):
            raise ConfigError("loss gendd needs the last linear layer of teacher and student", hint="another network")
        self.classifier = classifier
        self.process = GaussianDiffusion(cosine_betas())
        with seeded(setup.seed):
            norm = torch.nn.LayerNorm(setup.student.pooled)
            head = SimpleMLPAdaLN(c.token_dim, setup.student.pooled, wide // c.token_dim, width=c.width, depth=c.depth)
        self.aux = torch.nn.ModuleDict({"norm": norm, "head": head})

    def __call__(self, student: Taps, teacher: Taps, batch: Batch) -> dict[str, Tensor]:
        c, aux = self.config, cast("Any", self.aux)
        assert student.pooled is not None and teacher.pooled is not None and batch.draw is not None  # the trainer's
        labels = batch.labels if c.supervised else None
        feature = student.pooled.float()
        with torch.autocast(feature.device.type, enabled=False):  # as published: fp32 throughout
            z = aux["norm"](feature)
            centres = self.classifier.weight.detach().float()
            target = rows.contract(teacher.pooled.float(), centres, labels, c.contraction)
            draw = batch.draw("gendd")
            if c.mix > 0:
                seed = int(torch.randint(2**62, (1,), generator=draw))
                share = np.random.default_rng(seed).beta(c.mix, c.mix)
                order = torch.randperm(len(z), generator=draw).to(z.device)
                z, target = rows.mixed(z, share, order), rows.mixed(target, share, order)
            tokens, beside, position = rows.tokenised(target, z, c.token_dim, c.repeats)
            index = torch.randint(len(self.process), (len(tokens),), generator=draw)
            # the noise is drawn where it is used: it is the bulk of the numbers
            here = torch.Generator(tokens.device).manual_seed(int(torch.randint(2**62, (1,), generator=draw)))
            noise = torch.randn(tokens.shape, generator=here, device=tokens.device)
            beside = rows.dropped(beside, torch.rand(len(tokens), generator=here, device=tokens.device), c.drop)
            found = rows.diffusion_loss(aux["head"], self.process, (tokens, beside, position), index, noise)
            values = {"gendd": found.view(c.repeats, len(z), -1).mean(dim=(0, 2))}
            if labels is not None:
                values["gendd_ce"] = ce_per_sample(cast("Any", self.plain)(feature.detach()), labels)
        return values

    def parameter_groups(self, student: nn.Module) -> list[dict[str, Any]]:
        """Decay as released: none on the head; the plan's on everything else, the LayerNorm too."""
        aux = cast("Any", self.aux)
        idle = set() if self.config.supervised or self.plain is None else set(self.plain.parameters())
        decayed = [p for p in (*student.parameters(), *aux["norm"].parameters()) if p.requires_grad and p not in idle]
        return [{"params": decayed}, {"params": list(aux["head"].parameters()), "weight_decay": 0.0}]

    def on_step(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
        """beta2 of Adam, where the optimiser has one, and the released rate."""
        c = self.config
        for group in optimizer.param_groups:
            if "betas" in group:
                group["betas"] = (group["betas"][0], rows.beta2_at(progress, *c.beta2))
            if c.lr != "plan":
                group["lr"] *= rows.released_rate(
                    math.floor(progress * self.epochs) + 1, self.epochs, c.lr, c.lr_warmup
                )

    def deploy(self, student: nn.Module) -> nn.Module:
        """See `Loss.deploy`."""
        from synthkit.distillation.heads.gendd import GenDDNetwork

        aux = cast("Any", self.aux)
        parts: list[Any] = [sharing(part) for part in (student, aux["norm"], aux["head"], self.classifier)]
        return GenDDNetwork(*parts, **self._sampling()).eval()

    def deployed_settings(self) -> dict[str, Any]:
        """See `Loss.deployed_settings`."""
        c, head = self.config, cast("Any", self.aux)["head"]
        shape = {"cond_dim": head.cond_dim, "feature_dim": self.classifier.in_features}
        shape |= {"num_classes": self.classifier.out_features, "bias": self.classifier.bias is not None}
        return {"token_dim": c.token_dim, "width": c.width, "depth": c.depth, **shape, **self._sampling()}

    def _sampling(self) -> dict[str, Any]:
        c = self.config
        return {"steps": c.steps, "samples": c.samples, "guidance": c.guidance, "eta": c.eta, "seed": c.sampling_seed}

    @classmethod
    def rebuild(cls, student: nn.Module, settings: dict[str, Any]) -> nn.Module:
        """See `Loss.rebuild`."""
        from synthkit.distillation.heads.gendd import GenDDNetwork

        return GenDDNetwork.empty(student, settings).eval()
