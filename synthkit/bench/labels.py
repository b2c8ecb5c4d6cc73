"""`synthkit bench labels`: what stored labels cost and what they change, against the live teacher on the same views.

A copy of the bank is relabelled once per form (all logits in fp16, and top-k). Then every form is compared with the
live teacher on identical inputs: the KD loss of a fresh student on every view, at temperature 1 and 4; and students
of one initialisation trained on one sequence of views, told by the live teacher or by a form, measured on held-out
images of the bank. Bytes are those of the files, records and HDF5 headers included.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from synthkit.cli.arguments import Arguments
from synthkit.config.schema import RelabelConfig, RuntimeConfig
from synthkit.errors import ConfigError
from synthkit.runtime import hardware, versions, write_json

TEMPERATURES = (1.0, 4.0)


def main(argv: list[str]) -> int:
    """Parse, measure, print JSON."""
    parser = Arguments(prog="synthkit bench labels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bank", required=True, help="bank directory (it is copied, not changed)")
    parser.add_argument("--teacher", required=True, help="model spec")
    parser.add_argument("--student", required=True, help="architecture")
    parser.add_argument("--views", type=int, default=10, help="view epochs")
    parser.add_argument("--mix", default="cutmix", help="none, mixup or cutmix")
    parser.add_argument("--crop-scale", type=float, nargs=2, default=(0.5, 1.0), help="area of the crops")
    parser.add_argument("--flip", type=float, default=0.0, help="probability of a mirrored view")
    parser.add_argument("--top-k", default="1,3,5", help="comma-separated k")
    parser.add_argument("--epochs", type=int, default=None, help="training epochs; none is one pass over the views")
    parser.add_argument("--seeds", type=int, default=3, help="students per form")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--device", default="auto", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON here")
    args = parser.parse(argv)
    try:
        args.forms = {"fp16": None, **{f"top{int(k)}": int(k) for k in args.top_k.split(",") if k.strip()}}
    except ValueError as error:
        raise ConfigError("--top-k: whole numbers separated by commas", got=args.top_k) from error
    with tempfile.TemporaryDirectory() as work:
        result = measure(args, Path(work))
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result, indent=1))
    return 0


def measure(args: Any, work: Path) -> dict[str, Any]:
    """Relabel, compare losses, train; see the module's docstring."""
    from synthkit.distillation.relabel import relabel

    bank = work / "bank"
    shutil.copytree(args.bank, bank)
    runtime = RuntimeConfig(device=args.device, threads=args.threads)
    rows: dict[str, dict[str, Any]] = {}
    labels = None
    for name, k in args.forms.items():
        began = time.monotonic()
        labels = relabel(RelabelConfig(
            bank=str(bank), name=name, teacher=args.teacher, views=args.views, mix=args.mix, flip=args.flip,
            crop_scale=(args.crop_scale[0], args.crop_scale[1]), top_k=k, runtime=runtime,
        ))  # fmt: skip
        seconds = time.monotonic() - began
        rows[name] = {
            "bytes_per_view": labels.spec.row_bytes,
            "file_bytes_per_view": round(sum(f.stat().st_size for f in labels.path.iterdir()) / len(labels), 2),
            "views_per_second": round(len(labels) / seconds, 1), "tail_error": labels.tail_error,
        }  # fmt: skip
    assert labels is not None
    session = _Session(args, bank)
    for name in args.forms:
        rows[name]["loss_difference"] = session.losses(name)
    trained = {name: [session.train(name, seed) for seed in range(args.seeds)] for name in ("live", *args.forms)}
    rows["live"] = {}
    for name, found in trained.items():
        rows[name]["students"] = _spread(found)
    return {
        "what": "stored labels of views against the live teacher on the same views", "bank": args.bank,
        "teacher": args.teacher, "student": args.student, "policy": labels.spec.policy, "views": len(labels),
        "num_classes": labels.spec.num_classes, "held_out": len(session.held), "epochs": session.epochs,
        "seeds": args.seeds, "forms": rows, "versions": versions(), "hardware": hardware(),
    }  # fmt: skip


def _spread(found: list[dict[str, float]]) -> dict[str, Any]:
    from synthkit.bench.pipeline import spread

    return {key: spread([f[key] for f in found]) for key in found[0]}


