"""`synthkit teach`: train a teacher on real data with cross-entropy, and write it as a model with a card."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from synthkit.config.schema import TeachConfig
from synthkit.data.specs import load_data, parse_spec
from synthkit.data.stats import STATS
from synthkit.distillation.contract import Batch
from synthkit.distillation.outputs import check_out, finish_run, save_network, start_run
from synthkit.distillation.protocols import Plan, teach_plan
from synthkit.distillation.sources import RandomOrder, ResidentStore, StoreSource, stream_seed
from synthkit.distillation.trainer import Trainer
from synthkit.errors import ConfigError, DataError
from synthkit.evaluation.metrics import evaluate_classifier, matched
from synthkit.logits import ce_per_sample
from synthkit.models.build import build_model
from synthkit.models.card import ModelCard
from synthkit.models.names import resolve_name
from synthkit.models.view import ModelView, TeacherView
from synthkit.runtime import RunDir, Runtime

if TYPE_CHECKING:
    from synthkit.data.real import RealData


@dataclass(kw_only=True)
class TeachResult:
    """What `teach` made."""

    path: Path
    """The run directory; a model spec of its own."""
    card: Path
    """The model card."""
    metrics: dict[str, Any]
    """The headline: last epoch, accuracy on the test data where there is any."""


def channel_statistics(images: torch.Tensor) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of uint8 images (N, C, H, W), in [0, 1] units, to four digits."""
    total = torch.zeros(images.shape[1], dtype=torch.float64)
    square = torch.zeros_like(total)
    for part in images.split(4096):
        values = part.double().div_(255)
        total += values.sum(dim=(0, 2, 3))
        square += values.square().sum(dim=(0, 2, 3))
    count = images.shape[0] * images.shape[2] * images.shape[3]
    mean = total / count
    std = (square / count - mean.square()).clamp_min(0).sqrt().clamp_min(1e-3)
    return [round(v, 4) for v in mean.tolist()], [round(v, 4) for v in std.tolist()]


