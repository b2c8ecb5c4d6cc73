"""`synthkit doctor`: what is installed and what this machine can do."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from synthkit import __version__
from synthkit.cli.arguments import Arguments, print_json, table
from synthkit.paths import assets_dir, recipes_dir, store_dir

NEEDED = (
    "torch", "torchvision", "kornia", "accelerate", "diffusers", "h5py", "safetensors", "jsonargparse", "numpy",
    "pillow", "pyyaml", "tqdm", "psutil",
)  # fmt: skip
OPTIONAL = {
    "timm": ("timm", "timm:NAME models"),
    "pyarrow": ("pyarrow", "parquet data"),
    "datasets": ("datasets", "hf:NAME data"),
    "huggingface-hub": ("huggingface_hub", "hub models and banks"),
    "onnx": ("onnx", "ONNX"),
    "tensorboard": ("tensorboard", "--tracker tensorboard"),
    "wandb": ("wandb", "--tracker wandb"),
    "mlflow": ("mlflow", "--tracker mlflow"),
}
"""Distribution -> (module, what it is for)."""
FAISS = ("faiss-cpu", "faiss-gpu-cu12", "faiss-gpu-cu11", "faiss-gpu")


def main(argv: Sequence[str]) -> int:
    """Print the findings; exit code 1 when a needed package is missing or the working directory cannot be written."""
    parser = Arguments(prog="synthkit doctor", description="Versions, devices, optional parts, writable paths.")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    arguments = parser.parse(argv)
    findings = examine()
    if arguments.json:
        print_json(findings)
    else:
        print(_page(findings))
    return 1 if findings["problems"] else 0


def examine() -> dict[str, Any]:
    """Everything that `doctor` reports, as plain values."""
    packages = {name: _version(name) for name in NEEDED}
    faiss = {name: found for name in FAISS if (found := _version(name))}
    findings: dict[str, Any] = {
        "synthkit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "faiss": faiss,
        "optional": {name: _version(name) for name in OPTIONAL},
        "devices": _devices() if packages["torch"] else {},
        "memory": _memory(),
        "paths": _paths(),
    }
    findings["problems"] = _problems(findings)
    return findings


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        module = OPTIONAL.get(distribution, (distribution, ""))[0]
        return "unknown" if importlib.util.find_spec(module) else None


def _devices() -> dict[str, Any]:
    import torch

    devices: dict[str, Any] = {
        "cpu": {"cores": os.cpu_count(), "torch_threads": torch.get_num_threads()},
        "cuda": [],
        "mps": torch.backends.mps.is_available(),
        "torch_cuda_build": torch.version.cuda,
    }
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        devices["cuda"].append(
            {"name": facts.name, "memory": total, "free": free, "bf16": torch.cuda.is_bf16_supported()}
        )
    return devices


def _memory() -> dict[str, int]:
    import psutil

    memory = psutil.virtual_memory()
    return {"total": memory.total, "available": memory.available}


def _paths() -> dict[str, dict[str, Any]]:
    places = {"working directory": Path.cwd(), "store": store_dir(), "recipes": recipes_dir(), "assets": assets_dir()}
    return {
        name: {
            "path": str(path),
            "exists": path.is_dir(),
            "writable": _writable(path),
            "free": shutil.disk_usage(_existing(path)).free,
        }
        for name, path in places.items()
    }


def _existing(path: Path) -> Path:
    """The path itself or its nearest parent that is there."""
    return next(p for p in (path, *path.parents) if p.exists())


def _writable(path: Path) -> bool:
    return os.access(_existing(path), os.W_OK | os.X_OK)


def _problems(findings: dict[str, Any]) -> list[str]:
    problems = [f"{name} is missing: pip install {name}" for name, found in findings["packages"].items() if not found]
    if not findings["faiss"]:
        problems.append("faiss is missing: pip install faiss-cpu")
    if len(findings["faiss"]) > 1:
        names = " and ".join(findings["faiss"])
        problems.append(f"{names} overwrite each other: pip uninstall faiss-cpu, then install the GPU one again")
    paths = findings["paths"]
    for name in ("working directory", "store"):
        if not paths[name]["writable"]:
            problems.append(f"the {name} {paths[name]['path']} cannot be written")
    for name in ("recipes", "assets"):
        if not paths[name]["exists"]:
            problems.append(f"the embedded {name} are missing at {paths[name]['path']}: reinstall synthkit")
    return problems


def _page(findings: dict[str, Any]) -> str:
    from synthkit.runtime import format_bytes

    devices = findings["devices"]
    lines = [f"synthkit {findings['synthkit']}, Python {findings['python']}, {findings['platform']}", "", "devices"]
    rows = []
    if devices:
        cpu = devices["cpu"]
        rows.append(("cpu", f"{cpu['cores']} cores, {cpu['torch_threads']} torch threads"))
        for index, gpu in enumerate(devices["cuda"]):
            free = f"{format_bytes(gpu['free'])} of {format_bytes(gpu['memory'])} free"
            rows.append((f"cuda:{index}", f"{gpu['name']}, {free}, bf16 {'yes' if gpu['bf16'] else 'no'}"))
        if not devices["cuda"]:
            rows.append(("cuda", f"none (torch built {_built(devices['torch_cuda_build'])})"))
        rows.append(("mps", "yes" if devices["mps"] else "none"))
    memory = findings["memory"]
    rows.append(("memory", f"{format_bytes(memory['available'])} of {format_bytes(memory['total'])} available"))
    lines += [_indent(rows), "", "packages"]
    lines.append(_indent([*((n, v or "MISSING") for n, v in findings["packages"].items()), *findings["faiss"].items()]))
    optional = [(n, v or "not installed", OPTIONAL[n][1]) for n, v in findings["optional"].items()]
    lines += ["", "optional", _indent(optional), "", "paths"]
    paths = [
        (n, p["path"], "writable" if p["writable"] else "read-only", f"{format_bytes(p['free'])} free")
        for n, p in findings["paths"].items()
    ]
    lines.append(_indent(paths))
    problems = findings["problems"]
    lines += ["", *(f"problem: {p}" for p in problems)] if problems else ["", "no problems found"]
    return "\n".join(lines)


def _built(cuda: str | None) -> str:
    return f"for CUDA {cuda}" if cuda else "without CUDA"


def _indent(rows: list[tuple[str, ...]]) -> str:
    return "\n".join("  " + line for line in table(rows).splitlines())
