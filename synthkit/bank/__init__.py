"""The bank: sharded images on disk that cannot be half written, and a reader that needs no HDF5 parser.

>>> from synthkit.bank import Bank
>>> Bank("banks/c10")[:64].images.shape  # uint8 (64, 3, 32, 32)  # doctest: +SKIP
"""

from __future__ import annotations

from synthkit.bank.errors import (
    BankBusyError,
    BankIndexError,
    BankMemoryError,
    BankMismatchError,
    BankNotFoundError,
)
from synthkit.bank.labels.sets import LabelSet, LabelSpec
from synthkit.bank.labels.writer import LabelWriter
from synthkit.bank.reader import Bank, BankBatch
from synthkit.bank.spec import BankSpec
from synthkit.bank.state import GeneratorRecord
from synthkit.bank.writer import BankWriter

__all__ = [
    "Bank", "BankBatch", "BankBusyError", "BankIndexError", "BankMemoryError", "BankMismatchError", "BankNotFoundError",
    "BankSpec", "BankWriter", "GeneratorRecord", "LabelSet", "LabelSpec", "LabelWriter",
]  # fmt: skip
