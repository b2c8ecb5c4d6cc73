"""Model specs: what the user wrote -> architecture, card and weights file. Nothing is built here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from synthkit import paths
from synthkit.errors import ModelError, WeightsError
from synthkit.models import names, own
from synthkit.models.card import SUFFIXES as CARD_SUFFIXES
from synthkit.models.card import ModelCard
from synthkit.models.weights import SUFFIXES as WEIGHT_SUFFIXES

_RUN_CARDS = ("card.yaml", "card.yml", "card.json")
_RUN_WEIGHTS = ("student.safetensors", "model.safetensors")


@dataclass
class Source:
    """A resolved spec: a card with its file, or an architecture with or without a file."""

    arch: str
    card: ModelCard | None = None
    file: Path | None = None
    pretrained: bool = False
    """The library of the architecture is to supply the weights."""


def resolve(spec: str, *, weights: str = "required") -> Source:
    """Understand a model spec.

    Raises:
        ModelError: unknown name, missing file or folder, or a form that does not exist.
        WeightsError: weights are required and a bare name has none anywhere.
    """
    if not isinstance(spec, str) or not spec.strip():
        raise ModelError("model: the spec is empty", hint="give a name, NAME@FILE, a card or a run directory")
    spec = spec.strip()
    if spec.startswith("hf:"):
        return _hub(spec)
    path = Path(spec).expanduser()
    if path.suffix.lower() in CARD_SUFFIXES and "@" not in spec:
        return from_card(find_card(spec))
    if path.is_dir() and (not _is_name(spec) or spec != path.name):
        return from_run(path)
    if path.suffix.lower() in WEIGHT_SUFFIXES and path.is_file():
        raise ModelError(
            "model: a weights file alone does not say its architecture", got=spec, hint=f"write NAME@{spec}, or a card"
        )
    name, at, file = spec.partition("@")
    if name.startswith(own.PREFIXES) and not at:
        if weights == "required" and name.startswith(own.CODE):
            raise WeightsError(f"model: {name} has no weights of its own", hint=f"give them: {name}@FILE")
        return Source(name)
    if at:
        return _named_file(spec, name, file)
    if "/" in name and not name.startswith(names.EXTERNAL):
        raise ModelError("model: no such card, run directory or name", got=spec)
    arch = names.resolve_name(name)
    if weights == "optional":
        return Source(arch)
    if arch.startswith(names.EXTERNAL):
        return Source(arch, pretrained=True)
    return _stored(name, arch)


def _is_name(spec: str) -> bool:
    try:
        names.resolve_name(spec)
    except ModelError:
        return False
    return True


def _named_file(spec: str, name: str, file: str) -> Source:
    if not file or not name:
        raise ModelError("model: NAME@FILE needs both an architecture and a file", got=spec)
    return Source(names.resolve_name(name), file=Path(file).expanduser())


def find_card(spec: str) -> Path:
    """A card by path, or by file name in the store, the assets and the shipped recipes."""
    path = Path(spec).expanduser()
    if path.is_file() or path.name != spec:
        return path
    for folder in (paths.store_dir(), paths.assets_dir(), paths.recipes_dir()):
        if (folder / "teachers" / spec).is_file():
            return folder / "teachers" / spec
    return path


def from_card(path: Path, *, inside: bool = False) -> Source:
    """A card and its weights file; with `inside`, a file outside the card's folder is refused."""
    card = ModelCard.load(path)
    file = None
    if card.weights is not None:
        relative = Path(card.weights)
        if inside and (relative.is_absolute() or ".." in relative.parts):
            raise WeightsError(f"{path}: the card points outside its own folder", got=card.weights)
        file = path.parent / relative.expanduser()
    return Source(card.arch, card=card, file=file)


def from_run(folder: Path, *, inside: bool = False) -> Source:
    """A run directory: card.yaml and student.safetensors or model.safetensors."""
    found = [folder / c for c in _RUN_CARDS if (folder / c).is_file()]
    if not found:
        raise ModelError(
            f"model: {folder} is no run directory (no card.yaml in it)", hint="for a weights file in it write NAME@FILE"
        )
    source = from_card(found[0], inside=inside)
    if source.file is None:
        source.file = next((folder / w for w in _RUN_WEIGHTS if (folder / w).is_file()), None)
    if source.file is None:
        raise WeightsError(
            f"model: {folder} holds a card but no weights ({' or '.join(_RUN_WEIGHTS)})",
            hint="the run may be unfinished",
        )
    return source


def _stored(name: str, arch: str) -> Source:
    tried = []
    for root in (paths.assets_dir(), paths.store_dir()):
        for stem in dict.fromkeys((name, arch)):
            for card in (root / "teachers" / stem / "card.yaml", root / "teachers" / f"{stem}.yaml"):
                if card.is_file():
                    return from_run(card.parent) if card.name == "card.yaml" else from_card(card)
                tried.append(card)
    raise WeightsError(
        f"model: {name!r} is an architecture; no weights for it were found in "
        f"{paths.assets_dir() / 'teachers'} or {paths.store_dir() / 'teachers'}",
        hint=(
            f"train one (synthkit teach --arch {arch} --data cifar10:DIR --out {paths.store_dir()}/teachers/{name}), "
            f"give a file ({name}@weights.pth), or take one from the hub (hf:REPO)"
        ),
    )


def _hub(spec: str) -> Source:
    from synthkit.models import hub

    return from_run(hub.fetch(spec), inside=True)
