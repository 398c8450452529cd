"""A sweep's file: which settings are tried, in the schema of Weights & Biases, so that `wandb agent` runs it too."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from gpt_core.config import SWEEPS, config_directory, find_shipped
from gpt_core.errors import InputError, shown
from gpt_core.files.reading import read_yaml
from gpt_core.runs.config import RunConfig
from gpt_core.sections import is_number, is_whole, require_flag_count

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Scalar = str | int | float | bool | None
Method = Literal["grid", "random", "bayes"]
Goal = Literal["minimize", "maximize"]
Distribution = Literal["constant", "categorical", "int_uniform", "uniform", "q_uniform", "log_uniform_values"]

ARGS = "${args}"
"""Stands for a trial's settings in a command."""

_KEYS = ("program", "command", "method", "metric", "parameters", "run_cap", "name", "description", "project", "entity")
_BEFORE_PROGRAM = ("${env}", "${interpreter}")
_EXAMPLE = 'command: [jax-gpt, train, --config, tiny-cpu, "${args}"]'
_MOST_TRIALS = 100_000
_MOST_LEVELS = 2**53  # Optuna counts them in floats


@dataclass(frozen=True)
class Parameter:
    """A setting that trials differ in, and what it may be.

    Args:
        distribution: How it is chosen, in W&B's terms.
        values: What it may be: one value of "constant", several of "categorical".
        min: Smallest value.
        max: Largest value.
        q: Step of "q_uniform": values are its multiples between min and max. Whole numbers stay whole.

    Raises:
        InputError: values or bounds do not fit the distribution.
    """

    distribution: Distribution
    values: tuple[Scalar, ...] = ()
    min: int | float | None = None
    max: int | float | None = None
    q: int | float | None = None

    def __post_init__(self) -> None:
        if self.distribution in {"constant", "categorical"}:
            self._check_values()
            return
        for name in ("min", "max", *(["q"] if self.distribution == "q_uniform" else [])):
            value: Any = getattr(self, name)
            if not is_number(value):
                raise InputError(f"{name} = {shown(value)} must be a number with distribution {self.distribution}")
            if self.distribution == "int_uniform" and not isinstance(value, int):
                raise InputError(f"{name} = {value!r} must be a whole number with distribution int_uniform")
        low, high = self.bounds
        if low > high:
            raise InputError(f"min = {low!r} is larger than max = {high!r}")
        if self.distribution == "log_uniform_values" and low <= 0:
            raise InputError(f"min = {low!r} must be positive with distribution log_uniform_values")
        if self.distribution == "q_uniform":
            if self.q is not None and self.q <= 0:
                raise InputError(f"q = {self.q!r} must be positive")
            if not self._multiples:
                raise InputError(f"no multiple of q = {self.q!r} lies between min = {low!r} and max = {high!r}")
        levels = self.levels
        if isinstance(levels, range) and not is_whole(levels[-1] - levels[0], 0, _MOST_LEVELS):
            raise InputError(f"more than {_MOST_LEVELS:,} values lie between min and max; use a uniform distribution")

    def _check_values(self) -> None:
        if not self.values:
            raise InputError("values is an empty list")
        value: Any
        for value in self.values:
            if not isinstance(value, str | int | float | bool | None):
                raise InputError(f"the value {shown(value)} must be a number, a text, true, false or null")
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"the value {value!r} must be a finite number")
        if len(set(self.values)) < len(self.values):
            raise InputError(f"values = {shown(list(self.values))} has a value twice")

    @property
    def bounds(self) -> tuple[int | float, int | float]:
        """Smallest and largest value of a distribution that has them."""
        assert self.min is not None
        assert self.max is not None
        return self.min, self.max

    @property
    def _multiples(self) -> range:
        # In decimal: as floats 0.3 is not three times 0.1.
        low, high, q = (Decimal(str(number)) for number in (*self.bounds, self.q))
        return range(math.ceil(low / q), math.floor(high / q) + 1)

    @property
    def levels(self) -> Sequence[Any] | None:
        """What Optuna chooses among; None where the values are continuous."""
        if self.distribution in {"constant", "categorical"}:
            return self.values
        if self.distribution == "int_uniform":
            low, high = self.bounds
            return range(int(low), int(high) + 1)
        return self._multiples if self.distribution == "q_uniform" else None

    def optuna_distribution(self) -> "BaseDistribution":
        """As Optuna knows it, over levels."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        levels = self.levels
        if isinstance(levels, range):
            return IntDistribution(levels[0], levels[-1])
        if levels is not None:
            return CategoricalDistribution(levels)
        low, high = self.bounds
        return FloatDistribution(low, high, log=self.distribution == "log_uniform_values")

    def value(self, level: Any) -> Any:
        """The setting that a level stands for; `level` is the inverse."""
        if self.distribution != "q_uniform":
            return level
        exact = level * Decimal(str(self.q))
        return int(exact) if isinstance(self.q, int) else float(exact)

    def level(self, value: Any) -> Any:
        """Which level a setting stands at."""
        return int(Decimal(str(value)) / Decimal(str(self.q))) if self.distribution == "q_uniform" else value

    @classmethod
    def from_dict(cls, spec: Any, source: str) -> Self:
        """Read `{values: [...]}`, `{min: ..., max: ...}` and so on.

        Raises:
            InputError: a key or the distribution is unknown, or values do not fit.
        """
        if not isinstance(spec, Mapping):
            raise InputError(f"{source}: expected value, values, or min and max; found {shown(spec)}")
        spec = dict(spec)
        distribution = spec.pop("distribution", None) or _implied_distribution(spec, source)
        if distribution not in get_args(Distribution):
            raise InputError(
                f"{source}: distribution {distribution!r} is not supported; known are: "
                f"{', '.join(get_args(Distribution))}"
            )
        known = {"constant": {"value"}, "categorical": {"values"}, "q_uniform": {"min", "max", "q"}}
        wanted = known.get(distribution, {"min", "max"})
        unknown = [str(key) for key in spec if key not in wanted]
        missing = sorted(wanted - spec.keys() - {"q"})
        if unknown or missing:
            told = f"unknown key {', '.join(map(repr, unknown))}" if unknown else f"no {' and no '.join(missing)}"
            raise InputError(f"{source}: {told}; distribution {distribution} has: {', '.join(sorted(wanted))}")
        if distribution == "constant":
            spec = {"values": (spec["value"],)}
        elif distribution == "categorical":
            if not isinstance(spec["values"], list):
                raise InputError(f"{source}: values = {spec['values']!r} must be a list")
            spec = {"values": tuple(spec["values"])}
        elif distribution == "q_uniform":
            spec.setdefault("q", 1)
        try:
            return cls(distribution, **spec)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None


def _implied_distribution(spec: Mapping[str, Any], source: str) -> Distribution:
    if "value" in spec:
        return "constant"
    if "values" in spec:
        return "categorical"
    if {"min", "max"} <= spec.keys():
        return "int_uniform" if isinstance(spec["min"], int) and isinstance(spec["max"], int) else "uniform"
    raise InputError(f"{source}: needs value, values, or min and max; found: {', '.join(map(str, spec)) or 'nothing'}")


@dataclass(frozen=True)
class Sweep:
    """A sweep's file.

    Args:
        method: "grid" tries every combination, "random" draws, "bayes" learns from the trials before.
        metric: Name of a number in a run's `summary.json`.
        goal: Whether low or high is good.
        parameters: Settings by dotted name, such as "optimizer.learning_rate".
        command: What a trial runs, from the word after the program on; "${args}" stands for its settings.
        run_cap: Most trials; None when the file does not say.
    """

    method: Method
    metric: str
    goal: Goal
    parameters: Mapping[str, Parameter]
    command: tuple[str, ...]
    run_cap: int | None = None

    @classmethod
    def from_yaml(cls, path_or_name: str | Path) -> Self:
        """Read a sweep's file, or a shipped one by name.

        Raises:
            InputError: no such file or sweep, no YAML, an unknown key, or a bad value.
        """
        path = find_sweep(path_or_name)
        return cls.from_dict(read_yaml(path), source=str(path))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str = "sweep") -> Self:
        """Read a sweep in the schema of W&B.

        Raises:
            InputError: an unknown key, or a bad value; names `source` and the key.
        """
        if "early_terminate" in content:
            raise InputError(f"{source}: early_terminate is not supported, every trial runs to its end; take it out")
        unknown = [str(key) for key in content if key not in _KEYS]
        if unknown:
            raise InputError(f"{source}: unknown key {', '.join(map(repr, unknown))}; known are: {', '.join(_KEYS)}")
        for key, needed in (("method", ", ".join(get_args(Method))), ("metric", "name and goal"), ("parameters", "")):
            if not content.get(key):
                raise InputError(f"{source}: has no {key!r}" + (f" ({needed})" if needed else ""))
        if content["method"] not in get_args(Method):
            raise InputError(f"{source}: method = {content['method']!r} must be one of: {', '.join(get_args(Method))}")
        metric, goal = _read_metric(content["metric"], f"{source}: metric")
        parameters = dict(_flatten(content["parameters"], "", f"{source}: parameters"))
        run_cap = content.get("run_cap")
        if run_cap is not None and not is_whole(run_cap, 1, _MOST_TRIALS):
            raise InputError(
                f"{source}: run_cap = {shown(run_cap)} must be a whole number of at least 1, at most {_MOST_TRIALS:,}"
            )
        sweep = cls(content["method"], metric, goal, parameters, _read_command(content, source), run_cap)
        if sweep.method == "grid":
            sweep._check_grid(source)
        return sweep

    def _check_grid(self, source: str) -> None:
        for name, parameter in self.parameters.items():
            if parameter.levels is None:
                raise InputError(
                    f"{source}: {name}: a grid has no place for distribution {parameter.distribution}; give values, or "
                    f"choose method random or bayes"
                )
        if self.grid_size > _MOST_TRIALS:
            raise InputError(f"{source}: the grid has {self.grid_size:,} points, more than {_MOST_TRIALS:,}")

    @property
    def grid_size(self) -> int:
        """Points of the grid."""
        return math.prod(len(parameter.levels or ()) for parameter in self.parameters.values())

    def trials(self, limit: int | None) -> int:
        """How many trials there are to be: as many as `limit` or, without one, `run_cap` says; of a grid at most all.

        Raises:
            InputError: nobody says how many, or `limit` is out of range.
        """
        if limit is not None:
            require_flag_count("--trials", limit, 1, _MOST_TRIALS)
        most = limit if limit is not None else self.run_cap
        if self.method == "grid":
            return self.grid_size if most is None else min(most, self.grid_size)
        if most is None:
            raise InputError(f"method {self.method} has no end of its own: give --trials, or run_cap in the file")
        return most


def _read_metric(metric: Any, source: str) -> tuple[str, Goal]:
    if not isinstance(metric, Mapping) or not isinstance(metric.get("name"), str):
        raise InputError(f"{source}: needs a name, such as validation_loss; found {shown(metric)}")
    unknown = [str(key) for key in metric if key not in {"name", "goal"}]
    if unknown:
        raise InputError(f"{source}: unknown key {', '.join(map(repr, unknown))}; known are: name, goal")
    goal = metric.get("goal", "minimize")
    if goal not in get_args(Goal):
        raise InputError(f"{source}: goal = {goal!r} must be one of: {', '.join(get_args(Goal))}")
    return metric["name"], goal


def _read_command(content: Mapping[str, Any], source: str) -> tuple[str, ...]:
    command = content.get("command")
    if not isinstance(command, list) or not command:
        raise InputError(f"{source}: needs a command, a list of words such as: {_EXAMPLE}")
    words = [str(word) for word in command]
    while words and words[0] in _BEFORE_PROGRAM:
        words.pop(0)
    if words.count(ARGS) != 1 or words[0] == ARGS:
        raise InputError(f"{source}: the command needs {ARGS} once, where a trial's settings go: {_EXAMPLE}")
    unknown = [word for word in words[1:] if "${" in word and word != ARGS]
    if unknown:
        raise InputError(f"{source}: command: {', '.join(unknown)} is not supported, only {ARGS} is")
    return tuple(words[1:])


def _flatten(group: Any, prefix: str, source: str) -> Iterator[tuple[str, Parameter]]:
    if not isinstance(group, Mapping) or not group:
        raise InputError(f"{source}: expected settings such as optimizer.learning_rate, found {shown(group)}")
    for key, spec in group.items():
        name, place = f"{prefix}{key}", f"{source}: {key}"
        if isinstance(spec, Mapping) and "parameters" in spec:
            if len(spec) > 1:
                raise InputError(
                    f"{place}: a group has nothing beside 'parameters'; found: {', '.join(map(str, spec))}"
                )
            yield from _flatten(spec["parameters"], f"{name}.", place)
        else:
            if "." in name:  # others are checked when it is known what is run
                check_setting(name, source)
            yield name, Parameter.from_dict(spec, place)


def check_setting(name: str, source: str) -> None:
    """Refuse a name that no run has, before every trial does.

    Args:
        name: Dotted, such as "train.steps"; or "config", the file that the others change.
        source: Where it stands, for messages.

    Raises:
        InputError: no run has it; names `source` and what there is.
    """
    section: Any = RunConfig
    for part in name.split(".") if name != "config" else ():
        known = {field.name: field.default_factory for field in fields(section)} if is_dataclass(section) else {}
        if part not in known:
            raise InputError(
                f"{source}: unknown setting {shown(name)}; at {shown(part)} known are: {', '.join(known) or 'none'}"
            )
        section = known[part]


def sweep_names() -> list[str]:
    """Names that `find_sweep` knows without a path."""
    return sorted(path.stem for path in _sweep_files())


def _sweep_files() -> list[Path]:
    return list((config_directory() / SWEEPS).glob("*.yaml"))


def find_sweep(path_or_name: str | Path) -> Path:
    """Resolve a path of a YAML file or the name of a shipped sweep.

    Raises:
        InputError: neither exists; the message lists the sweeps.
    """
    return find_shipped(path_or_name, _sweep_files(), "sweep")
