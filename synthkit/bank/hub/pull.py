"""Pulling a bank from the Hub: pinned to one commit, resumable, every hash checked before a bank appears.

The work lies in a hidden sibling `.<name>.pull` of the target. It stays after a failure or a kill, so that the next
pull fetches only what is missing: files are recognised by their sha256, a file that was cut goes on where it ended.
Order of trust: the manifest (whose own hash may be given with `expect`) names the sha256 of bank.json and of every
record and shard; nothing is parsed before its bytes are the named ones, and the HDF5 parser is not used at all.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthkit.bank import seal
from synthkit.bank.disk.lock import claim
from synthkit.bank.disk.storage import (
    canonical_hash,
    dump_json,
    publish,
    read_json,
    require_free,
    storage_errors,
    sync_folder,
    sync_tree,
)  # fmt: skip
from synthkit.bank.hub.common import (
    MAX_CARD,
    Repo,
    client,
    is_bank_file,
    remote_files,
    resolve_commit,
)  # fmt: skip
from synthkit.bank.hub.fetch import Fetch, Wanted
from synthkit.bank.reader import Bank
from synthkit.bank.shard import file_sha256
from synthkit.bank.spec import read_record
from synthkit.errors import BankError, UsageError

MAX_GENERATOR = 1 << 32
"""Bytes of a generator snapshot of an old bank at most."""
_SHA = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """What a pull did."""

    bank: Bank
    repo: str
    commit: str
    seal: str | None
    files: int
    bytes: int
    """Bytes of all files."""
    fetched: int
    """Bytes that were transferred now; less when a pull went on."""
    left_out: list[str]
    """Files of the repository that are no part of a bank."""


def pull(
    repo: Repo,
    out: str | Path,
    *,
    expect: str | None = None,
    labels: bool = True,
    endpoint: str | None = None,
    token: str | None = None,
    said: Callable[[str], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Pulled:
    """Fetch the bank in `repo` into a new folder `out`.

    Args:
        expect: the seal (of a schema 1 bank: the root hash) that the bank must have.
        labels: whether its label sets are fetched too.
        said: is called with lines for the user; progress: with numbers of bytes that arrived (or were there already).

    Raises:
        HubError: no such repository or revision, no permission, no network; the repository holds no sealed bank.
        BankError: a file is not what the manifest says, or the bank is not the expected one.
        OutputExistsError: `out` exists. StorageError: no room, disk full. BankBusyError: another pull works there.
    """
    if expect is not None and not _SHA.fullmatch(expect):
        raise UsageError("pull: --expect must be the 64 hex digits of a seal", got=expect)
    out = Path(out)
    require_free(out)
    target = Path(os.path.realpath(out)) if out.is_symlink() else out.absolute()
    api = client(endpoint, token)
    commit = resolve_commit(api, repo)
    say = said or (lambda text: None)
    work = target.with_name(f".{target.name}.pull")
    with storage_errors("pull", work):
        work.mkdir(parents=True, exist_ok=True)
    with _tidied(work), claim(work):
        fetch = Fetch(api, repo, commit, work, token, progress or (lambda count: None))
        say(f"{repo.name} at commit {commit}")
        fetch.start(remote_files(api, repo, commit))
        fetch.get([Wanted("manifest.json", None, None), Wanted("bank.json", None, None)])
        manifest = _manifest(fetch.folder, repo, expect)
        wanted = [*_covered(manifest), *_extras(fetch, labels), *_of_schema_1(fetch, manifest)]
        if labels:
            wanted += _label_shards(fetch, manifest["uuid"])
        fetch.require(wanted, target, say)
        fetch.get(wanted)
        fetch.drop_others()
        _check_whole(fetch.folder)
        facts = {"repo": repo.name, "revision": repo.revision, "commit": commit, "seal": manifest.get("seal"),
                 "root": manifest["root"], "expected": expect, "pulled": round(time.time(), 3)}  # fmt: skip
        with storage_errors("pull", target):
            publish(fetch.folder / "state" / "pulled.json", dump_json(facts))
            sync_tree(fetch.folder)
            require_free(out)
            os.rename(fetch.folder, target)
            sync_folder(target.parent)
    return Pulled(
        bank=Bank(out), repo=repo.name, commit=commit, seal=manifest.get("seal"), files=len(fetch.kept),
        bytes=sum(f.stat().st_size for f in (target / name for name in fetch.kept)), fetched=fetch.transferred,
        left_out=fetch.left_out,
    )  # fmt: skip


@contextlib.contextmanager
def _tidied(work: Path) -> Iterator[None]:
    """Remove the work folder at the end, unless something that was fetched lies in it: the next pull goes on there."""
    try:
        yield
    finally:
        if not any(p.is_file() for name in ("bank", "parts") for p in (work / name).rglob("*")):
            shutil.rmtree(work, ignore_errors=True)


def _manifest(folder: Path, repo: Repo, expect: str | None) -> dict[str, Any]:
    """manifest.json, its form and its own hash checked, of the bank.json beside it. Raises `BankError`."""
    where = folder / "manifest.json"
    raw = read_json(where)
    own = raw.get("seal") if raw.get("schema") != 1 else raw.get("root")
    if raw.get("schema") != 1 and own != canonical_hash({k: v for k, v in raw.items() if k != "seal"}):
        raise BankError(f"{repo}: manifest.json was altered after it was sealed", hint="its own hash does not fit")
    if expect is not None and own != expect:
        hint = "that is its root hash, which covers the shards alone" if raw.get("root") == expect else None
        raise BankError(f"{repo}: is not the expected bank: its seal is {own}", got=expect, hint=hint)
    digest = raw.get("bank_sha256")
    if raw.get("schema") != 1 and file_sha256(folder / "bank.json") != digest:
        raise BankError(f"{repo}: bank.json is not the record that was sealed")
    spec, record = read_record(folder)
    seal.read_manifest(folder, spec)  # a row for every planned shard, each with its sha256
    if raw.get("uuid") != record["uuid"]:
        raise BankError(f"{repo}: the manifest seals another bank", got=str(raw.get("uuid"))[:64])
    return raw


def _covered(manifest: dict[str, Any]) -> list[Wanted]:
    """The files that the manifest names with size and sha256."""
    found = []
    for row in manifest["shards"]:
        name = f"shards/{row['shard']:05d}"
        found += [_sized(f"{name}.h5", row.get("bytes"), row.get("sha256")),
                  Wanted(f"{name}.json", None, _hash(row.get("sidecar_sha256"), name))]  # fmt: skip
    entries = [("generators", row) for row in manifest.get("generators") or []]
    entries += [("transform", manifest["transform"])] if manifest.get("transform") else []
    for folder, row in entries:
        name = f"{folder}/{row['index']:05d}"
        found += [_sized(f"{name}.safetensors", row.get("bytes"), row.get("sha256")),
                  Wanted(f"{name}.json", None, _hash(row.get("record_sha256"), name))]  # fmt: skip
    for file in found:
        if not is_bank_file(file.name):
            raise BankError("manifest.json names a file that no bank has", got=file.name)
    return found


def _sized(name: str, size: Any, digest: Any) -> Wanted:
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise BankError(f"manifest.json: the size of {name} is malformed", got=str(size)[:80])
    return Wanted(name, size, _hash(digest, name))


def _hash(digest: Any, name: str) -> str:
    if not isinstance(digest, str) or not _SHA.fullmatch(digest):
        raise BankError(f"manifest.json: the sha256 of {name} is malformed", got=str(digest)[:80])
    return digest


def _extras(fetch: Fetch, labels: bool) -> list[Wanted]:
    """The card, and the records of label sets that are complete."""
    found = [Wanted("README.md", None, None, MAX_CARD)] if "README.md" in fetch.remote else []
    for name in sorted(fetch.remote) if labels else []:
        match = re.fullmatch(r"(labels/[^/]+)/manifest\.json", name)
        if match:
            found += [Wanted(name, None, None), Wanted(f"{match[1]}/labels.json", None, None)]
    return found


def _of_schema_1(fetch: Fetch, manifest: dict[str, Any]) -> list[Wanted]:
    """Generator snapshots of an old bank: its manifest does not know them, their own records name their sha256."""
    if manifest.get("schema") != 1:
        return []
    return [Wanted(n, None, None, MAX_GENERATOR) for n in sorted(fetch.remote) if n.startswith("generators/")]


def _label_shards(fetch: Fetch, uuid: str) -> list[Wanted]:
    """Shards and records of the label sets; their own manifests name them, and are fetched here first."""
    records = [w for w in _extras(fetch, True) if w.name.startswith("labels/")]
    fetch.get(records)
    found = []
    for folder in {w.name.rpartition("/")[0] for w in records}:
        raw = read_json(fetch.folder / folder / "manifest.json")
        where = f"{folder}/manifest.json"
        if raw.get("bank") != uuid or raw.get("seal") != canonical_hash({k: v for k, v in raw.items() if k != "seal"}):
            raise BankError(f"{where}: is damaged, or of another bank's labels")
        if file_sha256(fetch.folder / folder / "labels.json") != raw.get("labels_sha256"):
            raise BankError(f"{folder}/labels.json: is not the one that was sealed")
        rows = raw.get("shards")
        for row in rows if isinstance(rows, list) else []:
            index = row.get("shard") if isinstance(row, dict) else None
            if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < 10**7:
                raise BankError(f"{where}: a row is malformed", got=str(row)[:80])
            name = f"{folder}/{index:05d}"
            found += [_sized(f"{name}.h5", row.get("bytes"), row.get("sha256")), Wanted(f"{name}.json", None, None)]
    return found


def _check_whole(folder: Path) -> None:
    """Open the bank by its records alone: their numbers, the root hash, the label sets. Raises `BankError`."""
    bank = Bank(folder)
    problems = seal.check_manifest(folder, bank.spec, bank.record)
    for part, what in problems.items():
        raise BankError(f"{part}: {what[0]}")
    for name in bank.label_sets():
        bank.labels(name)
