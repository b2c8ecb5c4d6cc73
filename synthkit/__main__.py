"""`python -m synthkit` is the same as `synthkit`."""

from __future__ import annotations

import sys

from synthkit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
