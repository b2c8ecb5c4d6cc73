"""What the bank commands share."""

from __future__ import annotations


def clean(value: object, limit: int = 200) -> str:
    """`value` as one printable line: text from a bank must not steer the terminal."""
    text = "".join(c if c.isprintable() else "?" for c in str(value))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def ranges(numbers: list[int]) -> str:
    """Ascending numbers as text: [0, 1, 2, 7] is "0-2, 7"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
