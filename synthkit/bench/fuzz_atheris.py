"""The engine `atheris` of the fuzzer: libFuzzer with coverage of the readers' Python code, through tests/attacks."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from synthkit.errors import RequirementError

MEMORY_MB = 2048
SECONDS_PER_INPUT = 20


def run_atheris(inputs: int, seed: int, work: Path) -> dict[str, Any]:
    """Run `inputs` inputs through tests/attacks/fuzz_atheris.py; findings are kept in `work`/findings.

    Raises:
        RequirementError: atheris is not installed, or this is no source tree (the harness is a test).
    """
    from synthkit.runtime import hardware, versions

    root = Path(__file__).resolve().parents[2]
    harness = root / "tests" / "attacks" / "fuzz_atheris.py"
    if importlib.util.find_spec("atheris") is None:
        raise RequirementError("bench fuzz: atheris is not installed", hint="pip install atheris, or --engine own")
    if not harness.is_file():
        raise RequirementError("bench fuzz: the atheris harness lies in the source tree only", got=str(harness))
    found, corpus = work / "findings", work / "corpus"
    found.mkdir(parents=True, exist_ok=True)
    corpus.mkdir(exist_ok=True)
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(harness), str(corpus), f"-atheris_runs={inputs}", f"-runs={inputs}", f"-seed={seed or 1}",
         f"-rss_limit_mb={MEMORY_MB}", f"-timeout={SECONDS_PER_INPUT}", f"-artifact_prefix={found}/",
         "-max_len=8192", "-print_final_stats=1"],
        capture_output=True, text=True, errors="replace", check=False,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    text = done.stdout + done.stderr
    runs = re.findall(r"(?:Done (\d+) (?:in|runs)|stat::number_of_executed_units:\s*(\d+))", text)
    executed = max((int(n) for pair in runs for n in pair if n), default=0)
    coverage = re.findall(r"cov: (\d+)", text)
    kept = sorted(p.name for p in found.iterdir())
    findings = [{"kind": "untyped, crash, hang or memory", "file": name, "error": _error(text)} for name in kept]
    if done.returncode and not findings:
        findings = [{"kind": f"exit code {done.returncode}", "file": None, "error": text[-500:]}]
    return {
        "what": "atheris (libFuzzer with Python coverage) on the readers of a bank's records", "engine": "atheris",
        "inputs": executed, "seed": seed, "findings": findings,
        "coverage_points": int(coverage[-1]) if coverage else None,
        "limits": {"rss_mb": MEMORY_MB, "seconds_per_input": SECONDS_PER_INPUT, "max_bytes": 8192},
        "seconds": round(time.monotonic() - begun, 1), "versions": versions(), "hardware": hardware(),
    }  # fmt: skip


def _error(text: str) -> str:
    lines = [line for line in text.splitlines() if re.match(r"\w*(Error|Exception|Broken)\b", line.strip())]
    return (lines[-1] if lines else text[-300:])[:300]
