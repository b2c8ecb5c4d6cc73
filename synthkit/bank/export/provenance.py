"""synthkit.json and README.md of an export: where the images come from, whatever format they are in.

synthkit.json (version 1):
    format "synthkit-export", version, to (name of the export format), options (of that format), files (facts of it)
    images, shape [C, H, W], num_classes, class_names (exactly as in the bank), class_counts, mean, std, label_kind,
    top_k, columns (what this export holds), left_out (columns of the bank that it does not hold), labels_from
    learning_rate (of a distilled set, or null), transform (of images_f16, as in bank.json; {} where there is none)
    real_data_used, contains_real, origin (the same as a sentence)
    bank {uuid, schema, root, seal, complete, recipe_hash, record}: root is null for an unfinished bank, seal for an
        unsealed one; record is the whole bank.json
    notes (what the user was told)
Nothing in it depends on when, where or by whom the export was made: two exports of a bank are equal byte for byte.
"""

from __future__ import annotations

from typing import Any

from synthkit.bank import card, seal
from synthkit.bank.disk.storage import dump_json, plain, read_json
from synthkit.bank.export.base import Format
from synthkit.bank.export.source import Source

VERSION = 1


def provenance(source: Source, to: str, made: Format) -> dict[str, Any]:
    """The content of synthkit.json, all but `files`."""
    bank, spec = source.bank, source.spec
    manifest = bank.path / "manifest.json"
    return {
        "format": "synthkit-export", "version": VERSION, "to": to, "options": plain(made.options, "options"),
        "images": source.count, "shape": list(spec.shape), "num_classes": spec.num_classes,
        "class_names": spec.class_names, "class_counts": source.class_counts(), "mean": spec.mean, "std": spec.std,
        "label_kind": source.label_kind, "top_k": source.top_k, "columns": made.columns,
        "left_out": [c for c in source.columns if c not in made.columns], "labels_from": source.labels_from,
        "learning_rate": source.learning_rate(), "transform": spec.transform,
        "real_data_used": spec.real_data_used, "contains_real": spec.contains_real, "origin": card.origin_line(spec),
        "bank": {
            "uuid": bank.record["uuid"], "schema": bank.record["schema"], "complete": source.complete,
            "root": seal.root_hash(bank.sidecars) if source.complete else None,
            "seal": read_json(manifest).get("seal") if manifest.exists() else None,
            "recipe_hash": bank.record.get("recipe_hash"), "record": bank.record,
        },
        "notes": made.notes,
    }  # fmt: skip


def record_bytes(facts: dict[str, Any], files: dict[str, Any]) -> bytes:
    """The file synthkit.json."""
    return dump_json({**facts, "files": files})


def readme(source: Source, made: Format, facts: dict[str, Any]) -> bytes:
    """The file README.md: the bank's card, told for this export. Everything from the bank is escaped."""
    import yaml

    notes = "".join(f"- {card.escape(note)}\n" for note in made.notes)
    loading = f"```python\n{made.usage().strip()}\n```\n" + (f"\n{notes}" if notes else "")
    loading += (
        "\n`synthkit.json` holds provenance (the whole `bank.json`), class names and normalisation, for programs."
    )
    text = card.body(source.spec, source.bank.record, source.bank.sidecars, root=facts["bank"]["root"],
                     seal=facts["bank"]["seal"], loading=loading, columns=made.columns)  # fmt: skip
    meta = yaml.safe_dump(made.front(), sort_keys=False, allow_unicode=False, width=1000)
    return f"---\n{meta}---\n\n{text}".encode()
