"""The result of `synthkit evaluate --bank` as text. No torch."""

from __future__ import annotations

from typing import Any

from synthkit.cli.arguments import table

PARTS = (("bank", "bank"), ("control", "random real"))


def render(result: dict[str, Any]) -> str:
    """What was trained on what, then one row per network and set; warnings stand at the end, where they are read."""
    bank, data, protocol = result["bank"], result["data"], result["protocol"]
    changed = f"; changed by flags: {', '.join(protocol['changed'])}" if protocol["changed"] else ""
    fewest, most = bank["per_class"]
    per_class = f"{most}" if fewest == most else f"{fewest} to {most}"
    lines = [
        ("bank", f"{bank['path']}: {bank['images']:,} images, {per_class} per class, {bank['labels']} labels, "
                 f"{bank['pixels']} ({bank['space']})"),
        ("data", f"{data['spec']} {data['split']}, {data['n']:,} images"),
        ("control", f"random real images of {data['control']} {data['control_split']}, as many, another draw each"),
        ("protocol", f"{protocol['name']} ({protocol['why']}){changed}"),
    ]  # fmt: skip
    text = [f"{name:<8}  {value}" for name, value in lines] + ["", *_results(result)]
    text += [f"note: {line}" for line in result["notes"]]
    return "\n".join(text + [f"warning: {line}" for line in result["warnings"]])


def _results(result: dict[str, Any]) -> list[str]:
    rows = [("network", "epochs", "lr", "bank", "random real", "gain", "best (diagnostic)")]
    scores = []
    for arch, found in result["results"].items():
        rows.append(
            (
                arch, str(found["epochs_run"]), f"{found['lr']:.3g}", _figure(found["bank"]),
                _figure(found["control"]), f"{100 * found['gain']:+.2f}", f"{100 * found['bank']['best_mean']:.2f}",
            )
        )  # fmt: skip
        if ranks := found.get("ranking"):
            scores.append(
                f"{arch}: HLR {100 * ranks['hlr']:.2f}, IOR {100 * ranks['ior']:.2f}, LRS {100 * ranks['lrs']:.2f} "
                f"(full data {100 * ranks['full']:.2f} %, bank with hard labels {100 * ranks['hard']:.2f} %)"
            )
    text = [table(rows), f"top-1 in %, last epoch, mean and std over {result['nets']} network(s)"]
    text.append("each network, last epoch (best of a short curve on a part of the test set):")
    nets = [
        (f"  {arch}", name, _each(found[part])) for arch, found in result["results"].items() for part, name in PARTS
    ]
    return [*text, table(nets), *scores]


def _each(summary: dict[str, Any]) -> str:
    return ", ".join(f"{100 * net['last']:.2f} ({100 * net['best']:.2f})" for net in summary["nets"])


def _figure(summary: dict[str, Any]) -> str:
    spread = "" if summary["std"] is None else f" +- {100 * summary['std']:.2f}"
    return f"{100 * summary['mean']:.2f}{spread}"
