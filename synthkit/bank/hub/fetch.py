"""Fetching the files of one commit: resumable, never more bytes than announced, nothing kept with a wrong hash."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from synthkit.bank.disk.storage import storage_errors
from synthkit.bank.errors import HubError
from synthkit.bank.hub.common import MAX_RECORD, RemoteFile, Repo, git_blob_sha1, hub_errors, is_bank_file
from synthkit.bank.shard import file_sha256
from synthkit.errors import BankError, StorageError

WORKERS = 4
"""Files that are fetched at once."""


@dataclass(frozen=True)
class Wanted:
    """A file that the manifest names."""

    name: str
    size: int | None
    """Bytes; None where only the repository tells (records, bounded by `MAX_RECORD`)."""
    sha256: str | None
    """None for the few files that no manifest covers: the card, and records of label sets."""
    cap: int = MAX_RECORD


class Fetch:
    """Files of one commit into the work folder."""

    def __init__(self, api: Any, repo: Repo, commit: str, work: Path, token: str | None, progress: Any):
        self._api, self._repo, self._commit, self._token, self._progress = api, repo, commit, token, progress
        self.folder, self._parts = work / "bank", work / "parts"
        self.remote: dict[str, RemoteFile] = {}
        self.left_out: list[str] = []
        self.kept: set[str] = set()
        self.transferred = 0
        self._lock = threading.Lock()

    def start(self, remote: dict[str, RemoteFile]) -> None:
        """Take the names that may belong to a bank; all others are never asked for."""
        self.remote = {name: file for name, file in remote.items() if is_bank_file(name)}
        self.left_out = sorted(name for name in remote if not is_bank_file(name))
        for name in ("manifest.json", "bank.json"):
            if name not in self.remote:
                raise HubError(f"hub: {self._repo} at commit {self._commit[:12]} holds no sealed bank: no {name}",
                               hint="an unfinished push? name the commit of a whole one")  # fmt: skip
        with storage_errors("pull", self.folder):
            self.folder.mkdir(exist_ok=True)
            self._parts.mkdir(exist_ok=True)

    def check(self, wanted: Wanted) -> RemoteFile:
        """The repository's entry of a file. Raises `BankError` where it contradicts the manifest."""
        found = self.remote.get(wanted.name)
        where = f"{self._repo.name}@{self._commit[:12]}: {wanted.name}"
        if found is None:
            raise BankError(f"{where}: the manifest names it, but it is not there")
        if wanted.size is not None and found.size != wanted.size:
            raise BankError(f"{where}: has {found.size:,} bytes, the manifest says {wanted.size:,}")
        if wanted.size is None and found.size > wanted.cap:
            raise BankError(f"{where}: {found.size:,} bytes are too many for it", hint=f"cap: {wanted.cap:,}")
        if wanted.sha256 is not None and found.sha256 is not None and found.sha256 != wanted.sha256:
            raise BankError(f"{where}: is another file than the manifest names (sha256 {found.sha256[:16]}...)")
        return found

    def require(self, wanted: list[Wanted], target: Path, say: Callable[[str], None]) -> None:
        """Check all names and sizes against the repository, say the total, and that there is room for it."""
        total = sum(self.check(file).size for file in wanted)
        there = sum(p.stat().st_size for folder in (self.folder, self._parts) for p in folder.rglob("*") if p.is_file())
        with storage_errors("pull", target):
            free = shutil.disk_usage(self.folder).free
        say(f"{len(wanted)} files, {total / 1e6:,.1f} MB" + (f", of which {there / 1e6:,.1f} MB lie here already"
                                                            if there else ""))  # fmt: skip
        if max(0, total - there) > free:
            raise StorageError(f"{target}: the bank takes {total / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free there",
                               hint="choose another --out")  # fmt: skip

    def get(self, wanted: Iterable[Wanted]) -> None:
        """Have all these files, whole and with the right sha256. Raises `HubError`, `BankError`, `StorageError`."""
        files = [(file, self.check(file)) for file in wanted]
        with ThreadPoolExecutor(WORKERS, thread_name_prefix="pull") as pool:
            running = [pool.submit(self._one, file, remote) for file, remote in files]
            try:
                for future in running:
                    future.result()
            except BaseException:
                for future in running:
                    future.cancel()
                raise
        self.kept |= {file.name for file, _ in files}

    def _one(self, wanted: Wanted, remote: RemoteFile) -> None:
        place = self.folder / wanted.name
        if place.is_file() and _is(place, wanted, remote):
            self._progress(remote.size)
            return
        with storage_errors(f"pull of {wanted.name}", place):
            place.parent.mkdir(parents=True, exist_ok=True)
            part = self._parts / (wanted.name.replace("/", "--") + f".{(wanted.sha256 or remote.blob)[:40]}")
            self._download(wanted, remote, part)
        if not _is(part, wanted, remote):
            part.unlink()
            raise BankError(f"{self._repo.name}@{self._commit[:12]}: {wanted.name} has not the sha256 that the manifest"
                            " says", hint="the repository is damaged, or was altered")  # fmt: skip
        with storage_errors(f"pull of {wanted.name}", place):
            os.replace(part, place)

    def _download(self, wanted: Wanted, remote: RemoteFile, part: Path) -> None:
        from huggingface_hub.file_download import http_get  # pyright: ignore[reportMissingImports]  # optional

        have = part.stat().st_size if part.is_file() else 0
        if have > remote.size:
            part.unlink()
            have = 0
        self._progress(have)
        if have == remote.size and have:
            return
        # repository, commit and name were all matched against plain patterns: nothing in them needs quoting
        url = f"{self._api.endpoint}/datasets/{self._repo.name}/resolve/{self._commit}/{wanted.name}"
        headers = self._api._build_hf_headers(token=self._token)
        with open(part, "ab") as stream, hub_errors(self._repo, f"fetching {wanted.name}"):
            bounded = Bounded(stream, have, remote.size, wanted.name, self._arrived)
            http_get(url, cast(BinaryIO, bounded), resume_size=have, headers=headers, expected_size=remote.size,
                     displayed_filename=wanted.name)  # fmt: skip
        size = part.stat().st_size
        if size != remote.size:
            raise HubError(f"hub: {wanted.name} ended after {size:,} of {remote.size:,} bytes", hint="pull again")

    def _arrived(self, count: int) -> None:
        with self._lock:
            self.transferred += max(0, count)
            self._progress(count)

    def drop_others(self) -> None:
        """Remove what an earlier pull of another state of the repository left in the work folder."""
        for path in sorted(self.folder.rglob("*"), reverse=True):
            name = path.relative_to(self.folder).as_posix()
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif name not in self.kept:
                path.unlink()


