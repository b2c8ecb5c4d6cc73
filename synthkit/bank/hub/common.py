"""A bank on the Hugging Face Hub: names, the client, its errors. `hub_push` and `hub_pull` do the work.

A bank is a dataset repository with the files of the bank folder; state, locks and quarantine stay at home. What a
stranger put into the repository is told apart by name and size before it is fetched, and by its sha256 before it is
opened.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthkit.bank.errors import HubError
from synthkit.errors import RequirementError, SynthkitError, UsageError

MAX_RECORD = 16 << 20
"""Bytes of a JSON record at most, as everywhere in a bank."""
MAX_CARD = 1 << 20
"""Bytes of README.md at most."""

_INDEX = r"[0-9]{5,7}"
_SET = r"labels/[a-z0-9][a-z0-9_-]{0,63}"
_NAMES = re.compile(
    rf"bank\.json|manifest\.json|README\.md|shards/{_INDEX}\.(h5|json)|(generators|transform)/{_INDEX}\.(safetensors|json)"
    rf"|{_SET}/(labels\.json|manifest\.json|{_INDEX}\.(h5|json))"
)


def is_bank_file(name: str) -> bool:
    """Whether `name` is the name of a file that belongs to a bank (relative, with `/`)."""
    return _NAMES.fullmatch(name) is not None


@dataclass(frozen=True)
class Repo:
    """A dataset repository, perhaps at a revision."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def parse_repo(spec: str, revision: str | None = None) -> Repo:
    """`REPO`, `REPO@REVISION`, `hf:REPO...` or `hf://datasets/REPO...`, where REPO is `name` or `owner/name`.

    Raises:
        UsageError: it is none of these, or the revision is given twice.
    """
    text = re.sub(r"^(hf://datasets/|hf://|hf:)", "", spec.strip())
    name, at, inside = text.partition("@")
    if at and revision is not None and inside != revision:
        raise UsageError("hub: the revision is given twice", got=[inside, revision])
    wanted = revision if revision is not None else (inside if at else None)
    part = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
    if not re.fullmatch(rf"{part}(/{part})?", name) or ".." in name or "--" in name:
        raise UsageError("hub: not the name of a repository", got=spec, hint="write OWNER/NAME, perhaps with @REVISION")
    if wanted is not None and (not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}", wanted) or ".." in wanted):
        raise UsageError("hub: not a branch, tag or commit", got=wanted)
    return Repo(name, wanted)


def is_hub_spec(text: str) -> bool:
    """Whether a bank spec names a repository (`hf:...`) instead of a folder."""
    return text.startswith("hf:")


def local_bank(spec: str | Path) -> Path:
    """The folder of a bank: `spec` itself, or where `hf:REPO[@REVISION]` was pulled to.

    A repository is pulled once per commit, into the user's local store (`$SYNTHKIT_HOME`, else `~/.cache/synthkit`); a
    full commit that is there already needs no network.

    Raises:
        HubError, BankError, StorageError: see `hub_pull.pull`.
    """
    text = str(spec)
    if not is_hub_spec(text):
        return Path(spec)
    from synthkit.bank.hub.pull import pull
    from synthkit.paths import store_dir

    repo = parse_repo(text)
    known = repo.revision is not None and re.fullmatch(r"[0-9a-f]{40}", repo.revision) is not None
    commit = str(repo.revision) if known else resolve_commit(client(), repo)
    place = store_dir() / "banks" / f"{repo.name.replace('/', '--')}@{commit[:12]}"
    if not (place / "bank.json").is_file():

        def said(line: str) -> None:
            print(f"hub: {line}", file=sys.stderr, flush=True)

        pull(Repo(repo.name, commit), place, said=said)
    return place


def client(endpoint: str | None = None, token: str | None = None) -> Any:
    """`huggingface_hub.HfApi`; without `token` the library takes the one of `hf auth login`, or $HF_TOKEN.

    Raises:
        RequirementError: huggingface_hub is missing.
    """
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]  # optional
    except ImportError as error:
        raise RequirementError(
            "hub: the library huggingface_hub is not installed", hint="pip install 'synthkit[hub]'"
        ) from error
    from synthkit.bank.spec import version

    return huggingface_hub.HfApi(endpoint=endpoint, token=token, library_name="synthkit", library_version=version())


