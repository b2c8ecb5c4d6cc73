"""README.md of a bank: what is in it and where it comes from, for people and for the Hub. All from outside is escaped.

`front_matter` and `body` serve exports too: an exported dataset carries the same provenance as the bank.
"""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from synthkit.bank.disk.storage import read_json
from synthkit.bank.shard import Sidecar
from synthkit.bank.spec import BankSpec
from synthkit.errors import BankError
from synthkit.tables import methods

LABEL_MEANINGS = {
    "argmax": "the class that the teacher names (argmax of its logits); no person has checked them",
    "target": "the class that the method was asked to make; no person has checked them",
    "real": "labels of a real data set",
    "none": "none: the images are unlabelled",
}
COLUMN_MEANINGS = {
    "images": "the pictures, uint8 in 0 to 255, not normalised",
    "images_f16": "the pixels to train on where they leave [0, 1], float16 (how: `Bank.transform()`)",
    "labels": "class number, int32",
    "logits": "all logits of the teacher, float16",
    "topk_index": "classes of the teacher's largest logits",
    "topk_logit": "the teacher's largest logits, float16",
    "tail_logsumexp": "logsumexp of all other logits, float32",
    "difficulty": "how hard the image was for the reference student, float32 (larger is harder)",
    "origin_step": "step of the run that made the image",
    "origin_seed": "seed of the run that made the image",
}
# identifiers that the Hugging Face Hub knows; anything else is "other" with its name
HUB_LICENCES = (
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0",
    "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "odc-by", "odbl", "pddl", "gpl-3.0",
)  # fmt: skip
REAL_LABEL = "contains real images"


def escape(value: object) -> str:
    """`value` as one line of Markdown text: no markup, links, HTML or table breaks come through."""
    return re.sub(r"([\\`*_\[\]!|~#])", r"\\\1", html.escape(_line(value), quote=False))


def _line(value: object, limit: int = 300) -> str:
    """`value` as one printable line."""
    return re.sub(r"\s+", " ", "".join(c for c in str(value) if c.isprintable() or c.isspace()))[:limit]


def origin_line(spec: BankSpec) -> str:
    """One plain sentence on real data in this bank."""
    if spec.contains_real:
        return "Contains real pixels: the images are, or start from, real images."
    if spec.real_data_used:
        return "Real data was used in making it; no image is a real one."
    return "Made without any real data."


def method_of(spec: BankSpec) -> str:
    """Name of the method that made the images; the recipe holds it plainly or as the name of the method's section."""
    method = spec.recipe.get("method")
    name = method.get("name") if isinstance(method, dict) else method
    return name if isinstance(name, str) else "not recorded"


def licence_of(spec: BankSpec) -> str | None:
    """The licence recorded for the images (`extra.licence`, else those of the parents); None where there is none."""
    known: list[str] = []
    parents = [p.get("extra") for p in spec.parents if isinstance(p, dict)]
    for facts in [spec.extra] if _licence(spec.extra) else parents:
        found = _licence(facts)
        if found and found not in known:
            known.append(found)
    return "; ".join(known) or None


def _licence(facts: object) -> str | None:
    found = (facts.get("licence") or facts.get("license")) if isinstance(facts, dict) else None
    return found if isinstance(found, str) and found.strip() else None


def size_category(images: int) -> str:
    """The Hub's word for a number of images."""
    names = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
    for power, name in enumerate(names):
        if images < 10 ** (power + 3):
            return f"{names[power - 1]}<n<{name}" if power else "n<1K"
    return "n>1T"


