"""The tables of what can be named on the command line. Looked up lazily; no heavy import here.

Third parties add entries through the entry-point groups `synthkit.methods` and `synthkit.losses`.
"""

from __future__ import annotations

import importlib
import inspect
import re
from importlib.metadata import entry_points
from typing import Any

from synthkit.errors import ConfigError

METHODS: dict[str, str] = {
    "adadfkd": "synthkit.synthesis.generator.adadfkd:AdaDFKD",
    "adi": "synthkit.synthesis.inversion.adi:AdaptiveDeepInversion",
    "cmi": "synthkit.synthesis.generator.cmi:CMI",
    "cudfkd": "synthkit.synthesis.generator.cudfkd:CuDFKD",
    "dafl": "synthkit.synthesis.generator.dafl:DAFL",
    "dc": "synthkit.synthesis.matching.dc:DC",
    "deepinversion": "synthkit.synthesis.inversion.deepinversion:DeepInversion",
    "dfad": "synthkit.synthesis.generator.dfad:DFAD",
    "dfme": "synthkit.synthesis.generator.dfme:DFME",
    "dfq": "synthkit.synthesis.generator.dfq:DFQ",
    "diffusion": "synthkit.synthesis.diffusion.diffusion:Diffusion",
    "dm": "synthkit.synthesis.matching.dm:DM",
    "dsa": "synthkit.synthesis.matching.dsa:DSA",
    "fastdfkd": "synthkit.synthesis.generator.fastdfkd:FastDFKD",
    "lra": "synthkit.synthesis.generator.lra:LRA",
    "mbdfkd": "synthkit.synthesis.generator.mbdfkd:MBDFKD",
    "mtt": "synthkit.synthesis.matching.mtt:MTT",
    "nayer": "synthkit.synthesis.generator.nayer:NAYER",
    "noise": "synthkit.synthesis.selection.noise:Noise",
    "predfkd": "synthkit.synthesis.generator.predfkd:PREDFKD",
    "random_real": "synthkit.synthesis.selection.random_real:RandomReal",
    "softtarget": "synthkit.synthesis.generator.softtarget:SoftTarget",
    "spaceshipnet": "synthkit.synthesis.generator.spaceshipnet:SpaceshipNet",
    "tadfkd": "synthkit.synthesis.generator.tadfkd:TADFKD",
    "zskd": "synthkit.synthesis.generator.zskd:ZSKD",
    "zskt": "synthkit.synthesis.generator.zskt:ZSKT",
}

LOSSES: dict[str, str] = {
    "ab": "synthkit.distillation.losses.ab:AB",
    "at": "synthkit.distillation.losses.at:AT",
    "cc": "synthkit.distillation.losses.cc:CC",
    "ce": "synthkit.distillation.losses.ce:CE",
    "crd": "synthkit.distillation.losses.crd:CRD",
    "deit_lt": "synthkit.distillation.losses.deit_lt:DeiTLT",
    "dist": "synthkit.distillation.losses.dist:DIST",
    "distill_weighted": "synthkit.distillation.losses.distill_weighted:DistillWeighted",
    "dkd": "synthkit.distillation.losses.dkd:DKD",
    "ferkd": "synthkit.distillation.losses.ferkd:FerKD",
    "fitnet": "synthkit.distillation.losses.fitnet:FitNet",
    "ft": "synthkit.distillation.losses.ft:FT",
    "gendd": "synthkit.distillation.losses.gendd:GenDD",
    "gkl": "synthkit.distillation.losses.gkl:GKL",
    "ikl": "synthkit.distillation.losses.ikl:IKL",
    "js": "synthkit.distillation.losses.js:JS",
    "kd": "synthkit.distillation.losses.kd:KD",
    "l1": "synthkit.distillation.losses.l1:L1",
    "lelp": "synthkit.distillation.losses.lelp:LELP",
    "logit_std": "synthkit.distillation.losses.logit_std:LogitStd",
    "mealv2": "synthkit.distillation.losses.mealv2:MEALV2",
    "mse": "synthkit.distillation.losses.mse:MSE",
    "nd": "synthkit.distillation.losses.kdpp:ND",
    "nst": "synthkit.distillation.losses.nst:NST",
    "ofa": "synthkit.distillation.losses.ofa:OFA",
    "pkt": "synthkit.distillation.losses.pkt:PKT",
    "pld": "synthkit.distillation.losses.pld:PLD",
    "reviewkd": "synthkit.distillation.losses.reviewkd:ReviewKD",
    "rkd": "synthkit.distillation.losses.rkd:RKD",
    "semckd": "synthkit.distillation.losses.semckd:SemCKD",
    "simkd": "synthkit.distillation.losses.simkd:SimKD",
    "soft_ce": "synthkit.distillation.losses.soft_ce:SoftCE",
    "sp": "synthkit.distillation.losses.sp:SP",
    "srrl": "synthkit.distillation.losses.srrl:SRRL",
    "vid": "synthkit.distillation.losses.vid:VID",
}