@contextlib.contextmanager
def hub_errors(repo: Repo, doing: str) -> Iterator[None]:
    """Turn what huggingface_hub and its transport raise into a `HubError`; no token comes through."""
    try:
        yield
    except SynthkitError:
        raise
    except Exception as error:
        found = _translated(error, repo, doing)
        if found is None:
            raise
        raise found from None  # the chain would show request headers in some tracebacks


def _translated(error: Exception, repo: Repo, doing: str) -> HubError | None:
    from huggingface_hub import errors  # pyright: ignore[reportMissingImports]  # optional

    status = getattr(getattr(error, "response", None), "status_code", None)
    login = "log in with: hf auth login"
    if isinstance(error, errors.GatedRepoError):
        return HubError(f"hub: {repo.name} is gated", hint=f"accept its terms on the website, then {login}")
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"hub: {repo.name} has no such revision", got=repo.revision, hint="a branch, a tag or a commit")
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        what = f"hub: there is no dataset repository {repo.name}, or it is private"
        return HubError(what, hint=f"check the name; for a private one {login}")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubError("hub: HF_HUB_OFFLINE is set, so nothing is fetched", hint="unset HF_HUB_OFFLINE")
    if status in (401, 403):
        return HubError(f"hub: {doing} is not permitted for {repo.name} (status {status})",
                        hint=f"{login} with a token that may write there")  # fmt: skip
    if status in (409, 412):
        return HubError(f"hub: {repo.name} was changed by somebody else meanwhile (status {status})",
                        hint="run the command again")  # fmt: skip
    if status is not None:
        return HubError(f"hub: {doing}: the hub answered with status {status}: {redacted(error)}",
                        hint="run the command again; what was transferred is not transferred twice")  # fmt: skip
    if isinstance(error, OSError) and not _is_transport(error):
        return None  # a local file: its own error says more
    if isinstance(error, (OSError, RuntimeError, ValueError)) or _is_transport(error):
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else None
        if cause is not None and getattr(cause, "response", None) is not None:
            return _translated(cause, repo, doing)
        return HubError(f"hub: {doing} of {repo.name} failed: {redacted(error)}",
                        hint="run the command again; what was transferred is not transferred twice")  # fmt: skip
    return None


# packages whose errors mean trouble with the network; huggingface_hub 2 talks through httpx2
_CLIENTS = ("httpx", "httpcore", "httpx2", "httpcore2", "requests", "urllib3", "huggingface_hub")


def _is_transport(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in _CLIENTS


def redacted(error: object) -> str:
    """The first line of a message, without anything that looks like a token or a signed address."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    text = re.sub(r"(hf|api_org|hf_oauth)_[A-Za-z0-9._-]{4,}", "***", text)
    text = re.sub(r"(?i)bearer\s+\S+", "Bearer ***", text)
    return re.sub(r"(https?://[^\s?'\"]+)\?\S*", r"\1", text)[:300]


def git_blob_sha1(data: bytes) -> str:
    """The object id that git (and so the hub, for files outside LFS) gives `data`."""
    import hashlib

    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit."""

    name: str
    size: int
    sha256: str | None
    """Of files in large-file storage."""
    blob: str
    """git's object id."""


def remote_files(api: Any, repo: Repo, commit: str) -> dict[str, RemoteFile]:
    """Every file of `repo` at `commit`, by name. Raises `HubError`."""
    found: dict[str, RemoteFile] = {}
    with hub_errors(repo, "listing the files"):
        for entry in api.list_repo_tree(repo.name, recursive=True, revision=commit, repo_type="dataset"):
            size = getattr(entry, "size", None)
            if size is None:
                continue  # a folder
            lfs = getattr(entry, "lfs", None)
            digest = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
            found[entry.path] = RemoteFile(entry.path, int(size), digest, str(getattr(entry, "blob_id", "")))
    return found


def resolve_commit(api: Any, repo: Repo) -> str:
    """The commit that the revision (or the default branch) of `repo` is at now. Raises `HubError`."""
    with hub_errors(repo, "looking it up"):
        commit = api.dataset_info(repo.name, revision=repo.revision).sha
    if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40}([0-9a-f]{24})?", commit):
        raise HubError(f"hub: {repo} has no commit", got=str(commit)[:80])
    return commit