def front_matter(
    spec: BankSpec, record: Mapping[str, Any], sidecars: Sequence[Sidecar], *, name: str | None = None
) -> dict[str, Any]:
    """The metadata block of a Hugging Face dataset card, as plain strings and lists that YAML can hold.

    Args:
        name: how the data set is called; none makes a name from method and teacher.

    Returns:
        license (and license_name where the Hub does not know it), tags, size_categories, pretty_name, task_categories.
    """
    images = sum(s.n for s in sidecars)
    method = re.sub(r"[^a-z0-9]+", "-", _line(method_of(spec), 60).lower()).strip("-") or "unknown"
    licence = licence_of(spec)
    known = (licence or "unknown").strip().lower().replace(" ", "-")
    data: dict[str, Any] = {"license": known if known in HUB_LICENCES or licence is None else "other"}
    if data["license"] == "other":
        data["license_name"] = _line(licence, 100)
    origin = "contains-real-images" if spec.contains_real else "synthetic"
    data["pretty_name"] = _line(name, 100) if name else title(spec)
    data["size_categories"] = [size_category(images)]
    data["tags"] = ["synthkit", origin, "knowledge-distillation", "dataset-distillation", method]
    if not (spec.real_data_used or spec.contains_real):
        data["tags"].insert(2, "data-free")
    data["task_categories"] = ["image-classification"]
    return data


def title(spec: BankSpec) -> str:
    """A name for the bank, for people: `cudfkd images of lenet5_bn (1 x 32 x 32, 10 classes)`."""
    teacher = _line(spec.teacher.get("name") or spec.teacher.get("arch") or "", 60)
    size = " x ".join(map(str, spec.shape))
    made = method_of(spec) in methods()  # not from arrays, files or other banks
    what = f"{_line(method_of(spec), 60)} images" if made else "Images"
    what += f" of {teacher}" if teacher else ""
    return f"{what} ({size}, {spec.num_classes} classes)"


