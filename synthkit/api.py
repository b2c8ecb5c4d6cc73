"""The Python face: the five verbs of the command line as functions, with the same checks and the same errors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthkit import tables
from synthkit.config.fields import options_of, unknown
from synthkit.config.parse import COMMANDS, parse_config

if TYPE_CHECKING:
    from synthkit.bank import Bank, LabelSet
    from synthkit.distillation.distill import RunResult
    from synthkit.distillation.teach import TeachResult

PathLike = str | os.PathLike[str]


def synthesize(method: str = "cudfkd", *, teacher: PathLike | None = None, **options: Any) -> Bank:
    """Make a bank of images from a trained classifier, or (for methods that take it) from real data.

    `options` are fields of `SynthesizeConfig` (`curriculum`, `images`, `out`, `seed`, ...), of the method's own config
    (`lr_g`, `epochs`, ...; `**{"method.NAME": value}` where both have that name), of the runtime (`device`,
    `threads`, ...), or `config`, a recipe below them.

    Raises:
        ConfigError: unknown or ill-typed option.
        SynthkitError: as `synthkit.synthesis.engine.synthesize`.
    """
    from synthkit.synthesis.engine import synthesize as run

    values = options if teacher is None else {"teacher": teacher, **options}
    return run(parse_config("synthesize", _values("synthesize", method, values)))


def distill(bank: PathLike | Bank, student: PathLike | Any, *, loss: str = "kd", **options: Any) -> RunResult:
    """Train a student from a bank alone; `options` are fields of `DistillConfig`, of the loss, or of the runtime.

    `student` and `teacher` are model specs or any nn.Module that takes normalised images (B, C, H, W) and gives logits
    (B, K): mean and std are the bank's, or those of a `ModelView`. The module given as student is not changed: every
    seed trains a copy that starts from its weights.

    Raises:
        ConfigError: unknown or ill-typed option.
        SynthkitError: as `synthkit.distillation.distill.distill`.
    """
    from synthkit.distillation.distill import distill as run

    values = {"bank": getattr(bank, "path", bank), "student": student, **options}
    for key in ("student", "teacher"):
        if hasattr(values.get(key), "state_dict") or hasattr(values.get(key), "module"):
            from synthkit.models.own import hold

            values[key] = hold(values[key])
    return run(parse_config("distill", _values("distill", loss, values)))


def relabel(bank: PathLike | Bank, name: str, **options: Any) -> LabelSet:
    """Label a bank's images anew, or stored views of them (FKD); `options` are fields of `RelabelConfig` or of the
    runtime (`teacher`, `views`, `mix`, `top_k`, ...).

    Raises:
        ConfigError: unknown or ill-typed option.
        SynthkitError: as `synthkit.distillation.relabel.relabel`.
    """
    from synthkit.distillation.relabel import relabel as run

    values = {"bank": getattr(bank, "path", bank), "name": name, **options}
    return run(parse_config("relabel", _values("relabel", "", values)))


def teach(arch: str, data: str, **options: Any) -> TeachResult:
    """Train a teacher on real data; `options` are fields of `TeachConfig` or of the runtime.

    Raises:
        ConfigError: unknown or ill-typed option.
        SynthkitError: as `synthkit.distillation.teach.teach`.
    """
    from synthkit.distillation.teach import teach as run

    return run(parse_config("teach", _values("teach", "", {"arch": arch, "data": data, **options})))


def evaluate(
    model: PathLike | None = None, data: str | None = None, *, bank: PathLike | Bank | None = None, **options: Any
) -> dict[str, Any]:
    """Measure a model, or with `bank` the networks that can be trained on a bank; returns the record that
    `synthkit evaluate --json` prints.

    Raises:
        ConfigError: unknown or ill-typed option.
        SynthkitError: as `synthkit evaluate`.
    """
    from synthkit.cli.evaluate import run

    values = {"model": model, "data": data, "bank": getattr(bank, "path", bank), **options}
    return run(parse_config("evaluate", _values("evaluate", "", values)), quiet=True)


def _values(command: str, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments under their full names: top level first, then the method's or loss's, then the runtime's."""
    spec = COMMANDS[command]
    known = set(options_of(spec.config, skip={spec.plugin or "", f"{spec.plugin}_name"})) | {"config", "runtime"}
    own: dict[str, Any] = {}
    if spec.plugin:
        own = options_of(tables.lookup(spec.plugin, name).Config, f"{spec.plugin}.")
        known |= {*own, spec.plugin}
    values: dict[str, Any] = {f"{spec.plugin}.name": name} if spec.plugin else {}
    for key, value in options.items():
        full = next((k for k in (key, f"{spec.plugin}.{key}", f"runtime.{key}") if k in known), None)
        if full is None:
            raise unknown(command, repr(key), key, sorted(known), "", f"synthkit {command} --help")
        values[full] = os.fspath(value) if isinstance(value, Path) else value
    return values
