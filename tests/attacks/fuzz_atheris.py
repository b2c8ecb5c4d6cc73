"""Coverage-guided fuzzing of the record readers. Run by `synthkit bench fuzz --engine atheris`, or by hand:

    python tests/attacks/fuzz_atheris.py CORPUS -atheris_runs=100000

The first byte chooses the reader, the rest is the file. Any exception that is not refused as typed ends the run.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import atheris  # pyright: ignore[reportMissingImports]  # optional

with atheris.instrument_imports(include=["synthkit.bank", "synthkit.config", "synthkit.bench.fuzz_targets"]):
    import synthkit.bank
    import synthkit.bank.card
    import synthkit.bank.disk.lock
    import synthkit.bank.info
    import synthkit.bank.labels.writer
    import synthkit.bank.seal
    import synthkit.config.safe_yaml  # noqa: F401 - what is imported here is instrumented
    from synthkit.bench.fuzz_targets import Stage, build_bank

warnings.simplefilter("ignore")
FOLDER = Path(tempfile.mkdtemp(prefix="synthkit-atheris-"))
build_bank(FOLDER / "bank")
TARGETS = [t for t in Stage(FOLDER / "bank").targets() if t.is_json or t.name in ("safetensors", "recipe YAML")]


def one_input(data: bytes) -> None:
    """One input of libFuzzer."""
    if data:
        target = TARGETS[data[0] % len(TARGETS)]
        target.run(data[1:])


def seed_corpus(folder: Path) -> None:
    """The honest files, one per reader, so that the fuzzer begins behind the first checks."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, target in enumerate(TARGETS):
        for index, data in enumerate(target.seeds):
            (folder / f"seed-{number}-{index}").write_bytes(bytes([number]) + data)


if __name__ == "__main__":
    corpus = [word for word in sys.argv[1:] if not word.startswith("-")]
    if corpus:
        seed_corpus(Path(corpus[0]))
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