def render(
    spec: BankSpec, record: Mapping[str, Any], sidecars: Sequence[Sidecar], root: str, *, seal: str | None = None,
    results: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """The whole card of a bank: front matter and body; arguments as `body`."""
    import yaml

    meta = yaml.safe_dump(front_matter(spec, record, sidecars), sort_keys=False, allow_unicode=False, width=1000)
    return f"---\n{meta}---\n\n{body(spec, record, sidecars, root=root, seal=seal, results=results)}"


def body(
    spec: BankSpec, record: Mapping[str, Any], sidecars: Sequence[Sidecar], *, root: str | None = None,
    seal: str | None = None, results: Mapping[str, Any] | None = None, loading: str | None = None,
    columns: Sequence[str] | None = None, name: str | None = None,
) -> str:  # fmt: skip
    """The Markdown below the front matter.

    Args:
        record: bank.json.
        root, seal: hashes of the manifest, where there is one.
        results: run.json of the run that made the bank; its measured figures are shown.
        loading: Markdown of the section on loading (exports say how their own files are read); none tells about banks.
            It is put in as it is: nothing from a file may stand in it unescaped.
        columns: the columns that an export holds; none names those of the bank.
        name: the heading; none makes one from method and teacher.
    """
    if columns is None:
        columns = [c for c in COLUMN_MEANINGS if sidecars and all(c in s.datasets for s in sidecars)]
    parts = [
        [f"# {escape(name or title(spec))}", "", f"**{origin_line(spec)}**", ""],
        _overview(spec, record, sidecars),
        _columns(spec, sidecars, columns),
        _making(spec),
        _results(results),
        _lineage(spec),
        _privacy(spec),
        ["## Loading", "", loading.strip() if loading else _LOADING, ""],
        _identity(spec, record, root, seal),
    ]
    return "\n".join(line for part in parts for line in part)


def _table(rows: Mapping[str, object], head: str = "| | |") -> list[str]:
    lines = [f"| {escape(k)} | {escape(v)} |" for k, v in rows.items() if v is not None]
    return [head, "|---|---|", *lines, ""] if lines else []


def _overview(spec: BankSpec, record: Mapping[str, Any], sidecars: Sequence[Sidecar]) -> list[str]:
    count, size = sum(s.n for s in sidecars), " x ".join(map(str, spec.shape))
    images = f"{count:,}" if count == spec.images else f"{count:,} of {spec.images:,} (unfinished)"
    rows = {
        "images": f"{images}, uint8, {size} (channels x height x width)",
        "classes": spec.num_classes,
        "labels": LABEL_MEANINGS[spec.label_kind],
        "real pixels": "yes" if spec.contains_real else "no",
        "real data used": "yes" if spec.real_data_used or spec.contains_real else "no",
        "method": method_of(spec),
        "teacher": _teacher(spec.teacher) or "none",
        "licence": licence_of(spec) or "not stated",
        "created": record.get("created"),
    }
    return _table(rows)


def _teacher(teacher: Mapping[str, Any]) -> str | None:
    name, arch = teacher.get("name"), teacher.get("arch")
    if name and arch and name != arch:
        return f"{name} ({arch})"
    return name or arch


def _columns(spec: BankSpec, sidecars: Sequence[Sidecar], columns: Sequence[str]) -> list[str]:
    lines = ["## What is in it", "", *_table({c: COLUMN_MEANINGS.get(c, "") for c in columns}, "| column | meaning |")]
    counts = _counts(sidecars)
    facts = {
        "mean difficulty": _mean(sidecars, "mean_difficulty", "{:.4g}"),
        "mean confidence of the teacher": _mean(sidecars, "mean_confidence", "{:.2%}"),
        "labels that are the argmax of the stored logits": _mean(sidecars, "teacher_agreement", "{:.2%}"),
        "images per class": f"{min(counts):,} to {max(counts):,}" if counts else None,
    }
    lines += _table(facts)
    if spec.class_names and spec.num_classes <= 50:
        shown = (f"{escape(n)} ({counts[i]:,})" if counts else escape(n) for i, n in enumerate(spec.class_names))
        lines += [f"Classes: {', '.join(shown)}", ""]
    elif spec.class_names:
        lines += [f"Classes: {', '.join(escape(n) for n in spec.class_names[:50])}, ...", ""]
    return lines


def _counts(sidecars: Sequence[Sidecar]) -> list[int] | None:
    histograms = [s.raw.get("label_histogram") for s in sidecars]
    if not histograms or any(h is None for h in histograms):
        return None
    return [sum(column) for column in zip(*histograms, strict=True)]  # type: ignore[arg-type]  # None is ruled out


def _mean(sidecars: Sequence[Sidecar], key: str, form: str) -> str | None:
    values = [(s.n, s.raw.get(key)) for s in sidecars]
    total = sum(n for n, _ in values)
    if not total or any(v is None for _, v in values):
        return None
    return form.format(sum(n * float(v) for n, v in values if v is not None) / total)


def _making(spec: BankSpec) -> list[str]:
    teacher = spec.teacher
    rows = {
        "method": method_of(spec),
        "source of the method": spec.extra.get("citation"),
        "teacher": _teacher(teacher),
        "teacher's weights, sha256": teacher.get("sha256"),
        "teacher's accuracy (its card)": _accuracy(teacher.get("accuracy")),
        "teacher's licence": teacher.get("licence"),
        "teacher's source": teacher.get("source"),
        "seed": spec.seed,
    }
    lines = ["## How it was made", "", *_table(rows)]
    command = remake_command(spec)
    if command:
        lines += ["The command that makes it again:", "", "```", command, "```", ""]
    return [*lines, "The whole recipe is in `bank.json`.", ""]


def _accuracy(value: object) -> str | None:
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {v}" for k, v in value.items()) or None
    return None if value is None else str(value)


def remake_command(spec: BankSpec) -> str | None:
    """The `synthkit synthesize` line that makes this bank again; None for a bank that no such line makes.

    Every word is quoted for a shell; a recipe with keys that are no option names gives None.
    """
    method, teacher, data = spec.recipe.get("method"), spec.teacher.get("spec"), spec.recipe.get("data")
    if not isinstance(method, dict) or method_of(spec) not in methods() or spec.parents:
        return None
    kind = data.get("name") if isinstance(data, dict) else None
    if not (teacher or kind) or not isinstance(teacher or "", str):
        return None
    own = {"teacher", "method", "data", "images", "images_per_shard", "seed"}
    options: dict[str, object] = {
        "teacher": teacher or None, "method": method["name"], "data": f"{kind}:PATH" if kind else None,
        "images": spec.images, "images_per_shard": spec.images_per_shard, "seed": spec.seed,
        **{k: v for k, v in spec.recipe.items() if k not in own},
        **{f"method.{k}": v for k, v in method.items() if k != "name"},
    }  # fmt: skip
    words = []
    for key, value in options.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]*", key) or isinstance(value, dict):
            return None
        if value is not None:
            words += [f"--{key}", _word(value)]
    return f"synthkit synthesize {' '.join(words)} --out DIR"


