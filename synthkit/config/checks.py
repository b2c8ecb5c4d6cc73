"""What is wrong with a config and can be told without torch: unknown names, missing parts, counts out of range."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from synthkit import tables
from synthkit.errors import ConfigError


def check_tables(command: str, values: Mapping[str, Any]) -> None:
    """Refuse unknown names of small tables here, seconds before the run would import torch and find out."""
    curriculum, protocol = values.get("curriculum"), values.get("protocol")
    if curriculum not in (None, "auto", *tables.CURRICULA):
        hint = "synthkit list curricula"
        raise ConfigError(
            "curriculum: not a known curriculum", got=curriculum, allowed=["auto", *tables.CURRICULA], hint=hint
        )
    if command == "evaluate" and protocol is not None:
        from synthkit.evaluation.dd_protocols import OWN, protocol_named

        if protocol != OWN:
            protocol_named(protocol)
    elif protocol is not None and protocol != "auto":
        from synthkit.distillation.protocols import PROTOCOLS

        if protocol not in PROTOCOLS:
            names = ["auto", *PROTOCOLS]
            raise ConfigError("protocol: not known", got=protocol, allowed=names, hint="synthkit list protocols")


def check_needs(values: Mapping[str, Any], requires: Any) -> None:
    """Refuse a synthesize config that lacks what its method cannot work without, or counts its images twice."""
    name, hint = values["method_name"], f"see synthkit synthesize --method {values['method_name']} --help"
    if requires.teacher and values.get("teacher") is None:
        raise ConfigError(f"synthesize: --teacher is needed by method {name}", hint=hint)
    if requires.real_data and values.get("data") is None:
        raise ConfigError(f"synthesize: --data is needed by method {name} (for example --data cifar10:DIR)", hint=hint)
    if values.get("eval_data") is not None and values.get("teacher") is None:
        raise ConfigError("synthesize: --eval-data measures student and teacher; there is no --teacher",
                          hint="leave it out")  # fmt: skip
    if values.get("images") is not None and values.get("ipc") is not None:
        raise ConfigError("synthesize: --images and --ipc exclude each other", hint="leave one of them out")
    for key in ("images", "ipc", "images_per_shard"):
        if values.get(key) is not None and values[key] < 1:
            raise ConfigError(f"{key}: must be at least 1", got=values[key])
    if not 0 <= values["seed"] < 2**64:
        raise ConfigError("seed: must be 0 to 2**64 - 1", got=values["seed"])