def _input_size(cfg: TeachConfig, arch: str, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(C, H, W) that the network is trained on; LeNet takes one channel and 32 x 32."""
    if cfg.image_size is not None:
        if cfg.image_size < 1:
            raise ConfigError("image_size must be at least 1", got=cfg.image_size)
        side = cfg.image_size
    else:
        side = 32 if arch.startswith("lenet") else max(shape[1:])
    return (1 if arch.startswith("lenet") else shape[0], side, side)


def load_training_data(cfg: TeachConfig, arch: str) -> tuple[RealData, RealData | None]:
    train = load_data(cfg.data, "train")
    size = _input_size(cfg, arch, train.shape)
    train = train.resized(size)
    if len(train) < cfg.batch_size:
        raise DataError(
            f"data: {len(train)} training images are fewer than one batch",
            got=cfg.batch_size,
            hint=f"use --batch_size {max(2, len(train))} or less",
        )
    if cfg.eval_data is not None:
        test = load_data(cfg.eval_data, "test", size=size)
    elif train.split == "train":
        try:
            test = load_data(cfg.data, "test", size=size)
        except DataError:  # the training data is fine; it just comes without a test part, which the run says
            test = None
    else:
        test = None
    return train, test


def teach(cfg: TeachConfig) -> TeachResult:
    """Train `cfg.arch` on `cfg.data`; resumable; the last epoch is the result. `unet`: see synthesis/diffusion.

    Writes `model.safetensors`, `card.yaml` (class names, mean and std, accuracy), `metrics.jsonl`, `run.json` and
    `result.json`. Nothing is written when the input is wrong.

    Raises:
        UsageError: unknown architecture, data that cannot be read, an output directory that is not empty.
        NonFiniteError: the loss became NaN.
    """
    if cfg.arch == "unet":
        from synthkit.synthesis.diffusion.training import teach_unet

        return teach_unet(cfg)
    arch = resolve_name(cfg.arch)
    kind = parse_spec(cfg.data)[0]
    path = Path(cfg.out) if cfg.out else Path("teachers") / f"{_file_name(arch)}-{kind}"
    found = check_out(path, cfg, resume=cfg.resume)
    if found is not None and found.get("status") == "done":
        return TeachResult(path=path, card=path / "card.yaml", metrics=RunDir(path).read_json("result.json"))
    began = time.monotonic()
    train, test = load_training_data(cfg, arch)
    plan = teach_plan(cfg, train.shape[0])
    mean, std = constants_of(kind, train)
    network = build_model(
        arch,
        num_classes=train.num_classes,
        in_channels=train.shape[0],
        image_size=train.shape[1],
        seed=stream_seed(cfg.seed, "weights"),
    )
    view = ModelView(
        network,
        mean,
        std,
        input_size=train.shape,
        num_classes=train.num_classes,
        class_names=train.class_names,
        name=arch,
    )
    if test is not None:
        test, said = matched(view, test)
        train.notes += tuple(said)
    runtime = Runtime.create(cfg.runtime, run_dir=path)
    source = training_source(cfg, plan, train, runtime)  # checks the augmentation and the batch size
    run = start_run(path, cfg, runtime, command="teach", plan=plan.to_dict(), seed=cfg.seed, world=runtime.world)
    _announce(runtime, arch, train, test, plan)

    def objective(student: ModelView, batch: Batch) -> dict[str, torch.Tensor]:
        assert batch.labels is not None  # real data is labelled
        logits = student(batch.images).float()
        return {
            "loss": ce_per_sample(logits, batch.labels, cfg.label_smoothing).mean(),
            "train_top1": (logits.detach().argmax(dim=1) == batch.labels).float().mean(),
        }

    def evaluate(epoch: int, frozen: TeacherView) -> dict[str, Any]:
        if test is None:
            return {}
        scores = evaluate_classifier(frozen, test)
        return {key: scores[key] for key in ("top1", "top5", "ece", "nll") if key in scores}

    trainer = Trainer(
        runtime=runtime,
        view=view,
        objective=objective,
        source=source,
        plan=plan,
        run_dir=run,
        seed=cfg.seed,
        description=f"teach {arch}",
        on_epoch=evaluate,
        eval_every=cfg.eval_every,
    )
    if found is not None:
        trainer.restore()
    metrics = trainer.fit()
    length = f"steps {plan.steps}" if plan.steps is not None else f"epochs {plan.epochs}"
    card = ModelCard(
        arch=arch,
        num_classes=train.num_classes,
        input_size=train.shape,
        mean=mean,
        std=std,
        class_names=train.class_names,
        accuracy={f"{test.name} {test.split}": round(metrics["top1"], 6)} if test and "top1" in metrics else None,
        source=f"synthkit teach --arch {arch} --data {cfg.data} --{length} --seed {cfg.seed}",
        extra={"teach": {"train_images": len(train), "augment": plan.augment, "steps": metrics["steps"]}},
    )
    if runtime.is_main:
        save_network(run, trainer.network, card, "model.safetensors")
        facts = {"kind": "teach", "arch": arch, "data": cfg.data, "eval_images": len(test) if test else 0}
        run.write_json("result.json", {**facts, **metrics})
        finish_run(run, seconds=metrics["seconds"], wall_seconds=time.monotonic() - began)
        trainer.state.clear()
    runtime.accelerator.wait_for_everyone()
    runtime.close_trackers()
    return TeachResult(path=path, card=path / "card.yaml", metrics=metrics)


def constants_of(kind: str, train: RealData) -> tuple[list[float], list[float]]:
    """The dataset's usual constants where they exist, else those of the training images."""
    if kind in STATS and len(STATS[kind][0]) == train.shape[0]:
        mean, std = STATS[kind]
        return list(mean), list(std)
    return channel_statistics(train.images)


def training_source(cfg: TeachConfig, plan: Plan, train: RealData, runtime: Runtime) -> StoreSource:
    return StoreSource(
        ResidentStore(train.images, train.labels, None, runtime.device),
        RandomOrder(np.arange(len(train)), cfg.seed),
        plan.batch_size,
        rank=runtime.rank,
        world=runtime.world,
        policy=plan.augment,
        seed=cfg.seed,
        device=runtime.device,
    )


def _announce(runtime: Runtime, arch: str, train: RealData, test: RealData | None, plan: Plan) -> None:
    runtime.say(
        f"teach {arch} on {train.name} {train.split}: {len(train):,} images of {train.shape}, "
        f"{train.num_classes} classes",
    )
    runtime.say(f"  {plan.describe()}; {runtime.describe()}")
    for text in train.notes:
        runtime.say(f"  note: {text}")
    if test is None:
        runtime.say("  note: there is no test data, so no accuracy will be reported; give --eval_data")


def _file_name(arch: str) -> str:
    return arch.replace(":", "-").replace("/", "-")
