"""`synthkit bench distill`: images/s of the distill trainer, against the bare networks and a torch DataLoader.

Per row (networks, loss, precision), interleaved: `trainer` is the trainer of `synthkit distill` on a resident bank;
`bare` the forward of teacher and student, the backward and the optimiser on one fixed batch, without normalisation,
augmentation or loss (the squared difference of the logits stands in; the faster of both memory layouts counts);
`loaderN` the same trainer fed by a torch DataLoader with N workers over PNG files with torchvision's transforms, as an
ImageFolder is usually read. Wall-clock, on networks with random weights: speed does not hang on the values.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthkit.cli.arguments import Arguments
from synthkit.config.schema import DistillConfig, RuntimeConfig
from synthkit.errors import ConfigError
from synthkit.runtime import RunDir, Runtime, hardware, peak_memory, versions, write_json

if TYPE_CHECKING:
    from synthkit.distillation.contract import Batch
    from synthkit.distillation.sources import BatchSource
    from synthkit.distillation.task import DistillTask

PAIRS = {"resnet": ("resnet20", "resnet8", (3, 32, 32)), "lenet": ("lenet5_bn", "lenet5_half_bn", (1, 32, 32))}
LAYOUTS = ("channels_last", "contiguous")
WARM = 5  # untimed steps before every timed stretch
CLASSES = 10


def main(argv: list[str]) -> int:
    """Parse, measure, print JSON."""
    parser = Arguments(prog="synthkit bench distill", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", default=",".join(PAIRS), help=f"comma-separated, of {', '.join(PAIRS)}")
    parser.add_argument("--losses", default="kd,at", help="comma-separated names of losses")
    parser.add_argument("--precisions", default="fp32,bf16", help="comma-separated, of fp32, bf16")
    parser.add_argument(
        "--loader-workers", default="0,2", help="DataLoader workers to compare with; none leaves it out"
    )
    parser.add_argument("--augment", default="crop_flip", choices=["crop_flip", "none"], help="augmentation of both")
    parser.add_argument("--images", type=int, default=8192, help="images of the bank")
    parser.add_argument("--batch", type=int, default=64, help="images of a step")
    parser.add_argument("--steps", type=int, default=60, help="timed steps of a stretch")
    parser.add_argument("--repeats", type=int, default=5, help="stretches of each, interleaved; the median counts")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON here")
    args = parser.parse(argv)
    _check(args)
    with tempfile.TemporaryDirectory(prefix="synthkit-bench-") as folder:
        result = measure(args, Path(folder))
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result, indent=1))
    return 0


def _check(args: Namespace) -> None:
    """Turn the lists into lists, and refuse what cannot be measured."""
    for name, allowed in (("pairs", PAIRS), ("precisions", ("fp32", "bf16")), ("losses", None)):
        words = [word.strip() for word in getattr(args, name).split(",")]
        for word in words:
            if allowed is not None and word not in allowed:
                raise ConfigError(f"bench distill: --{name}", got=word, allowed=allowed)
        setattr(args, name, words)
    try:
        named = args.loader_workers.strip()
        args.loader_workers = [] if named == "none" else [int(word) for word in named.split(",")]
    except ValueError:
        raise ConfigError("bench distill: --loader-workers: whole numbers or none", got=args.loader_workers) from None
    if (
        args.repeats < 1
        or args.steps < 1
        or not 2 <= args.batch <= args.images
        or min(args.loader_workers, default=0) < 0
    ):
        raise ConfigError("bench distill: repeats, steps and workers must be positive, and a batch fit into the images")


def measure(args: Namespace, folder: Path) -> dict[str, Any]:
    """All rows."""
    rows = []
    runtime: Runtime | None = None
    for pair in args.pairs:
        data = Data(folder / pair, pair, args.images)
        for precision in args.precisions:
            runtime = Runtime.create(RuntimeConfig(device=args.device, precision=precision, threads=args.threads))
            for loss in args.losses:
                rows.append(Row(args, data, runtime, pair, loss, precision).measure())
    assert runtime is not None  # the lists are not empty
    return {
        "what": "images/s of distillation, wall-clock; medians of interleaved stretches",
        "augment": args.augment,
        "batch": args.batch,
        "steps": args.steps,
        "repeats": args.repeats,
        "images": args.images,
        "rows": rows,
        "worst": {name: min(row["ratio"][name] for row in rows) for name in rows[0]["ratio"]},
        "runtime": runtime.describe(),
        "peak_memory_bytes": peak_memory(),
        "versions": versions(),
        "hardware": hardware(),
    }


class Data:
    """A teacher with random weights, a bank of structured images, and the same images as PNG files."""

    def __init__(self, folder: Path, pair: str, count: int):
        import numpy as np

        from synthkit.bank.export import export
        from synthkit.bank.make import bank_from_arrays
        from synthkit.distillation.outputs import save_network
        from synthkit.models.build import build_model
        from synthkit.models.card import ModelCard

        teacher, self.student, size = PAIRS[pair]
        network = build_model(teacher, num_classes=CLASSES, in_channels=size[0], image_size=size[1], seed=0)
        mean, std = [0.5] * size[0], [0.25] * size[0]
        card = ModelCard(arch=teacher, num_classes=CLASSES, input_size=size, mean=mean, std=std)
        save_network(RunDir(folder / "teacher").create(), network, card, "teacher.safetensors")
        self.teacher, self.bank, self.files = folder / "teacher", folder / "bank", folder / "files"
        rng = np.random.default_rng(0)
        # blots of eight pixels with some noise compress about as photographs do; plain noise would decode faster
        blots = rng.integers(0, 240, (count, size[0], size[1] // 8, size[2] // 8), dtype=np.uint8)
        images = blots.repeat(8, axis=2).repeat(8, axis=3) + rng.integers(0, 16, (count, *size), dtype=np.uint8)
        labels = np.arange(count) % CLASSES
        common = {"num_classes": CLASSES, "mean": mean, "std": std, "label_kind": "argmax"}
        bank_from_arrays(self.bank, images, labels, teacher={"spec": str(self.teacher)}, **common)
        export(self.bank, "imagefolder", self.files)


@dataclass
class Clocked:
    """A source that notes the time of two of its steps: what lies between is timed, the start is not."""

    source: BatchSource
    steps: int
    synchronize: Callable[[], None]
    started: float = 0.0
    ended: float = 0.0

    def __post_init__(self):
        self.batch_size, self.steps_per_epoch = self.source.batch_size, self.source.steps_per_epoch

    def batch(self, step: int) -> Batch:
        if step == WARM:
            self.synchronize()
            self.started = time.perf_counter()
        if step == WARM + self.steps:
            self.synchronize()
            self.ended = time.perf_counter()
        return self.source.batch(step)

    def close(self) -> None:
        self.source.close()

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.steps * self.batch_size / (self.ended - self.started)


class LoaderSource:
    """Batches of a torch DataLoader over PNG files, as an ImageFolder is usually read."""

    def __init__(self, data: Data, args: Namespace, workers: int, runtime: Runtime):
        from torch.utils.data import DataLoader
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip, ToTensor

        size = PAIRS[data.files.parent.name][2]
        moves = [RandomCrop(size[1], padding=4), RandomHorizontalFlip()] if args.augment == "crop_flip" else []
        files = ImageFolder(
            str(data.files), Compose([*moves, ToTensor()]), loader=_grey if size[0] == 1 else _colour, allow_empty=True
        )
        self.device, self.batch_size = runtime.device, args.batch
        self._loader: DataLoader[Any] | None = DataLoader(
            files,
            batch_size=args.batch,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
        )
        self.steps_per_epoch = len(self._loader)
        self._batches = self._endless()

    def _endless(self) -> Iterator[Any]:
        while self._loader is not None:
            yield from self._loader

    def batch(self, step: int) -> Batch:
        from synthkit.distillation.contract import Batch

        images, labels = next(self._batches)
        return Batch(images=images.to(self.device, non_blocking=True), labels=labels.to(self.device, non_blocking=True))

    def close(self) -> None:
        """End the workers."""
        self._loader = None
        self._batches.close()  # type: ignore[attr-defined]  # a generator


def _grey(path: str) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("L")


def _colour(path: str) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


class Row:
    """One pair of networks with one loss in one precision."""

    def __init__(self, args: Namespace, data: Data, runtime: Runtime, pair: str, loss: str, precision: str):
        from synthkit.distillation.sources import RandomOrder, StoreSource, bank_store
        from synthkit.distillation.task import check_task

        self.args, self.data, self.runtime = args, data, runtime
        self.facts = {"pair": pair, "teacher": PAIRS[pair][0], "student": data.student, "loss": loss,
                      "precision": precision}  # fmt: skip
        self.task: DistillTask = check_task(
            DistillConfig(
                bank=str(data.bank),
                student=data.student,
                loss_name=loss,
                batch_size=args.batch,
                steps=WARM + args.steps + 1,  # the end of the timed stretch is the start of one more step
                augment=args.augment,
                holdout=0.0,
                lr=1e-3,  # random teachers say wild things
                runtime=runtime.config,
            )
        )
        assert self.task.teacher is not None  # the bank names it
        self.channels_last = runtime.lays_channels_last(self.task.bank.shape)  # as `synthkit distill` lays its networks
        self.teacher = self.task.teacher.to(runtime.device, channels_last=self.channels_last)
        store = bank_store(self.task.bank, runtime.device, logits=None)
        order = RandomOrder(self.task.train, 0)
        self.bank_source = lambda: StoreSource(
            store, order, args.batch, policy=self.task.plan.augment, device=runtime.device
        )

    def measure(self) -> dict[str, Any]:
        """Rates and ratios of the row."""
        pieces: dict[str, Callable[[], float]] = {"trainer": lambda: self.trained(self.bank_source())}
        pieces |= {f"bare_{layout}": lambda layout=layout: self.bare(layout) for layout in LAYOUTS}
        for workers in self.args.loader_workers:
            pieces[f"loader{workers}"] = lambda workers=workers: self.trained(
                LoaderSource(self.data, self.args, workers, self.runtime)
            )
        rates: dict[str, list[float]] = {name: [] for name in pieces}
        for _ in range(self.args.repeats):
            for name, piece in pieces.items():
                rates[name].append(piece())
        return {**self.facts, **summary(rates)}

    def trained(self, source: BatchSource) -> float:
        """Images/s of the trainer on `source`."""
        from synthkit.distillation.assemble import assemble
        from synthkit.distillation.trainer import Trainer

        clocked = Clocked(source, self.args.steps, self.synchronize)
        view = self.task.student(0)[1]
        with tempfile.TemporaryDirectory(prefix="synthkit-bench-") as folder:
            trainer = Trainer(
                runtime=self.runtime,
                view=view,
                objective=assemble(self.task, view, seed=0),
                source=clocked,
                plan=self.task.plan,
                run_dir=RunDir(folder),
                description=f"bench {self.facts['loss']} {type(source).__name__}",
            )
            trainer.fit()
        return clocked.rate

    def bare(self, layout: str) -> float:
        """Images/s of the networks alone."""
        import torch
        import torch.nn.functional as F

        from synthkit.distillation.optimizers import make_optimizer

        form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        device, teacher = self.runtime.device, self.teacher.module
        student = self.task.student(0)[1].module.to(device).to(memory_format=form)  # type: ignore[call-overload]  # stub lacks the keyword
        teacher.to(memory_format=form)  # type: ignore[call-overload]  # stub lacks the keyword
        optimizer = make_optimizer(replace(self.task.plan, lr=1e-3), student, device)
        images = torch.rand(self.args.batch, *self.task.bank.shape, device=device).contiguous(memory_format=form)
        started = 0.0
        for step in range(WARM + self.args.steps):
            if step == WARM:
                self.synchronize()
                started = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            with self.runtime.autocast():
                with torch.inference_mode():
                    target = teacher(images).float()
                loss = F.mse_loss(student(images).float(), target.clone())
            loss.backward()
            optimizer.step()
        self.synchronize()
        rate = self.args.steps * self.args.batch / (time.perf_counter() - started)
        found = torch.channels_last if self.channels_last else torch.contiguous_format
        teacher.to(memory_format=found)  # type: ignore[call-overload]  # as the trainer found it
        return rate

    def synchronize(self) -> None:
        """Wait for the device, where it runs by itself."""
        if self.runtime.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.runtime.device)


def summary(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and ratios of the trainer to everything else, each the median over the repeats (which drift together).

    `of_bare` compares with the faster layout of each repeat.
    """
    bare = [max(pair) for pair in zip(*(rates[f"bare_{layout}"] for layout in LAYOUTS), strict=True)]
    rivals = {"of_bare": bare, **{f"over_{n}": v for n, v in rates.items() if n.startswith("loader")}}
    ratios = {name: [a / b for a, b in zip(rates["trainer"], v, strict=True)] for name, v in rivals.items()}
    return {
        "images_per_second": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "ratio": {name: round(statistics.median(values), 3) for name, values in ratios.items()},
        "ratio_range": {name: [round(min(v), 3), round(max(v), 3)] for name, v in ratios.items()},
        "all": {name: [round(v, 1) for v in values] for name, values in rates.items()},
    }
