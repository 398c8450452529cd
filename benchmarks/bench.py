"""Everything that is promised about speed, in one run: `make bench`.

    python benchmarks/bench.py [--only training window] [--out runs/bench]

Runs the benchmarks below one after another and writes, after each of them, OUT/results.json with rows {name, ours,
peer, peer_name, ratio, target, met, unit}, OUT/table.md and OUT/bench.png. What an earlier run has left in OUT is kept
until it is measured again, so an interrupted run loses nothing. Nothing else should run on the machine. Needs
`transformers`. A figure that misses its target is a finding: the exit code is 1 only where a benchmark failed to run.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib as mpl
from rich.console import Console

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
SECTIONS: dict[str, tuple[str, list[str]]] = {
    "attention": ("attention alone", ["attention.py"]),
    "training": ("training GPT-2 124M", ["training.py"]),
    "llama": ("training a Llama of 124M", ["llama_training.py"]),
    "mixture": ("mixtures of experts", ["mixture.py"]),
    "lora": ("training an adapter", ["lora.py"]),
    "pattern": ("local and global layers", ["pattern.py"]),
    "window": ("training with a window", ["window_training.py"]),
    "segments": ("training on documents that do not see each other", ["segments.py"]),
    "table": ("the efficiency table", ["table.py", "--table", "{out}/table.json", "--work", "{out}/table"]),
    "decoding": ("cached decoding", ["decoding.py"]),
    "speculative": ("speculative decoding", ["speculative.py", "--out", "{out}/speculative"]),
}
COLORS = {"JAX": "#3f8cf4", "PyTorch": "#ee6a3b"}
# The original table: memory in GB, thousand tokens a second, perplexity.
ORIGINAL = {
    "Standard GPT-2": (12.4, 8.2, 24.3),
    "+ RoPE": (12.4, 8.1, 23.8),
    "+ GQA": (9.2, 10.5, 24.1),
    "+ Sliding window": (7.8, 12.3, 24.5),
}
Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    parts = options.out / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    if find_spec("libtpu") and not list(Path("/dev").glob("accel*")) + list(Path("/dev").glob("vfio/*")):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # or JAX looks for a TPU for minutes
    console = Console(stderr=True)
    failed = []
    for number, section in enumerate(options.only, 1):
        title, command = SECTIONS[section]
        script, *flags = (word.format(out=options.out) for word in command)
        with console.status(f"{number} of {len(options.only)}: {title}"):
            done = subprocess.run([sys.executable, HERE / script, *flags], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            console.print(f"{title} failed; run it alone: python benchmarks/{script}", style="red")
            failed.append(section)
            continue
        replace_text(parts / f"{section}.json", json.dumps(json.loads(done.stdout), indent=2))
        publish(options.out, parts)
        console.print(f"{title}: {options.out}/results.json")
    rows = read_rows(parts)
    print(markdown(rows, read_table(options.out)))
    sys.exit(1 if failed else 0)


def publish(out: Path, parts: Path) -> None:
    """Write results, table and picture of all parts that there are."""
    rows, table = read_rows(parts), read_table(out)
    replace_text(out / "results.json", json.dumps(rows, indent=2))
    replace_text(out / "table.md", markdown(rows, table))
    draw(rows, table, out / "bench.png")


def read_rows(parts: Path) -> Rows:
    """Rows of all parts, in the order of `SECTIONS`."""
    files = [parts / f"{section}.json" for section in SECTIONS]
    return [row for file in files if file.exists() for row in json.loads(file.read_text())]


def read_table(out: Path) -> dict[str, Any]:
    """The efficiency table by framework; empty when it has not been measured."""
    file = out / "table.json"
    return json.loads(file.read_text()) if file.exists() else {}


def replace_text(file: Path, text: str) -> None:
    """Write under another name first, so that a file is never half there."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(file)


