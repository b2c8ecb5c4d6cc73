"""`labels_from`: another teacher's labels in place of the bank's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthkit.bank import Bank, LabelSpec, LabelWriter
from synthkit.bank.export import export
from synthkit.bank.labels.topk import compress_topk
from synthkit.bank.labels.views import ViewDraw, ViewPolicy
from synthkit.errors import BankError, RequirementError, UsageError

from .exports import HOSTILE, make, same, stored

TOPK = ("topk_index", "topk_logit", "tail_logsumexp")


def relabel(bank: Bank, *, kind: Any = "images", top_k: int | None = None, shards: int | None = None) -> np.ndarray:
    """Add the label set "other" of random logits; returns them."""
    count = len(bank) * (2 if kind == "views" else 1)
    size = bank.shape[1:] if kind == "views" else None
    spec = LabelSpec(kind=kind, bank=bank.record["uuid"], images=len(bank), rows=count, num_classes=len(HOSTILE),
                     top_k=top_k, size=size, rows_per_shard=7)  # fmt: skip
    writer = LabelWriter.create(bank.path, "other", spec)
    logits = np.random.default_rng(8).normal(scale=4, size=(count, len(HOSTILE))).astype(np.float16)
    for index in range(writer.spec.shards if shards is None else shards):
        part = slice(index * 7, index * 7 + spec.shard_size(index))
        rows: dict[str, Any] = {"logits": logits[part]}
        if top_k:
            rows = dict(zip(TOPK, compress_topk(logits[part], top_k), strict=True))
        if kind == "views":
            draw = ViewDraw(ViewPolicy(epochs=2), images=len(bank), source=size, size=size, seed=1)  # type: ignore[arg-type]
            rows |= draw.rows(part.start, part.stop)
        writer.write_shard(index, rows)
    return logits


def load(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "bank.npz") as found:
        return dict(found)


def test_all_logits_of_another_teacher(tmp_path):
    bank = make(tmp_path / "b", top_k=2)
    logits = relabel(bank)
    out = export(bank, "npz", tmp_path / "o", labels_from="other")
    found = load(out)
    same(found["logits"], logits)
    same(found["labels"], logits.argmax(1), np.int32)
    same(found["images"], stored(bank)["images"])
    assert not set(TOPK) & set(found)  # those of the bank's own teacher would contradict
    record = json.loads((out / "synthkit.json").read_text(encoding="utf-8"))
    assert record["labels_from"] == "other" and record["label_kind"] == "argmax" and record["top_k"] is None
    assert record["class_counts"] == np.bincount(logits.argmax(1), minlength=5).tolist()


def test_top_k_of_another_teacher(tmp_path):
    bank = make(tmp_path / "b")
    logits = relabel(bank, top_k=3)
    found = load(export(bank, "npz", tmp_path / "o", labels_from="other"))
    index, logit, tail = compress_topk(logits, 3)
    same(found["topk_index"], index, np.uint16)
    same(found["topk_logit"], logit)
    same(found["tail_logsumexp"], tail)
    same(found["labels"], index[:, 0], np.int32)
    assert "logits" not in found


def test_a_bank_without_labels_gets_some(tmp_path):
    bank = make(tmp_path / "b", labels=False, logits=False)
    logits = relabel(bank)
    out = export(bank, "imagefolder", tmp_path / "o", labels_from="other")
    filled = [len(list((out / place).iterdir())) for place in sorted(p.name for p in out.iterdir() if p.is_dir())]
    assert filled == np.bincount(logits.argmax(1), minlength=5).tolist()


def test_what_is_no_label_per_image_is_refused(tmp_path):
    bank = make(tmp_path / "b")
    with pytest.raises(UsageError, match="no such label set"):
        export(bank, "npz", tmp_path / "o", labels_from="other")
    relabel(bank, kind="views")
    with pytest.raises(RequirementError, match="views"):
        export(bank, "npz", tmp_path / "o", labels_from="other")
    assert not (tmp_path / "o").exists()


def test_unfinished_and_damaged_sets_are_refused(tmp_path):
    for name, shards in (("a", 2), ("b", None)):
        relabel(make(tmp_path / name), shards=shards)
    with pytest.raises(BankError, match="unfinished"):
        export(tmp_path / "a", "npz", tmp_path / "o", labels_from="other")
    shard = tmp_path / "b" / "labels" / "other" / "00001.h5"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(BankError, match="sha256"):
        export(tmp_path / "b", "npz", tmp_path / "o", labels_from="other")
    assert not (tmp_path / "o").exists()
