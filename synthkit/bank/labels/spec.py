"""What a label set is (`LabelSpec`), its form on disk (labels.json) and the names of its files. See labels.py."""

from __future__ import annotations

import datetime
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from synthkit.bank import migrate
from synthkit.bank.disk.storage import canonical_hash, names_in, plain, read_json
from synthkit.bank.shard import TOPK, Layout, Sidecar, check_record, committed_in
from synthkit.bank.spec import MAX_CLASSES, MAX_IMAGES, MAX_SHARDS, MAX_SIDE, SCHEMA, version
from synthkit.errors import BankError, ConfigError, UsageError

LABEL_SHARD_BYTES = 8 << 20  # less than an image shard: rows are small, and each of them costs a teacher's forward
Kind = Literal["images", "views"]
KINDS = ("images", "views")
MAX_NAME = 64


@dataclass(frozen=True, kw_only=True)
class LabelSpec:
    """What a label set is. Two specs with equal `identity()` have equal shards."""

    kind: Kind
    """images: a row per image of the bank; views: a row per view."""
    bank: str
    """uuid of the bank."""
    images: int
    """Images of the finished bank."""
    rows: int
    """Rows of the finished set."""
    num_classes: int
    """Classes of the teacher."""
    top_k: int | None = None
    """k of the stored top-k; none stores all logits."""
    size: tuple[int, int] | None = None
    """(height, width) of the views; None for kind images."""
    rows_per_shard: int | None = None
    """Rows in every shard but the last; none plans 20 shards or more, of at most 8 MiB."""
    teacher: dict[str, Any] = field(default_factory=dict)
    """spec, arch, sha256 of the weights, accuracy, licence."""
    policy: dict[str, Any] = field(default_factory=dict)
    """How the labels were made: name, seed, views, mode of the teacher's BatchNorm, batch (distillation/relabel.py)."""

    def __post_init__(self):
        _check_spec(self)
        put = object.__setattr__
        if self.size is not None:
            put(self, "size", (int(self.size[0]), int(self.size[1])))
        if self.rows_per_shard is None:
            put(self, "rows_per_shard", plan_rows_per_shard(self.rows, self.row_bytes))
        if self.shards > MAX_SHARDS:
            raise ConfigError(f"labels: more than {MAX_SHARDS} shards", got=self.shards, hint="raise rows_per_shard")
        for name in ("teacher", "policy"):
            put(self, name, plain(getattr(self, name), name))

    @property
    def layout(self) -> Layout:
        """Columns of the shards: stored dtypes and row shapes, in order. All of them are required."""
        sample = np.dtype("<u4" if self.images <= 1 << 32 else "<u8")
        partner = np.dtype("<u4" if self.rows <= 1 << 32 else "<u8")
        f4, columns = np.dtype("<f4"), {}
        if self.kind == "views":
            columns = {
                "sample": (sample, ()), "crop": (f4, (4,)), "flip": (np.dtype("|u1"), ()), "partner": (partner, ()),
                "mix_lambda": (f4, ()), "mix_box": (np.dtype("<u2"), (4,)),
            }  # fmt: skip
        if self.top_k is None:
            columns["logits"] = (np.dtype("<f2"), (self.num_classes,))
        else:
            index = np.dtype("<u2" if self.num_classes <= 1 << 16 else "<u4")
            entry = (index, (self.top_k,)), (np.dtype("<f2"), (self.top_k,)), (f4, ())
            columns.update(zip(TOPK, entry, strict=True))
        return Layout(columns=columns, required=tuple(columns))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.layout.columns.values())

    @property
    def per_shard(self) -> int:
        """Rows in every shard but the last."""
        assert self.rows_per_shard is not None  # set in __post_init__
        return self.rows_per_shard

    @property
    def shards(self) -> int:
        """Number of shards of the finished set."""
        return -(-self.rows // self.per_shard)

    @property
    def planned_bytes(self) -> int:
        """Upper estimate of the bytes of the finished set."""
        return self.rows * self.row_bytes + self.shards * (8 << 10)

    def shard_size(self, index: int) -> int:
        """Rows in shard `index`."""
        if not 0 <= index < self.shards:
            raise ConfigError(f"labels: the set has shards 0 to {self.shards - 1}", got=index)
        return min(self.per_shard, self.rows - index * self.per_shard)

    def identity(self) -> dict[str, Any]:
        """What decides the bytes of the shards."""
        return {
            "kind": self.kind, "bank": self.bank, "images": self.images, "rows": self.rows,
            "rows_per_shard": self.rows_per_shard, "num_classes": self.num_classes, "top_k": self.top_k,
            "size": None if self.size is None else list(self.size), "policy": self.policy,
            "teacher_sha256": self.teacher.get("sha256"),
        }  # fmt: skip

    def identity_hash(self) -> str:
        """sha256 of the identity."""
        return canonical_hash(self.identity())


def plan_rows_per_shard(rows: int, row_bytes: int, multiple: int = 1) -> int:
    """Rows per shard: at least 20 shards, each of about 8 MiB at most and of a multiple of `multiple` rows."""
    wanted = max(1, min(-(-rows // 20), LABEL_SHARD_BYTES // row_bytes))
    return -(-wanted // multiple) * multiple


def _check_spec(spec: LabelSpec) -> None:
    def need(ok: bool, what: str, got: object) -> None:
        if not ok:
            raise ConfigError(f"labels: {what}", got=got)

    def is_int(value: object, low: int, high: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    if spec.kind not in KINDS:
        raise ConfigError("labels: kind", got=spec.kind, allowed=KINDS)
    need(isinstance(spec.bank, str) and re.fullmatch(r"[0-9a-fA-F-]{1,64}", spec.bank) is not None,
         "bank must be its uuid", spec.bank)  # fmt: skip
    need(is_int(spec.images, 1, MAX_IMAGES), f"images must be 1 to {MAX_IMAGES}", spec.images)
    need(is_int(spec.rows, 1, MAX_IMAGES), f"rows must be 1 to {MAX_IMAGES}", spec.rows)
    need(spec.kind == "views" or spec.rows == spec.images, f"kind images has {spec.images} rows", spec.rows)
    need(is_int(spec.num_classes, 1, MAX_CLASSES), f"num_classes must be 1 to {MAX_CLASSES}", spec.num_classes)
    need(spec.top_k is None or is_int(spec.top_k, 1, spec.num_classes - 1),
         f"top_k must be 1 to {spec.num_classes - 1} (one less than the classes)", spec.top_k)  # fmt: skip
    need(spec.rows_per_shard is None or is_int(spec.rows_per_shard, 1, MAX_IMAGES),
         "rows_per_shard must be at least 1", spec.rows_per_shard)  # fmt: skip
    if spec.kind == "images":
        need(spec.size is None, "kind images has no size", spec.size)
    else:
        size = spec.size
        need(isinstance(size, (list, tuple)) and len(size) == 2 and all(is_int(v, 1, MAX_SIDE) for v in size),
             f"size must be (height, width), each 1 to {MAX_SIDE}", size)  # fmt: skip
    for name in ("teacher", "policy"):
        need(isinstance(getattr(spec, name), dict), f"{name} must be an object", getattr(spec, name))


def check_name(name: str) -> str:
    """`name` itself when it may be a label set's: a-z, 0-9, _ and -, at most 64, not beginning with a sign.

    Raises:
        UsageError: it may not; a name that may is offered.
    """
    if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name):
        return name
    close = re.sub(r"[^a-z0-9_-]+", "-", name.lower()).lstrip("_-")[:MAX_NAME]
    hint = "a-z, 0-9, _ and -, at most 64" + (f"; e.g. {close}" if close else "")
    raise UsageError("labels: not a name for a label set", got=name, hint=hint)


def set_path(bank: Path, name: str) -> Path:
    """The folder of label set `name` of the bank at `bank`."""
    return bank / "labels" / check_name(name)


def label_sets(bank: Path) -> list[str]:
    """Names of the label sets of the bank at `bank`, finished or not, sorted."""
    found = [n for n in names_in(bank / "labels") if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", n)]
    return [name for name in found if os.path.lexists(bank / "labels" / name / "labels.json")]


def record_of(spec: LabelSpec, name: str) -> dict[str, Any]:
    """The content of labels.json for a new set."""
    columns = {n: [dtype.str, *shape] for n, (dtype, shape) in spec.layout.columns.items()}
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "format": "synthkit-labels", "schema": SCHEMA, "min_reader": 2, "name": name, "columns": columns,
        "created": now.isoformat(timespec="seconds"), "version": version(), "teacher": spec.teacher,
        **{k: v for k, v in spec.identity().items() if k != "teacher_sha256"},
    }  # fmt: skip


def read_label_record(folder: Path) -> tuple[LabelSpec, dict[str, Any]]:
    """The spec of the label set in `folder` and its labels.json.

    Raises:
        BankError: labels.json is missing, damaged, or of a newer schema.
    """
    where = folder / "labels.json"
    raw = read_json(where)
    if raw.get("format") != "synthkit-labels":
        raise BankError(f"{where}: is not the record of a label set", got=raw.get("format"))
    reader = raw.get("min_reader")
    if not isinstance(reader, int) or isinstance(reader, bool):
        raise BankError(f"{where}: min_reader must be a number", got=reader)
    if reader > SCHEMA:
        raise migrate.newer_schema(where, raw.get("schema"))
    keys = ("kind", "bank", "images", "rows", "rows_per_shard", "num_classes", "top_k", "size", "teacher", "policy")
    missing = [key for key in (*keys, "columns") if key not in raw]
    if missing or raw.get("rows_per_shard") is None:
        raise BankError(f"{where}: lacks {', '.join(missing) or 'rows_per_shard'}")
    try:
        spec = LabelSpec(**{key: raw[key] for key in keys})
    except ConfigError as error:
        raise BankError(f"{where}: {error}") from error
    columns = {n: [dtype.str, *shape] for n, (dtype, shape) in spec.layout.columns.items()}
    if raw["columns"] != columns:
        raise BankError(f"{where}: columns do not follow from kind and top_k", got=raw["columns"])
    return spec, raw


def label_file(folder: Path, index: int) -> Path:
    """The HDF5 file of shard `index` of the label set in `folder`."""
    return folder / f"{index:05d}.h5"


def committed_labels(folder: Path, spec: LabelSpec) -> list[int]:
    """Shards of the set in `folder` that have a record, ascending."""
    return committed_in(folder, spec.shards)


def read_label_sidecar(path: Path, index: int, spec: LabelSpec) -> Sidecar:
    """The checked commit record in `path`. Raises `BankError`."""
    raw = migrate.sidecar(read_json(path), path)
    return check_record(raw, str(path), index, spec.shard_size(index), spec.layout)
