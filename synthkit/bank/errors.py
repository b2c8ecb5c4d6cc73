"""What can be wrong with a bank. All are `BankError`; the exit code tells damage from wrong usage."""

from __future__ import annotations

from synthkit.errors import BankError, RunError, UsageError


class BankNotFoundError(BankError):
    """The path holds no bank (exit code 2)."""

    exit_code = 2


class BankMismatchError(BankError):
    """The bank was begun with another recipe than the one asked for now (exit code 2)."""

    exit_code = 2


class BankBusyError(BankError):
    """Another run holds the bank (exit code 1)."""

    exit_code = 1


class BankIndexError(UsageError, IndexError):
    """An image index lies outside the bank."""


class HubError(RunError):
    """The Hugging Face Hub cannot be reached, refuses, or has not what was asked for (exit code 1)."""


class BankMemoryError(UsageError):
    """The bank does not fit into the memory that it was to be read to (exit code 2)."""