DATASETS: dict[str, str] = {
    "mnist": "torchvision MNIST folder (idx files)",
    "cifar10": "torchvision CIFAR-10 folder, or an ImageFolder of it",
    "cifar100": "torchvision CIFAR-100 folder, or an ImageFolder of it",
    "imagefolder": "one folder per class, optionally with train/ and test/ (or val/) below",
    "parquet": "Hugging Face image parquet: FILE or glob, or a folder with train*/test* files",
    "hf": "a Hugging Face dataset by name (needs `datasets`)",
    "npz": "an .npz file with images and labels (or x_train, y_train, x_test, y_test)",
    "bank": "a synthkit bank",
}

FORMATS: dict[str, str] = {
    "imagefolder": "synthkit.bank.export.imagefolder:ImageFolder",
    "parquet": "synthkit.bank.export.parquet:Parquet",
    "webdataset": "synthkit.bank.export.webdataset:WebDataset",
    "mds": "synthkit.bank.export.mds:MDS",
    "npz": "synthkit.bank.export.npz:Npz",
    "pt": "synthkit.bank.export.pt:Pt",
    "safetensors": "synthkit.bank.export.safetensors:Safetensors",
}

CURRICULA: dict[str, str] = {
    "easy2hard": "log self-paced weights (generator) and the ramp: adversary, crop scale, expert window, guidance",
    "easy2hard-hard": "hard (0/1) self-paced weights and the ramp",
    "easy2hard-soft": "linear self-paced weights and the ramp",
    "weights-only": "log self-paced weights, nothing else gets harder",
    "ramp-only": "the ramp of the family, every sample weighs 1",
    "none": "no curriculum: every sample weighs 1, nothing gets harder",
}


def with_plugins(table: dict[str, str], group: str) -> dict[str, str]:
    """`table` and what other packages add to it through the entry-point `group`; ours win."""
    found = {e.name: e.value for e in entry_points(group=group)}
    return {**found, **table}


def methods() -> dict[str, str]:
    """Name -> `module:Class` of every synthesis method, plug-ins included."""
    return with_plugins(METHODS, "synthkit.methods")


def losses() -> dict[str, str]:
    """Name -> `module:Class` of every distillation loss, plug-ins included."""
    return with_plugins(LOSSES, "synthkit.losses")


def formats() -> dict[str, str]:
    """Name -> `module:Class` of every export format, plug-ins (`synthkit.formats`) included."""
    return with_plugins(FORMATS, "synthkit.formats")


def lookup(kind: str, name: str) -> Any:
    """The class behind `name` in the table `kind` ("method" or "loss").

    Raises:
        ConfigError: the name is unknown; the nearest one is offered.
    """
    if kind == "loss" and any(mark in name for mark in "+*@"):
        from synthkit.distillation.weighted import weighted_sum

        return weighted_sum(name)
    table = methods() if kind == "method" else losses()
    if name not in table:
        plural = "methods" if kind == "method" else "losses"
        raise ConfigError(f"{kind}: not a known {kind}", got=name, allowed=table, hint=f"synthkit list {plural}")
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def citation(method: str) -> str | None:
    """The `Source:` of a method's docstring as one line (paper and reference code); None where it names none."""
    text = inspect.getdoc(lookup("method", method)) or ""
    found = re.search(r"^Source:[ ]+(.+(?:\n[ ]+.+)*)", text, re.MULTILINE)
    return " ".join(found[1].split()).rstrip(".") if found else None
