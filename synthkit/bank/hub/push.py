"""Pushing a sealed bank to the Hub: content first, one commit last, nothing uploaded twice.

Shards go to large-file storage in pieces; what is there already (by sha256) is skipped, so a killed push goes on where
it ended. Only then the branch moves, in one commit (banks of some hundred shards: in several, the manifest in the
last), so that whoever looks at the branch sees the old bank, or the new one, or none that claims to be whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthkit.bank import card, seal
from synthkit.bank.checking.verify import verify
from synthkit.bank.disk.storage import names_in, read_json, regular_size
from synthkit.bank.errors import HubError
from synthkit.bank.hub.common import (
    RemoteFile,
    Repo,
    client,
    git_blob_sha1,
    hub_errors,
    is_bank_file,
    remote_files,
    resolve_commit,
)  # fmt: skip
from synthkit.bank.reader import Bank
from synthkit.bank.shard import file_sha256, shard_file
from synthkit.errors import BankError

PIECE_FILES, PIECE_BYTES = 8, 512 << 20
COMMIT_FILES = 400
"""Files of one commit at most."""


@dataclass(frozen=True)
class LocalFile:
    """A file to push: its name in the repository, and where its bytes are."""

    name: str
    content: Path | bytes
    size: int


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What a push did."""

    repo: str
    commit: str
    seal: str | None
    files: int
    bytes: int
    uploaded: int
    """Files that differed from what the repository had."""
    removed: list[str]
    """Files of an older state of the bank that the commit took away (the history keeps them)."""
    skipped_sets: list[str]
    """Label sets that are unfinished."""