class Bounded:
    """A file that takes no byte beyond the announced size, whatever the server sends."""

    def __init__(self, stream: BinaryIO, have: int, size: int, name: str, arrived: Callable[[int], None]):
        self._stream, self._have, self._size, self._name, self._arrived = stream, have, size, name, arrived

    def write(self, data: bytes) -> int:
        if self._have + len(data) > self._size:
            raise HubError(f"hub: the server sends more of {self._name} than the {self._size:,} bytes it announced")
        self._have += len(data)
        self._arrived(len(data))
        return self._stream.write(data)

    def tell(self) -> int:
        return self._have

    def seek(self, place: int, whence: int = 0) -> int:
        """The library goes back to the start when the server ignores its Range header."""
        self._stream.seek(place, whence)
        self._arrived(self._stream.tell() - self._have)
        self._have = self._stream.tell()
        return self._have

    def truncate(self, size: int | None = None) -> int:
        return self._stream.truncate(self._have if size is None else size)

    def flush(self) -> None:
        self._stream.flush()


def _is(path: Path, wanted: Wanted, remote: RemoteFile) -> bool:
    """Whether `path` has the named content: by the manifest's sha256, else by what the repository says."""
    if path.is_symlink() or path.stat().st_size != remote.size:
        return False
    digest = wanted.sha256 or remote.sha256
    if digest is not None:
        return file_sha256(path) == digest
    return git_blob_sha1(path.read_bytes()) == remote.blob
