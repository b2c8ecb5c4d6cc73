"""Class names: the standard order, spelling variants, and the check of a model's order against the data's. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from synthkit.errors import DataError, nearest

_ALIASES = {"plane": "airplane", "aeroplane": "airplane", "car": "automobile", "auto": "automobile", "lorry": "truck"}
_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_ALIASES |= {word: str(digit) for digit, word in enumerate(_DIGITS)}
_ALIASES |= {f"{digit}{word}": str(digit) for digit, word in enumerate(_DIGITS)}  # "0 - zero" of torchvision's MNIST


def canonical(name: str) -> str:
    """A class name without case, blanks, `_`, `-` and the common synonyms."""
    key = "".join(ch for ch in str(name).lower() if ch not in " _-.")
    return _ALIASES.get(key, key)


def is_generic(names: Sequence[str]) -> bool:
    """True for names that are only numbers, `class_3` and the like: they tell nothing about the order."""
    bare = [canonical(name).removeprefix("class").removeprefix("label") for name in names]
    return all(text.isdigit() for text in bare)


def standard_index(names: Sequence[str], standard: Sequence[str], what: str) -> list[int]:
    """For every folder name its label in the standard order, by name (numbers are taken as labels).

    Raises:
        DataError: a name is not one of the standard names.
    """
    table = {canonical(name): i for i, name in enumerate(standard)}
    numeric = all(name.isdigit() and int(name) < len(standard) for name in names)
    result = []
    for name in names:
        label = int(name) if numeric else table.get(canonical(name))
        if label is None:
            close = nearest(name, standard)
            raise DataError(
                f"{what}: folder {name!r} is not a class of this dataset",
                hint=(f"did you mean {close[0]!r}? " if close else "") + "for other classes use imagefolder:DIR",
            )
        result.append(label)
    if len(set(result)) != len(result):
        raise DataError(f"{what}: two folders name the same class", got=list(names))
    return result


@dataclass(frozen=True, kw_only=True)
class ClassCheck:
    """`mapping[i]` is the model's output for data label i; `warning` is what to tell the user, or none."""

    mapping: list[int]
    warning: str | None = None

    @property
    def identity(self) -> bool:
        return self.mapping == list(range(len(self.mapping)))


def check_classes(card_names: Sequence[str] | None, data_names: Sequence[str], num_classes: int) -> ClassCheck:
    """Compare the class names of a model card with those of the data.

    Args:
        card_names: names in the order of the model's outputs, or none.
        data_names: names in the order of the data's labels.
        num_classes: number of the model's outputs.

    Names in another order are mapped by name (and said); a data set that has only some of the model's classes too.

    Raises:
        DataError: the counts differ without names that explain it, or the names contradict each other.
    """
    plain = list(range(len(data_names)))
    if card_names is not None and len(card_names) != num_classes:
        raise DataError(f"model card: {len(card_names)} class names for {num_classes} outputs", hint="repair the card")
    if card_names is None or is_generic(card_names) or is_generic(data_names):
        _same_count(num_classes, data_names)
        silent = card_names is not None and [canonical(n) for n in card_names] == [canonical(n) for n in data_names]
        note = "the order of the classes cannot be checked: the {} no class names"
        missing = "model card has" if card_names is None or is_generic(card_names) else "data have"
        return ClassCheck(mapping=plain, warning=None if silent else note.format(missing))
    card = {canonical(name): i for i, name in enumerate(card_names)}
    found = [card.get(canonical(name)) for name in data_names]
    if all(index is not None for index in found):
        mapping = [int(index) for index in found if index is not None]
        if mapping == plain and len(mapping) == num_classes:
            return ClassCheck(mapping=mapping)
        if len(data_names) < num_classes:
            say = f"the data hold {len(data_names)} of the model's {num_classes} classes; labels were mapped by name"
        else:
            moved = [f"{n} {i}->{m}" for i, (n, m) in enumerate(zip(data_names, mapping, strict=True)) if i != m]
            say = f"the data order their classes otherwise than the model; labels were mapped by name ({_few(moved)})"
        return ClassCheck(mapping=mapping, warning=say)
    _same_count(num_classes, data_names)
    unknown = [name for name, index in zip(data_names, found, strict=True) if index is None]
    if all(index is None or index == i for i, index in enumerate(found)):
        say = f"class names of the data and of the model differ ({_few(unknown)}); the label order is taken as it is"
        return ClassCheck(mapping=plain, warning=say)
    raise DataError(
        f"class names: some of the data's names are unknown to the model ({_few(unknown)}) and others stand elsewhere",
        hint=f"the model's classes are {_few(card_names)}; rename the folders or the card's class_names",
    )


def _same_count(num_classes: int, data_names: Sequence[str]) -> None:
    if len(data_names) != num_classes:
        raise DataError(
            f"the model has {num_classes} classes, the data have {len(data_names)} ({_few(data_names)})",
            hint="take data with the model's classes, or give both class names so that they can be matched",
        )


def _few(names: Sequence[str], n: int = 8) -> str:
    return ", ".join(names[:n]) + (f", ... ({len(names)})" if len(names) > n else "")