def markdown(rows: Rows, table: dict[str, Any]) -> str:
    """The table and all rows, for people."""
    lines = [f"Measured on {platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}.", ""]
    if table:
        lines += [
            "| | configuration | training memory | of the original's | tokens/s | of the original's "
            "| cache of a sequence | perplexity |",
            "|---|---|---:|---:|---:|---:|---:|---:|",
        ]
    for framework, entries in table.items():
        plain = entries.get("Standard GPT-2", {})
        for name, found in entries.items():
            theirs = ORIGINAL[name]
            base = ORIGINAL["Standard GPT-2"]
            cells = [framework, name]
            if "tokens_per_second" in found:
                memory, rate = found["peak_memory_bytes"], found["tokens_per_second"]
                cells += [
                    f"{memory / 1e9:.2f} GB ({memory / plain['peak_memory_bytes']:.2f}x)",
                    f"{theirs[0] / base[0]:.2f}x",
                    f"{rate:.0f} ({rate / plain['tokens_per_second']:.2f}x)",
                    f"{theirs[1] / base[1]:.2f}x",
                    f"{found['cache_bytes'] / 1e6:.1f} MB",
                ]
            else:
                cells += [""] * 5
            cells.append(f"{found['perplexity']['1']:.1f}" if "perplexity" in found else "")
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| what | ours | against | theirs | ratio | target | met |", "|---|---:|---|---:|---:|---:|---|"]
    for row in rows:
        target = "" if row["target"] is None else f"{row['target']:.3g}"
        met = {None: "", True: "yes", False: "**no**"}[row["met"]]
        lines.append(
            f"| {row['name']} | {figure(row['ours'], row['unit'])} | {row['peer_name']} | "
            f"{figure(row['peer'], row['unit'])} | {row['ratio']:.3g} | {target} | {met} |"
        )
    return "\n".join(lines) + "\n"


def figure(value: float, unit: str) -> str:
    """A number with its unit, bytes as MB or GB."""
    if unit == "bytes" and value >= 1e9:
        return f"{value / 1e9:.2f} GB"
    if unit == "bytes" and value >= 1e5:
        return f"{value / 1e6:.1f} MB"
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def draw(rows: Rows, table: dict[str, Any], file: Path) -> None:
    """The table as bars, perplexity over length, and every ratio against its target."""
    bounded = [row for row in rows if row["target"] is not None]
    height = max(4.0, 0.26 * len(bounded) + 1)
    if any(table.values()):
        size = (13, 4.2 + height)
        figure_, axes = plt.subplots(2, 2, figsize=size, height_ratios=[4.2, height], layout="constrained")
        bars(axes[0, 0], table, "tokens_per_second", 1, "training, tokens/s")
        bars(axes[0, 1], table, "peak_memory_bytes", 1e9, "training, peak memory in GB")
        extrapolation(axes[1, 0], table)
        ratios(axes[1, 1], bounded)
    else:
        figure_, axis = plt.subplots(figsize=(10, height), layout="constrained")
        ratios(axis, bounded)
    temporary = file.with_name(f".{file.name}")
    figure_.savefig(temporary, dpi=110, format="png")
    plt.close(figure_)
    temporary.replace(file)


def bars(axis: Any, table: dict[str, Any], field: str, unit: float, title: str) -> None:
    """One field of the table, a bar for each row and framework."""
    axis.set_title(title)
    for number, (framework, entries) in enumerate(table.items()):
        measured = {name: found[field] / unit for name, found in entries.items() if field in found}
        places = [place + 0.4 * number for place in range(len(measured))]
        drawn = axis.bar(places, list(measured.values()), 0.38, color=COLORS[framework], label=framework)
        axis.bar_label(drawn, fmt="%.3g", fontsize=8)
        axis.set_xticks([place + 0.2 for place in range(len(measured))], list(measured))
    if table:
        axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)


def extrapolation(axis: Any, table: dict[str, Any]) -> None:
    """Perplexity at one, two and four times the trained length, over that at the trained length."""
    axis.set_title("perplexity over that at the trained length")
    styles = ["-", "--", "-.", ":"]
    for framework, entries in table.items():
        for style, (name, found) in zip(styles, entries.items(), strict=False):
            if "perplexity" in found:
                lengths = [int(times) for times in found["perplexity"]]
                relative = [value / found["perplexity"]["1"] for value in found["perplexity"].values()]
                axis.plot(lengths, relative, style, marker="o", color=COLORS[framework], label=f"{framework} {name}")
    axis.set_xscale("log", base=2)
    axis.set_xticks([1, 2, 4], ["1x", "2x", "4x"])
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axis.yaxis.set_minor_formatter(lambda value, _: f"{value:.3g}")
    axis.set_xlabel("length of a row")
    if axis.lines:
        axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def ratios(axis: Any, rows: Rows) -> None:
    """How far each ratio is on the good side of its target; left of 1 it misses it."""
    axis.set_title("on the good side of the target (right of 1)")
    labels, values, colors = [], [], []
    for row in rows:
        better = row["ratio"] / row["target"]
        if (better < 1) == row["met"] and better != 1:  # a bound from above
            better = 1 / better
        labels.append(f"{row['name']} / {row['peer_name']}")
        values.append(better)
        colors.append("#17a37f" if row["met"] else "#c23f31")
    axis.barh(range(len(values)), [value - 1 for value in values], left=1, color=colors)
    axis.axvline(1, color="#8b949e", linewidth=1)
    axis.set_yticks(range(len(labels)), labels, fontsize=6)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if value in {0.5, 2, 3, 5} else "")
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
