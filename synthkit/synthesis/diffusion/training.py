"""`synthkit teach --arch unet`: a small class-conditional diffusion model, trained on real data.

x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) n with t uniform and n ~ N(0, I); the network predicts n (epsilon), or
v = sqrt(abar_t) n - sqrt(1 - abar_t) x_0, under the mean squared error. A share of the labels is replaced by the null
class, so that one network gives p(x | y) and p(x) (classifier-free guidance). What is kept is a moving average of the
weights. The trainer of the house drives it, so it is resumed like any teacher.

Source: Ho et al., "Denoising diffusion probabilistic models" (2020, arXiv 2006.11239); cosine schedule of Nichol &
Dhariwal (2021, arXiv 2102.09672); v of Salimans & Ho (2022, arXiv 2202.00512); label drop of Ho & Salimans (2022,
arXiv 2207.12598). The network is `UNet2DModel` of diffusers; no code was taken.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from synthkit.config.schema import TeachConfig
from synthkit.data.specs import parse_spec
from synthkit.distillation.contract import Batch
from synthkit.distillation.outputs import check_out, finish_run, start_run
from synthkit.distillation.protocols import Plan, teach_plan
from synthkit.distillation.sources import stream_seed, torch_generator
from synthkit.distillation.teach import TeachResult, constants_of, load_training_data, training_source
from synthkit.distillation.trainer import Trainer
from synthkit.errors import ConfigError
from synthkit.models.view import ModelView, TeacherView
from synthkit.models.weights import count_parameters
from synthkit.runtime import RunDir, Runtime
from synthkit.synthesis.base import seeded_init
from synthkit.synthesis.diffusion.card import CARD, DiffusionCard

if TYPE_CHECKING:
    from synthkit.data.real import RealData

STEPS = 2500
CLIP = 1.0  # gradient norm
GROUPS = 8  # of GroupNorm, and channels of an attention head: divides every channel count
HELD_OUT = 500  # test images on which the denoising loss is reported


class Denoiser(nn.Module):
    """The network in training and the moving average of its weights, as one module with one state."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.average = copy.deepcopy(network).requires_grad_(False)

    def forward(self, noisy: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        """Prediction (B, C, H, W) for noisy images (B, C, H, W) at times (B,) with labels (B,)."""
        return self.network(noisy, times, class_labels=labels).sample

    @torch.no_grad()
    def follow(self, step: int, decay: float) -> None:
        """Move the average towards the weights after `step` updates; the first ones count more, so it starts right."""
        kept = min(decay, (1 + step) / (10 + step))
        for average, weight in zip(self.average.parameters(), self.network.parameters(), strict=True):
            average.lerp_(weight, 1 - kept)


def unet_config(cfg: TeachConfig, size: tuple[int, int, int], num_classes: int) -> dict[str, Any]:
    """Arguments of `UNet2DModel` for images of `size`: a preset by image size, or the channels that are given.

    Presets: up to 16 pixels (32, 64); grey up to 40 (16, 32, 64); else 32, 64, 128, ... with two layers a level, until
    the coarsest level has at most 8 pixels a side. Attention at the coarsest level.

    Raises:
        ConfigError: the channels or the image size do not fit.
    """
    channels, side = size[0], size[1]
    if cfg.unet_channels is not None:
        widths = tuple(cfg.unet_channels)
    elif side <= 16:
        widths = (32, 64)
    elif channels == 1 and side <= 40:
        widths = (16, 32, 64)
    else:
        levels = max(3, (side - 1).bit_length() - 2)
        widths = tuple(min(32 * 2**level, 256) for level in range(levels))
    # time and class are added per channel: a group of a single channel would normalise them away
    if not widths or any(width < 2 * GROUPS or width % GROUPS for width in widths):
        raise ConfigError(f"unet_channels must be multiples of {GROUPS}, at least {2 * GROUPS}", got=widths)
    if side % 2 ** (len(widths) - 1):
        raise ConfigError(
            f"a UNet of {len(widths)} levels needs a side that is a multiple of {2 ** (len(widths) - 1)}",
            got=side,
            hint="choose another --image_size, or fewer --unet_channels",
        )
    plain = len(widths) - 1
    return {
        "sample_size": side,
        "in_channels": channels,
        "out_channels": channels,
        "layers_per_block": 1 if channels == 1 else 2,
        "block_out_channels": widths,
        "down_block_types": ("DownBlock2D",) * plain + ("AttnDownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
        "norm_num_groups": GROUPS,
        "attention_head_dim": GROUPS,
        "num_class_embeds": num_classes + 1,  # the last row is "no class"
    }


def scheduler_for(prediction: Literal["v_prediction", "epsilon"]) -> Any:
    """The noise schedule: cosine, 1,000 steps. The spacing is explicit, since other schedulers inherit or forget it.

    A network that predicts noise knows nothing at the last time (abar 2e-9), so sampling must begin earlier (leading);
    one that predicts v can begin there (trailing).
    """
    from diffusers import DDPMScheduler  # type: ignore[attr-defined]  # lazy module

    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction,
        timestep_spacing="trailing" if prediction == "v_prediction" else "leading",
        clip_sample=True,
    )


def noised(images: Tensor, noise: Tensor, abar: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """(x_t, what the network should say) of clean images and noise (B, C, H, W) at signal shares `abar` (B,)."""
    signal, spread = abar.sqrt().view(-1, 1, 1, 1), (1 - abar).sqrt().view(-1, 1, 1, 1)
    target = noise if prediction == "epsilon" else signal * noise - spread * images
    return signal * images + spread * noise, target


def check_config(cfg: TeachConfig) -> TeachConfig:
    """`cfg` with the defaults of a diffusion model.

    Raises:
        ConfigError: a setting that only classifiers have, or a value out of range.
    """
    if cfg.label_smoothing:
        raise ConfigError("teach --arch unet: label_smoothing is a setting of classifiers", got=cfg.label_smoothing)
    for name in ("unet_label_drop", "unet_ema"):
        if not 0 <= getattr(cfg, name) < 1:
            raise ConfigError(f"{name} must be in [0, 1)", got=getattr(cfg, name))
    return replace(
        cfg,
        steps=STEPS if cfg.epochs is None and cfg.steps is None else cfg.steps,
        lr=1e-3 if cfg.lr is None else cfg.lr,
        optimizer=cfg.optimizer or "adamw",
        weight_decay=0.01 if cfg.weight_decay is None else cfg.weight_decay,
        augment="none" if cfg.augment == "auto" else cfg.augment,  # a shifted digit would be painted shifted
    )


def teach_unet(given: TeachConfig) -> TeachResult:
    """Train a `UNet2DModel` on `given.data`; resumable; the averaged weights of the last step are kept.

    Writes `unet/`, `scheduler/` and `model_index.json` (as diffusers' pipelines read them), `diffusion.json` (classes,
    image size, null class), `metrics.jsonl`, `run.json` and `result.json`.

    Raises:
        UsageError: data that cannot be read, sizes that do not fit, an output directory that is not empty.
        NonFiniteError: the loss became NaN.
    """
    cfg = check_config(given)
    kind = parse_spec(cfg.data)[0]
    path = Path(cfg.out) if cfg.out else Path("teachers") / f"unet-{kind}"
    found = check_out(path, cfg, resume=cfg.resume)
    if found is not None and found.get("status") == "done":
        return TeachResult(path=path, card=path / CARD, metrics=RunDir(path).read_json("result.json"))
    began, cpu = time.monotonic(), time.process_time()
    train, test = load_training_data(cfg, "unet")
    plan = teach_plan(cfg, train.shape[0])
    shape = unet_config(cfg, train.shape, train.num_classes)
    runtime = Runtime.create(cfg.runtime, run_dir=path)
    source = training_source(cfg, plan, train, runtime)
    run = start_run(path, cfg, runtime, command="teach", plan=plan.to_dict(), seed=cfg.seed, world=runtime.world)
    job = Job(cfg, shape, train, test, runtime)
    _announce(runtime, train, plan, job)
    trainer = Trainer(
        runtime=runtime, view=job.view, objective=job.objective, source=source, plan=plan, run_dir=run,
        seed=cfg.seed, description="teach unet", on_epoch=job.evaluate, eval_every=cfg.eval_every,
    )  # fmt: skip
    job.trainer = trainer
    weights = [p for p in trainer.network.parameters() if p.requires_grad]

    def clip(*_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(weights, CLIP)

    trainer.optimizer.register_step_pre_hook(clip)
    if found is not None:
        trainer.restore()
    metrics = trainer.fit()
    job.denoiser.follow(trainer.step, cfg.unet_ema)
    if runtime.is_main:
        card = _card(cfg, kind, train, metrics)
        save_pipeline(path, job.denoiser.average, job.scheduler, card)
        spent = time.process_time() - cpu if found is None else None  # known for an unbroken run only
        metrics |= {"kind": "teach-unet", "arch": "unet", "data": cfg.data, "cpu_seconds": spent}
        run.write_json("result.json", metrics)
        finish_run(run, seconds=metrics["seconds"], wall_seconds=time.monotonic() - began)
        trainer.state.clear()
    runtime.accelerator.wait_for_everyone()
    return TeachResult(path=path, card=path / CARD, metrics=metrics)


class Job:
    """What the trainer calls: the loss of a batch, and the loss on test images."""

    trainer: Trainer

    def __init__(
        self, cfg: TeachConfig, shape: dict[str, Any], train: RealData, test: RealData | None, runtime: Runtime
    ):
        from diffusers import UNet2DModel  # type: ignore[attr-defined]  # lazy module

        self.cfg, self.runtime, self.test, self.null = cfg, runtime, test, train.num_classes
        network = seeded_init(lambda: UNet2DModel(**shape), stream_seed(cfg.seed, "weights"))
        self.denoiser = Denoiser(network)
        half = [0.5] * train.shape[0]  # (x - 0.5) / 0.5 maps [0, 1] to [-1, 1]
        self.view = ModelView(
            self.denoiser, half, half, input_size=train.shape, num_classes=train.num_classes,
            class_names=train.class_names, name="unet",
        )  # fmt: skip
        self.scheduler = scheduler_for(cfg.unet_prediction)
        self.abar = self.scheduler.alphas_cumprod.to(runtime.device)

    def objective(self, view: ModelView, batch: Batch) -> dict[str, Tensor]:
        """The mean squared error of the prediction; the average follows the weights of the step before."""
        step = self.trainer.step
        self.denoiser.follow(step, self.cfg.unet_ema)
        draw = torch_generator(self.cfg.seed, "noise", step, self.runtime.rank)
        assert batch.labels is not None  # real data is labelled
        dropped = torch.rand(len(batch.labels), generator=draw) < self.cfg.unet_label_drop
        labels = batch.labels.masked_fill(dropped.to(batch.labels.device), self.null)
        return {"loss": self._error(view.module, view.normalize(batch.images), labels, draw)}

    def _error(self, network: nn.Module, images: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
        times = torch.randint(len(self.abar), (len(images),), generator=draw).to(images.device)
        noise = torch.randn(images.shape, generator=draw).to(images.device)
        noisy, target = noised(images, noise, self.abar[times], self.cfg.unet_prediction)
        if self.runtime.channels_last:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        return (network(noisy, times, labels).float() - target).square().mean()

    @torch.no_grad()
    def evaluate(self, epoch: int, frozen: TeacherView) -> dict[str, Any]:
        """The averaged network's loss on a fixed draw of test images, times and noise."""
        if self.test is None:
            return {}
        average = Denoiser(frozen.module.average)  # type: ignore[arg-type]  # a copy of this denoiser
        chosen = self.test.subset(HELD_OUT, self.cfg.seed)
        draw, losses = torch_generator(self.cfg.seed, "subset", 1), []
        for images, labels in chosen.batches(100):
            clean = frozen.normalize(images.to(self.runtime.device))
            losses.append(self._error(average, clean, labels.to(self.runtime.device), draw))
        return {"test_loss": float(torch.stack(losses).mean())}


def save_pipeline(path: Path, network: Any, scheduler: Any, card: DiffusionCard) -> None:
    """Write a pixel-space model as diffusers reads it (a `DDPMPipeline`: here only a container), then its card."""
    from diffusers import DDPMPipeline  # type: ignore[attr-defined]  # lazy module

    DDPMPipeline(unet=network, scheduler=scheduler).save_pretrained(str(path), safe_serialization=True)
    RunDir(path).write_json(CARD, card.to_dict())


def _card(cfg: TeachConfig, kind: str, train: RealData, metrics: dict[str, Any]) -> DiffusionCard:
    mean, std = constants_of(kind, train)
    steps = metrics["steps"]
    return DiffusionCard(
        image_size=train.shape,
        class_names=list(train.class_names),
        mean=mean,
        std=std,
        null_class=train.num_classes if cfg.unet_label_drop else None,
        source=f"synthkit teach --arch unet --data {cfg.data} --steps {steps} --seed {cfg.seed}",
        extra={"train_images": len(train), "steps": steps, "data": kind},
    )


def _announce(runtime: Runtime, train: RealData, plan: Plan, job: Job) -> None:
    parameters = count_parameters(job.denoiser.network)
    runtime.say(
        f"teach unet ({parameters / 1e6:.2f} M parameters, {job.cfg.unet_prediction}) on {train.name} {train.split}: "
        f"{len(train):,} images of {train.shape}, {train.num_classes} classes"
    )
    runtime.say(f"  {plan.describe()}; {runtime.describe()}")
