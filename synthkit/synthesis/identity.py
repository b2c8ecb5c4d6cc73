"""What the record of a bank says of its making: identity (all that decides its bytes), provenance, plan."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthkit.bank import BankSpec
from synthkit.bank.spec import SHARD_BYTES, plan_images_per_shard, read_record
from synthkit.bank.state import transform_entry
from synthkit.config.parse import config_to_dict
from synthkit.config.schema import SynthesizeConfig
from synthkit.errors import ConfigError
from synthkit.runtime import hardware, versions
from synthkit.synthesis.base import BankFacts, ImageSpec, Makes, Task, makes_of, requirements
from synthkit.synthesis.sources import Source
from synthkit.tables import citation

if TYPE_CHECKING:
    from synthkit.data.real import RealData
    from synthkit.models.build import LoadedModel

IMAGES = 50_000
"""Images of a bank when neither `images`, `ipc` nor the method says how many."""


def bank_spec(config: SynthesizeConfig, source: Source, method_class: Any, task: Task, facts: BankFacts) -> BankSpec:
    """Identity of the bank: everything that changes its bytes, and where teachers and data came from."""
    requires, makes = requirements(method_class, config.method), makes_of(method_class, config.method)
    looks = requires.real_data or (requires.optional_data and source.data is not None)
    spec = source.spec
    # where a network, a checkpoint or a buffer lies changes nothing; what it is stands in `networks` or `made_from`
    places = {*requires.networks, *getattr(method_class, "places", ())}
    settings = {k: v for k, v in config_to_dict(config.method).items() if v is None or k not in places}
    recipe: dict[str, Any] = {"method": {"name": config.method_name, **settings}}
    if requires.curriculum:
        recipe["curriculum"] = config.curriculum
    if source.data is not None:
        recipe["data"] = data_identity(config.data or "", source.data, pixels=looks)
    if len(source.teacher_models) > 1:
        recipe["teachers"] = [_network_identity(model) for model in source.teacher_models]
    if source.networks:
        recipe["networks"] = {name: _network_identity(n.loaded) for name, n in source.networks.items()}
    if facts.identity:
        recipe["made_from"] = facts.identity
    origin = _provenance(config.data or "", source.data, makes) if looks else {}
    if facts.real_data_used is not None:
        origin = {"real_data_used": facts.real_data_used, **{k: v for k, v in origin.items() if v}}
    label_kind = makes.label_kind
    if label_kind == "real" and source.data is not None:
        label_kind = source.data.label_source
    if not source.teachers and label_kind == "argmax" and not looks:
        label_kind = "none"
    kind, arrays, further = facts.transform or ("", {}, {})
    return BankSpec(
        shape=spec.shape,
        num_classes=spec.num_classes,
        class_names=spec.class_names,
        mean=spec.mean,
        std=spec.std,
        label_kind=label_kind,  # type: ignore[arg-type]  # a bank's own kind, or one of Makes
        images=task.images,
        images_per_shard=task.images_per_shard,
        seed=config.seed,
        recipe=recipe,
        teacher=_teacher_record(config, source),
        transform=transform_entry(kind, arrays, **further) if kind else {},
        extra={
            "versions": versions(), "hardware": hardware(), "citation": citation(config.method_name), **facts.extra
        },
        **origin,
    )  # fmt: skip


def planned_images(config: SynthesizeConfig, spec: ImageSpec, method_class: Any) -> int:
    """Images of the bank: `images`, or `ipc` times the classes; else the method's `default_ipc`, else 50,000.

    Raises:
        ConfigError: `images` and `ipc` are both given.
    """
    if config.images is not None and config.ipc is not None:
        raise ConfigError("synthesize: --images and --ipc exclude each other", hint="leave one of them out")
    ipc = config.ipc if config.ipc is not None else getattr(method_class, "default_ipc", None)
    if config.images is None and ipc is not None:
        return ipc * spec.num_classes
    return config.images or IMAGES


def planned_shard(config: SynthesizeConfig, images: int, spec: ImageSpec, method_class: Any) -> int:
    """Images in every shard but the last."""
    size = math.prod(spec.shape)
    if makes_of(method_class, config.method).at_once:
        return config.images_per_shard or max(1, min(images, SHARD_BYTES // size))
    return config.images_per_shard or plan_images_per_shard(images, size)


def _teacher_record(config: SynthesizeConfig, source: Source) -> dict[str, Any]:
    if not source.teacher_models:
        return {}
    loaded = source.teacher_models[0]
    card = loaded.card
    return {
        "spec": loaded.spec, "arch": card.arch, "sha256": loaded.sha256, "accuracy": card.accuracy,
        "licence": card.licence, "source": card.source,
    }  # fmt: skip


def _network_identity(loaded: LoadedModel) -> dict[str, Any]:
    return {"arch": loaded.card.arch, "sha256": loaded.sha256}


def data_identity(text: str, data: RealData, *, pixels: bool) -> dict[str, Any]:
    """What tells one data set from another, without its path: name, split, size, and a hash of pixels and labels."""
    facts: dict[str, Any] = {"name": text.partition(":")[0], "split": data.split, "shape": list(data.shape)}
    if pixels:
        digest = hashlib.sha256(data.labels.cpu().numpy().tobytes())
        for images, _ in data.batches():
            digest.update(images.contiguous().numpy().data)
        facts |= {"images": len(data), "sha256": digest.hexdigest()}
    return facts


def _provenance(text: str, data: RealData | None, makes: Makes) -> dict[str, Any]:
    """Whether real pixels were looked at or are contained; a bank as data hands on what it says of itself."""
    if data is None or not text.startswith("bank:"):
        return {"real_data_used": True, "contains_real": makes.contains_real}
    parent, record = read_record(Path(text.partition(":")[2]).expanduser())
    return {
        "real_data_used": parent.real_data_used or parent.contains_real,
        "contains_real": makes.contains_real and parent.contains_real,
        "parents": [{"uuid": record["uuid"], "recipe_hash": parent.recipe_hash()}],
    }