def _word(value: object) -> str:
    """`value` as one word of a command line inside a code block: quoted, printable, no fence."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        value = "[" + ",".join(_line(v) for v in value) + "]"
    return shlex.quote(_line(value).replace("`", ""))


def run_record(bank: Path) -> dict[str, Any] | None:
    """run.json of the run that made the bank at `bank`; None where there is none to read."""
    try:
        return read_json(bank / "run.json")
    except BankError:  # no part of the sealed bank: a card can do without it
        return None


def _results(run: Mapping[str, Any] | None) -> list[str]:
    """Figures that were measured on real test data by the run that made the bank."""
    student = (run or {}).get("student")
    if not run or not isinstance(student, Mapping):
        return []
    config = run.get("config")
    data = config.get("eval_data") if isinstance(config, Mapping) else None
    rows = {
        "student trained along with it, top-1": _percent(student.get("test_top1")),
        "teacher, top-1": _percent(student.get("teacher_top1")),
        "agreement of the two": _percent(student.get("test_agreement")),
        "test images": student.get("test_n"),
        "test data": data.partition(":")[0] if isinstance(data, str) else None,  # a path tells of a machine, not a bank
    }
    shown = _table(rows)
    note = "Measured once, on real test data that took no part in the making (run.json)."
    return ["## Results", "", *shown, note, ""] if shown else []


def _percent(value: object) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        return None
    return f"{100 * value:.2f} %"


def _lineage(spec: BankSpec) -> list[str]:
    if not spec.parents:
        return []
    lines = ["## Made from", ""]
    for parent in spec.parents[:50]:
        words = parent.items() if isinstance(parent, Mapping) else [("bank", parent)]
        lines.append("- " + ", ".join(f"{escape(k)}: {escape(v)}" for k, v in words if not isinstance(v, (dict, list))))
    if len(spec.parents) > 50:
        lines.append(f"- ... {len(spec.parents)} in all, listed in `bank.json`")
    return [*lines, ""]


def _privacy(spec: BankSpec) -> list[str]:
    if spec.contains_real:
        text = "The images are real ones or start from real ones: all duties that come with the real data stay."
    else:
        text = (
            "The images are synthetic. They come from a classifier that was trained on real data and can carry traces "
            "of it; being synthetic is no privacy guarantee."
        )
    ask = "`synthkit bank audit DIR --real DATA` looks for copies of real images and says what it found."
    return ["## Real data and privacy", "", f"{text} {ask}", ""]


_LOADING = """With synthkit (memory-mapped, every file checked against its record):

```python
from synthkit.bank import Bank

bank = Bank("DIR")
batch = bank[:64]          # batch.images is uint8 (64, C, H, W), batch.labels, ...
```

Without it: the shards are plain HDF5 files, one contiguous dataset per column.

```python
import glob, h5py

for name in sorted(glob.glob("DIR/shards/*.h5")):
    with h5py.File(name) as shard:
        images = shard["images"][:]   # uint8 (N, C, H, W)
```

```
synthkit bank verify DIR      # whether every byte is there
synthkit distill --bank DIR --student NAME
synthkit export --bank DIR --format imagefolder --out OTHER
```"""


def _identity(spec: BankSpec, record: Mapping[str, Any], root: str | None, seal: str | None) -> list[str]:
    versions = record.get("versions")
    rows = {
        "uuid": record.get("uuid"),
        "shards": spec.shards,
        "recipe hash": record.get("recipe_hash"),
        "root hash (what the shards hold)": root,
        "seal (the whole manifest)": seal,
        "synthkit": versions.get("synthkit") if isinstance(versions, Mapping) else None,
        "format": f"schema {_line(record.get('schema'), 10)}",
    }
    return ["## Identity", "", *_table(rows)]