class _Session:
    """Teacher, bank and views, the same for every form."""

    def __init__(self, args: Any, bank: Path):
        from synthkit.bank import Bank
        from synthkit.distillation.sources import split_holdout
        from synthkit.models.build import load_model
        from synthkit.models.view import TeacherView
        from synthkit.runtime import Runtime

        self.args, self.bank = args, Bank(bank)
        self.runtime = Runtime.create(RuntimeConfig(device=args.device, threads=args.threads, precision="fp32"))
        self.device = self.runtime.device
        self.teacher = TeacherView.from_loaded(load_model(args.teacher)).to(self.device, channels_last=True)
        self.train_rows, self.held = split_holdout(len(self.bank), 0.25, 0)
        self.epochs = args.epochs or args.views

    def source(self, name: str):
        """The views of form `name` that show no held-out image."""
        import numpy as np

        from synthkit.distillation.stores import ResidentStore
        from synthkit.distillation.view_source import ViewRows, ViewSource

        out = np.zeros(len(self.bank), bool)
        out[self.held] = True
        labels, store = self.bank.labels(name), ResidentStore.from_bank(self.bank, self.device, logits=None)
        return ViewSource(labels, store, ViewRows(labels, out), 128, images=len(self.train_rows), device=self.device)

    def student(self, seed: int):
        """A fresh student with the teacher's constants."""
        from synthkit.models.build import load_model
        from synthkit.models.view import ModelView

        channels, side = self.bank.shape[0], self.bank.shape[1]
        loaded = load_model(self.args.student, num_classes=self.bank.num_classes, in_channels=channels,
                            image_size=side, weights="optional", seed=seed)  # fmt: skip
        loaded.card.mean, loaded.card.std = list(self.teacher.mean), list(self.teacher.std)
        return ModelView.from_loaded(loaded).to(self.device, channels_last=True)

    def losses(self, name: str) -> dict[str, Any]:
        """KD loss of a fresh student with stored and with live targets on every view: mean and largest difference."""
        import torch

        from synthkit.logits import kl_per_sample

        source, student = self.source(name), self.student(0)
        student.module.eval()
        found: dict[float, list[Any]] = {t: [] for t in TEMPERATURES}
        with torch.no_grad():
            for step in range(len(source.rows) // source.batch_size):
                batch = source.batch(step)
                ours, live, stored = student(batch.images), self.teacher(batch.images), batch.logits
                assert stored is not None  # a view source always has them
                for t in TEMPERATURES:
                    found[t].append(torch.stack([kl_per_sample(ours, live, t), kl_per_sample(ours, stored, t)]))
        result = {}
        for t, parts in found.items():
            live, stored = torch.cat(parts, dim=1).double()
            gap = (stored - live).abs()
            result[f"{t:g}"] = {"live_loss": float(live.mean()), "mean_loss_difference": float((stored - live).mean()),
                                "mean_abs": float(gap.mean()), "largest": float(gap.max())}  # fmt: skip
        return result

    def train(self, name: str, seed: int) -> dict[str, float]:
        """A student told by `name` ("live" or a form), measured on the held-out images: agreement, KL, accuracy."""
        import torch

        from synthkit.evaluation.fidelity import evaluate_fidelity
        from synthkit.logits import kl_per_sample

        source, student = self.source("fp16" if name == "live" else name), self.student(seed)
        steps = self.epochs * source.steps_per_epoch
        optimizer = torch.optim.SGD(student.module.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps, cycle_momentum=False)
        student.module.train()
        for step in range(steps):
            batch = source.batch(step)
            with torch.no_grad():
                target = self.teacher(batch.images) if name == "live" else batch.logits
            assert target is not None
            loss = kl_per_sample(student(batch.images), target, 1.0).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        found = evaluate_fidelity(student, self.bank, teacher=self.teacher, indices=self.held)
        figures = {"agreement": found["agreement"], "kl": found["kl"]}
        if self.bank.has("labels"):
            figures["accuracy"] = self.accuracy(student)
        return figures

    def accuracy(self, student) -> float:
        """Share of held-out images whose bank label the student names."""
        import torch

        batch = self.bank.batch(self.held, ["images", "labels"])
        student.module.eval()
        with torch.no_grad():
            logits = student(torch.from_numpy(batch.images).to(self.device))
        return float((logits.argmax(1).cpu() == torch.from_numpy(batch.labels).long()).float().mean())
