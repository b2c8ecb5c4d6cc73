"""What a bank is: `BankSpec`, and its form on disk, bank.json (written once, never changed)."""

from __future__ import annotations

import datetime
import math
import os
import platform
import re
import uuid
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from synthkit.bank import migrate
from synthkit.bank.disk.storage import canonical_hash, plain, read_json, require_bank
from synthkit.bank.migrate import SCHEMA, newer_schema
from synthkit.errors import BankError, ConfigError

__all__ = ["LABEL_KINDS", "SCHEMA", "SHARD_BYTES", "BankSpec", "LabelKind", "differences", "newer_schema",
           "plan_images_per_shard", "read_record", "record_of", "version"]  # fmt: skip

SHARD_BYTES = 64 << 20
LABEL_KINDS = ("argmax", "target", "real", "none")
TRANSFORM_KINDS = ("zca", "affine")
MAX_SIDE, MAX_CLASSES, MAX_IMAGES = 1 << 14, 1 << 20, 1 << 40
MAX_SHARDS = 50_000  # so that manifest.json stays under the cap of a record (16 MiB); 3 TiB of 64 MiB shards

LabelKind = Literal["argmax", "target", "real", "none"]


@dataclass(frozen=True, kw_only=True)
class BankSpec:
    """Identity of a bank: what its images are, how they were made and how they are split into shards."""

    shape: tuple[int, int, int]
    """(C, H, W) of every image, uint8."""
    num_classes: int
    """Classes of the teacher (or of the data)."""
    mean: list[float]
    """Channel means that the teacher normalises with, in [0,1] pixel space. The stored images are not normalised."""
    std: list[float]
    """Channel standard deviations, like `mean`."""
    images: int
    """Images in the finished bank."""
    class_names: list[str] | None = None
    """One name per class."""
    label_kind: LabelKind = "argmax"
    """What `labels` means: the teacher's argmax, the class asked for, a real label, or there are none."""
    images_per_shard: int | None = None
    """Images in every shard but the last; none plans 20 shards or more, of at most 64 MiB."""
    seed: int = 0
    """Base seed of the run."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """The whole resolved recipe: whatever changes the images, and nothing else (no paths, no device)."""
    teacher: dict[str, Any] = field(default_factory=dict)
    """name, arch, sha256 of the weights, accuracy, licence, spec."""
    real_data_used: bool = False
    """Whether any real image was looked at in making the bank."""
    contains_real: bool = False
    """Whether the images are, or start from, real pixels."""
    parents: list[Any] = field(default_factory=list)
    """Banks that this one was made from."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Anything else worth keeping; not part of the identity."""
    top_k: int | None = None
    """k of the columns topk_index, topk_logit and tail_logsumexp; None: the bank has none. 1 to num_classes - 1: the
    tail holds at least one class."""
    transform: dict[str, Any] = field(default_factory=dict)
    """How `images_f16` came from pixels in [0,1]; empty: it did not. {"kind": "zca" or "affine", "sha256": of the
    arrays in transform/00000.safetensors, ...}; make it with `state.transform_entry`."""

    def __post_init__(self):
        _check_spec(self)
        put = object.__setattr__
        put(self, "shape", tuple(int(v) for v in self.shape))
        put(self, "mean", [float(v) for v in self.mean])
        put(self, "std", [float(v) for v in self.std])
        if self.images_per_shard is None:
            put(self, "images_per_shard", plan_images_per_shard(self.images, self.image_bytes))
        if self.shards > MAX_SHARDS:
            raise ConfigError(f"bank: more than {MAX_SHARDS} shards", got=self.shards, hint="raise images_per_shard")
        for name in ("recipe", "teacher", "parents", "extra", "class_names", "transform"):
            put(self, name, plain(getattr(self, name), name))

    @property
    def image_bytes(self) -> int:
        """Bytes of one image."""
        return math.prod(self.shape)

    @property
    def per_shard(self) -> int:
        """Images in every shard but the last."""
        assert self.images_per_shard is not None  # set in __post_init__
        return self.images_per_shard

    @property
    def shards(self) -> int:
        """Number of shards of the finished bank."""
        return -(-self.images // self.per_shard)

    def shard_size(self, index: int) -> int:
        """Images in shard `index`."""
        if not 0 <= index < self.shards:
            raise ConfigError(f"shard: the bank has shards 0 to {self.shards - 1}", got=index)
        return min(self.per_shard, self.images - index * self.per_shard)

    @property
    def planned_bytes(self) -> int:
        """Upper estimate of the bytes of the finished bank (images, fp16 logits, top-k, all small columns)."""
        row = self.image_bytes + 2 * self.num_classes + 24 + (4 + 6 * self.top_k if self.top_k else 0)
        row += 2 * self.image_bytes if self.transform else 0  # images_f16 beside the viewable images
        return self.images * row + self.shards * (16 << 10)

    def names(self) -> list[str]:
        """Class names; the numbers where none were given."""
        return list(self.class_names) if self.class_names else [str(i) for i in range(self.num_classes)]

    def identity(self) -> dict[str, Any]:
        """What decides the bytes of the shards: two specs with equal identity describe the same bank.

        Fields that schema 1 did not have count only when set, so that the hashes of its banks stay.
        """
        later = {"top_k": self.top_k, "transform": self.transform}
        return {
            **{name: value for name, value in later.items() if value},
            "shape": list(self.shape), "num_classes": self.num_classes, "label_kind": self.label_kind,
            "images": self.images, "images_per_shard": self.images_per_shard, "seed": self.seed,
            "recipe": self.recipe, "teacher_sha256": self.teacher.get("sha256"),
        }  # fmt: skip

    def recipe_hash(self) -> str:
        """sha256 of the identity."""
        return canonical_hash(self.identity())


def plan_images_per_shard(images: int, image_bytes: int) -> int:
    """Images per shard such that a bank has 20 shards or more (a kill loses at most 5 %), each of at most 64 MiB."""
    return max(1, min(-(-images // 20), SHARD_BYTES // image_bytes))


def _check_spec(spec: BankSpec) -> None:
    def need(ok: bool, what: str, got: object) -> None:
        if not ok:
            raise ConfigError(f"bank: {what}", got=got)

    def is_int(value: object, low: int, high: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    def finite(value: object) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300

    sides = spec.shape
    need(isinstance(sides, (tuple, list)) and len(sides) == 3 and all(is_int(v, 1, MAX_SIDE) for v in sides),
         f"shape must be (channels, height, width), each 1 to {MAX_SIDE}", sides)  # fmt: skip
    need(is_int(spec.num_classes, 1, MAX_CLASSES), f"num_classes must be 1 to {MAX_CLASSES}", spec.num_classes)
    need(is_int(spec.images, 1, MAX_IMAGES), f"images must be 1 to {MAX_IMAGES}", spec.images)
    need(spec.images_per_shard is None or is_int(spec.images_per_shard, 1, MAX_IMAGES),
         "images_per_shard must be at least 1", spec.images_per_shard)  # fmt: skip
    need(is_int(spec.seed, 0, 2**64 - 1), "seed must be 0 to 2**64 - 1", spec.seed)
    for name in ("mean", "std"):
        value = getattr(spec, name)
        need(isinstance(value, (list, tuple)) and len(value) == sides[0] and all(finite(v) for v in value),
             f"{name} must be {sides[0]} finite numbers, one per channel", value)  # fmt: skip
    need(all(v > 0 for v in spec.std), "std must be positive", spec.std)
    if spec.label_kind not in LABEL_KINDS:
        raise ConfigError("bank: label_kind", got=spec.label_kind, allowed=LABEL_KINDS)
    names = spec.class_names
    if names is not None:
        need(isinstance(names, (list, tuple)) and all(isinstance(n, str) and len(n) <= 500 for n in names),
             "class_names must be strings of at most 500 characters", names)  # fmt: skip
        need(len(names) == spec.num_classes, f"class_names must be {spec.num_classes} names", f"{len(names)} names")
    for name, kind in (("recipe", dict), ("teacher", dict), ("parents", list), ("extra", dict),
                       ("transform", dict), ("real_data_used", bool), ("contains_real", bool)):  # fmt: skip
        need(isinstance(getattr(spec, name), kind), f"{name} must be a {kind.__name__}", getattr(spec, name))
    need(spec.top_k is None or is_int(spec.top_k, 1, spec.num_classes - 1),
         f"top_k must be 1 to {spec.num_classes - 1} (one less than the classes)", spec.top_k)  # fmt: skip
    if spec.transform:
        kind, digest = spec.transform.get("kind"), spec.transform.get("sha256")
        if kind not in TRANSFORM_KINDS:
            raise ConfigError("bank: transform kind", got=kind, allowed=TRANSFORM_KINDS)
        need(isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest) is not None,
             "transform must hold the sha256 of its arrays", digest)  # fmt: skip


def version() -> str:
    """Version of the installed synthkit."""
    return _version("synthkit") or "0+unknown"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def record_of(spec: BankSpec) -> dict[str, Any]:
    """The content of bank.json for a new bank."""
    packages = ("synthkit", "numpy", "h5py", "torch", "torchvision")
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "format": "synthkit-bank", "schema": SCHEMA, "min_reader": SCHEMA,
        "uuid": str(uuid.uuid4()), "created": now.isoformat(timespec="seconds"),
        "shape": list(spec.shape), "dtype": "uint8", "num_classes": spec.num_classes, "class_names": spec.class_names,
        "mean": spec.mean, "std": spec.std, "label_kind": spec.label_kind,
        "top_k": spec.top_k, "transform": spec.transform,
        "plan": {"images": spec.images, "images_per_shard": spec.images_per_shard, "shards": spec.shards,
                 "seed": spec.seed},
        "recipe": spec.recipe, "recipe_hash": spec.recipe_hash(), "teacher": spec.teacher, "parents": spec.parents,
        "real_data_used": spec.real_data_used, "contains_real": spec.contains_real, "extra": spec.extra,
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in packages}},
        "hardware": {"machine": platform.machine(), "system": platform.system(), "cpus": os.cpu_count()},
    }  # fmt: skip


def read_record(path: Path) -> tuple[BankSpec, dict[str, Any]]:
    """The spec of the bank at `path` and bank.json as it lies on the disk (of whatever schema).

    Raises:
        BankNotFoundError: there is no bank.
        BankError: bank.json is damaged, or of a newer schema.
    """
    require_bank(path)
    where = path / "bank.json"
    raw = read_json(where)
    if raw.get("format") != "synthkit-bank":
        raise BankError(f"{where}: is not the record of a synthkit bank", got=raw.get("format"))
    lifted = migrate.bank_record(raw, where)
    plan = raw.get("plan")
    if not isinstance(plan, dict):
        raise BankError(f"{where}: has no plan")
    for key in ("versions", "hardware"):
        if not isinstance(raw.get(key, {}), dict):
            raise BankError(f"{where}: {key} must be an object", got=type(raw[key]).__name__)
    keys = ("shape", "num_classes", "mean", "std", "class_names", "label_kind", "recipe", "teacher", "real_data_used",
            "contains_real", "parents", "extra", "top_k", "transform")  # fmt: skip
    numbers = ("images", "images_per_shard", "seed")
    missing = [k for k in keys if k not in lifted] + [k for k in numbers if k not in plan]
    if missing:
        raise BankError(f"{where}: lacks {', '.join(missing)}")
    try:
        planned = {k: plan[k] for k in numbers}
        spec = BankSpec(**planned, **{k: lifted[k] for k in keys})
    except ConfigError as error:
        raise BankError(f"{where}: {error}") from error
    if plan.get("shards") != spec.shards or plan["images_per_shard"] is None:
        raise BankError(f"{where}: the plan does not add up", got=plan)
    if not isinstance(raw.get("uuid"), str) or not re.fullmatch(r"[0-9a-fA-F-]{1,64}", raw["uuid"]):
        raise BankError(f"{where}: uuid is malformed", got=raw.get("uuid"))
    return spec, raw


def differences(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    """Readable `key: ours -> theirs` lines of two nested dicts."""
    lines: list[str] = []
    for key in sorted({*ours, *theirs}):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines
