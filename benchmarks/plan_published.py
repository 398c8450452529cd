"""Step times that `jax-gpt plan` predicts for shapes with published results, beside those results. No TPU is needed.

    python benchmarks/plan_published.py

The published ones are MaxText's (github.com/AI-Hypercomputer/maxtext, its README and MaxText/configs): synthetic data,
2,048 tokens a row, flash attention. Its MLP has three matrices with a gate and ours two: at 1.5 times its width both
have as many parameters and multiply as much.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

SHARED = {"vocab_size": 32000, "context_length": 2048, "n_layers": 32, "n_heads": 64, "head_dim": 128}
SHARED |= {"mlp_dim": 43008, "position": "rope", "bias": False}
# name, topology, model, rows of a chip, chips, mesh, remat, published seconds of a step
SHAPES: list[tuple[str, str, dict[str, Any], int, int, dict[str, int], str, float]] = [
    ("16B, v5e-256", "v5e:16x16", {"embed_dim": 4096}, 6, 256, {"data": 1, "fsdp": 256}, "full", 10.31),
    ("32B, v5e-256", "v5e:16x16", {"embed_dim": 8192}, 4, 256, {"data": 1, "fsdp": 256}, "full", 12.09),
    ("32B, v5p-128", "v5p:4x4x4", {"embed_dim": 8192}, 7, 64, {"data": 1, "fsdp": 16, "tensor": 4}, "dots", 7.30),
]


def planned(topology: str, config: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "jax_gpt", "plan", "--config", str(path), "--topology", topology]
        done = subprocess.run([*command, "--json", "--no-search"], capture_output=True, text=True, check=False)
    if not done.stdout:
        sys.exit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    print("| shape | predicted seconds | published | middle against published | fits | GB sent, least |")
    print("|---|---:|---:|---:|---|---:|")
    for name, topology, model, rows, chips, mesh, remat, published in SHAPES:
        config = {
            "model": SHARED | model,
            "train": {"batch_size": rows * chips, "dtype": "bfloat16"},
            "jax": {"mesh": mesh, "remat": remat, "attention": "splash"},
        }
        plan = planned(topology, config)
        if not plan["fits"]:
            print(f"| {name} | does not fit: {plan['peak_bytes'] / 2**30:.1f} GiB | {published} | | no | |", flush=True)
            continue
        low, high = plan["predicted_step_seconds"]
        wire = plan["wire_bytes"]
        print(
            f"| {name} | {low:.2f} to {high:.2f} | {published:.2f} | {(low + high) / 2 / published - 1:+.0%} | yes | "
            f"{wire['total'] / 1e9:.1f}, {wire['minimum'] / 1e9:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