def push(
    path: str | Path,
    repo: Repo,
    *,
    private: bool = False,
    message: str | None = None,
    replace: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
    said: Callable[[str], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Pushed:
    """Upload the sealed bank at `path`; the repository (and the branch) is made where it does not exist.

    Args:
        private: whether a new repository is private.
        message: of the commit.
        replace: whether a branch that holds another bank may get this one.
        said: is called with lines for the user; progress: with numbers of bytes that are dealt with.

    Raises:
        BankError: the bank is unfinished, not sealed or damaged.
        HubError: no permission, no network, another bank is there, or the hub did not store what was sent.
    """
    api, say = client(endpoint, token), said or (lambda text: None)
    bank = Bank(path)
    manifest = _sealed(bank)
    say("checking every file of the bank")
    verify(bank.path).raise_if_damaged()
    sets = [name for name in bank.label_sets() if (bank.path / "labels" / name / "manifest.json").is_file()]
    files = bank_files(bank, manifest, sets)
    commit = _prepare(api, repo, private)
    there = remote_files(api, repo, commit)
    _refuse_other(bank, repo, there, replace)
    stale = sorted(name for name in there if is_bank_file(name) and name not in {f.name for f in files})
    changed = [f for f in files if not _same(f, there.get(f.name))]
    total = sum(f.size for f in files)
    say(f"{repo.name}: {len(files)} files, {total / 1e6:,.1f} MB, {len(changed)} of them not there yet")
    (progress or (lambda count: None))(total - sum(f.size for f in changed))
    if changed or stale:
        title = message or f"Bank {bank.record['uuid'][:8]}: {len(bank):,} images"
        commit = _upload(api, repo, commit, changed, stale, title, progress or (lambda count: None))
        _require_stored(files, remote_files(api, repo, commit), repo, commit)
    return Pushed(
        repo=repo.name, commit=commit, seal=manifest.get("seal"), files=len(files), bytes=total,
        uploaded=len(changed), removed=stale, skipped_sets=sorted(set(bank.label_sets()) - set(sets)),
    )  # fmt: skip


def _sealed(bank: Bank) -> dict[str, Any]:
    where = bank.path / "manifest.json"
    missing = bank.spec.shards - len(bank.sidecars)
    if missing:
        raise BankError(f"{bank.path}: {missing} of {bank.spec.shards} shards are missing",
                        hint="finish it with: synthkit synthesize ... --resume")  # fmt: skip
    if not where.exists():
        raise BankError(f"{bank.path}: is not sealed", hint=f"run: synthkit bank seal {bank.path}")
    for part, what in seal.check_manifest(bank.path, bank.spec, bank.record).items():
        raise BankError(f"{part}: {what[0]}", hint=f"run: synthkit bank verify {bank.path}")
    return read_json(where)


def bank_files(bank: Bank, manifest: dict[str, Any], sets: list[str]) -> list[LocalFile]:
    """Every file of the sealed bank and of the label sets `sets` that belongs on the Hub, the manifest last."""
    text = card.render(bank.spec, bank.record, bank.sidecars, manifest["root"], seal=manifest.get("seal"),
                       results=card.run_record(bank.path))  # fmt: skip
    data = text.encode()
    names: list[str] = []
    for sidecar in bank.sidecars:
        shard = shard_file(bank.path, sidecar.index).relative_to(bank.path)
        names += [shard.as_posix(), shard.with_suffix(".json").as_posix()]
    for folder in ("generators", "transform", *(f"labels/{name}" for name in sets)):
        names += [f"{folder}/{n}" for n in sorted(names_in(bank.path / folder))]
    names += ["bank.json", "manifest.json"]
    found = [_local(bank.path, name) for name in names if is_bank_file(name)]
    return [*found[:-1], LocalFile("README.md", data, len(data)), found[-1]]


def _local(root: Path, name: str) -> LocalFile:
    return LocalFile(name, root / name, regular_size(root / name))


def _prepare(api: Any, repo: Repo, private: bool) -> str:
    """Make the repository and the branch where they do not exist; returns the commit of the branch."""
    with hub_errors(repo, "making the repository"):
        api.create_repo(repo.name, repo_type="dataset", private=private, exist_ok=True)
        if repo.revision is not None and repo.revision != "main":
            api.create_branch(repo.name, branch=repo.revision, repo_type="dataset", exist_ok=True)
    return resolve_commit(api, repo)


def _refuse_other(bank: Bank, repo: Repo, there: dict[str, RemoteFile], replace: bool) -> None:
    other = there.get("bank.json")
    if other is None or replace or _same(_local(bank.path, "bank.json"), other):
        return
    raise HubError(f"hub: {repo} holds another bank", hint="choose another name or --revision, or give --replace")


def _same(file: LocalFile, remote: RemoteFile | None) -> bool:
    if remote is None or remote.size != file.size:
        return False
    content = file.content
    if remote.sha256 is not None:
        digest = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else file_sha256(content)
        return digest == remote.sha256
    return git_blob_sha1(content if isinstance(content, bytes) else content.read_bytes()) == remote.blob


def _upload(
    api: Any, repo: Repo, commit: str, files: list[LocalFile], stale: list[str], title: str,
    progress: Callable[[int], None],
) -> str:  # fmt: skip
    from huggingface_hub import (  # pyright: ignore[reportMissingImports]  # optional
        CommitOperationAdd,
        CommitOperationDelete,
    )

    where = {"repo_id": repo.name, "repo_type": "dataset", "revision": repo.revision}
    adds: dict[str, Any] = {}
    for piece in _pieces(files):
        operations = []
        for file in piece:
            operations.append(CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.content))
        with hub_errors(repo, "uploading"):
            api.preupload_lfs_files(additions=operations, **where)
        adds |= {operation.path_in_repo: operation for operation in operations}
        progress(sum(file.size for file in piece))
    steps = list(adds.values())
    groups = [steps[i : i + COMMIT_FILES] for i in range(0, len(steps), COMMIT_FILES)] or [[]]
    gone = [CommitOperationDelete(path_in_repo=name) for name in stale]
    if len(groups) > 1:  # the branch must not show the old manifest above new shards
        there = remote_files(api, repo, commit)
        gone += [CommitOperationDelete(path_in_repo="manifest.json")] if "manifest.json" in there else []
    for number, group in enumerate(groups):
        part = f" ({number + 1} of {len(groups)})" if len(groups) > 1 else ""
        with hub_errors(repo, "committing"):
            info = api.create_commit(operations=[*gone, *group], commit_message=f"{title}{part}",
                                     parent_commit=commit, **where)  # fmt: skip
        commit, gone = info.oid, []
    return commit


def _pieces(files: list[LocalFile]) -> Iterator[list[LocalFile]]:
    """Runs of files that are uploaded together."""
    held: list[LocalFile] = []
    for file in files:
        if held and (len(held) >= PIECE_FILES or sum(f.size for f in held) + file.size > PIECE_BYTES):
            yield held
            held = []
        held.append(file)
    if held:
        yield held


def _require_stored(files: list[LocalFile], there: dict[str, RemoteFile], repo: Repo, commit: str) -> None:
    for file in files:
        if not _same(file, there.get(file.name)):
            raise HubError(f"hub: {repo.name}@{commit[:12]}: {file.name} was not stored as it was sent",
                           hint="does the repository have a .gitignore that leaves it out?")  # fmt: skip
