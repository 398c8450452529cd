"""A mixture of experts against dense models in which a token meets as many parameters: equal steps, equal batches.

    python benchmarks/mixture_against_dense.py [--steps 300] [--framework JAX PyTorch] [--work DIR]

`tiny-moe-cpu` (8 experts, 2 active), `tiny-cpu` (a GELU, biases), and the mixture with one MLP in the place of its
experts (gated as they are, and as wide as two of them and the router): losses on the interpreter's own library after a
training by the console commands, each in a process of its own. Prints JSON rows (see `turns.row`), with the load of the
busiest and of the idlest expert at the end.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from turns import Row, print_rows, row

from gpt_core.parameters import active_size, parameter_table
from gpt_core.routing import LOAD
from gpt_core.runs.config import RunConfig
from gpt_core.runs.tracking import read_metrics

PROGRAMS = {"JAX": "jax-gpt", "PyTorch": "torch-gpt"}
MIXTURE, DENSE, GATED = "tiny-moe-cpu", "tiny-cpu", "tiny-moe-cpu, one MLP"
_EXPERTS = ("n_experts", "experts_per_token", "expert_dim", "router_normalise")


def models() -> dict[str, dict[str, Any]]:
    """The model section of each side. The gated MLP is as wide as it must be to have no fewer parameters."""
    mixture, dense = (RunConfig.from_yaml(name).model for name in (MIXTURE, DENSE))
    fields = {name: value for name, value in mixture.to_dict().items() if name not in _EXPERTS}
    width = mixture.experts_per_token * (mixture.expert_dim or 0) + -(-mixture.n_experts // 3)
    return {MIXTURE: mixture.to_dict(), DENSE: dense.to_dict(), GATED: fields | {"mlp_dim": width}}


def trained(framework: str, name: str, model: dict[str, Any], work: Path, steps: int, evaluated: int) -> float:
    """Validation loss at the end of a run."""
    place = work / f"{PROGRAMS[framework]}-{name.replace(', ', '-').replace(' ', '-').lower()}"
    config = RunConfig.from_yaml(MIXTURE).to_dict() | {"model": model}
    config["data"] |= {"prepared": str(work / "stdlib")}
    config["train"] |= {
        "steps": steps,
        "evaluate_every": steps,
        "evaluation_batches": evaluated,
        "checkpoint_every": steps,
    }
    file = place.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    found = command(PROGRAMS[framework], "train", "--config", str(file), "--out", str(place))
    return float(found["validation_loss"])


def of_framework(framework: str, work: Path, steps: int, evaluated: int) -> list[Row]:
    """The rows of one framework."""
    sizes = models()
    losses = {name: trained(framework, name, model, work, steps, evaluated) for name, model in sizes.items()}
    last = [record for record in read_metrics(work / f"{PROGRAMS[framework]}-{MIXTURE}") if LOAD in record][-1]
    shares = [share * len(layer) for layer in last[LOAD] for share in layer]
    results = []
    for name in (DENSE, GATED):
        what = f"validation loss after {steps} steps, {framework}: {active(sizes[MIXTURE]):,} parameters a token"
        against = f"{name}, {active(sizes[name]):,}"
        found = row(what, losses[MIXTURE], losses[name], against, "nats", at_most=1.0, less_is_better=True)
        results.append(found | {"load": {"idlest": min(shares), "busiest": max(shares)}})
    return results


def active(model: dict[str, Any]) -> int:
    """Parameters that one token meets."""
    config = RunConfig.from_dict({"model": model}).model
    return sum(active_size(own, config) for own in parameter_table(config).values())


def command(program: str, *arguments: str) -> Any:
    """Run a console command beside this interpreter; what it prints as JSON."""
    words = [str(Path(sys.executable).with_name(program)), *arguments, "--json"]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", nargs="+", choices=list(PROGRAMS), default=list(PROGRAMS))
    parser.add_argument("--steps", type=int, default=RunConfig.from_yaml(MIXTURE).train.steps)
    parser.add_argument("--evaluated", type=int, default=50, help="batches of 8 x 128 tokens")
    parser.add_argument("--work", type=Path, default=Path("runs/bench/mixture"), help="folder of the runs")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.work / "stdlib").exists():
        command("gpt-data", "prepare", "stdlib", str(options.work / "stdlib"))
    settings = options.work, options.steps, options.evaluated
    print_rows([own for framework in options.framework for own in of_framework(framework, *settings)])


if __name__ == "__main__":
    main()
