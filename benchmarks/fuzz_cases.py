"""What `fuzz.py` tries: commands, fields, bad values, and files that are cut, flipped or something else.

A case derives from a seed and its number alone. It names a command line, the fixtures that it needs, and what is done
to them beforehand.
"""

import gzip
import io
import json
import os
import random
import re
import shutil
import socket
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

Chance = random.Random
Spoil = Callable[[Path], None]
MARK = "QQMARKQQ"  # stands for a value that JSON or YAML cannot be made to write


# ------------------------------------------------------------------------------------------------------------ fixtures


class Fixture(NamedTuple):
    """A file or folder that cases copy: a command line that makes it, or a function, and what that needs."""

    make: str | Callable[[Path], None]
    needs: tuple[str, ...] = ()


_MODEL = {"vocab_size": 50257, "context_length": 32, "n_layers": 2, "n_heads": 2, "embed_dim": 8}
_ROPE = _MODEL | {
    "position": "rope",
    "n_kv_heads": 1,
    "sliding_window": 8,
    "attention_pattern": "LG",
    "rope_scaling": {"kind": "llama3", "factor": 4.0, "original_context": 8},
    "norm": "rms",
    "qk_norm": "head",
    "gated_mlp": True,
}
_RUN: dict[str, Any] = {
    "model": _ROPE,
    "data": {"source": "texts", "streams": 2, "validation_fraction": 0.3},
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 1},
    "train": {"steps": 2, "batch_size": 2, "log_every": 1, "evaluate_every": 2, "evaluation_batches": 1}
    | {"checkpoint_every": 1},
}
_SWEEP: dict[str, Any] = {
    "program": "torch-gpt",
    "command": ["${program}", "train", "--config", "run.yaml", "${args}"],
    "method": "random",
    "metric": {"name": "validation_loss", "goal": "minimize"},
    "run_cap": 1,
    "parameters": {
        "optimizer.learning_rate": {"distribution": "log_uniform_values", "min": 1e-3, "max": 1e-2},
        "optimizer.weight_decay": {"distribution": "q_uniform", "min": 0, "max": 0.2, "q": 0.1},
        "train": {"parameters": {"seed": {"min": 0, "max": 3}, "log_every": {"value": 1}}},
        "model.position": {"values": ["rope"]},
    },
}
_WORDS = ["the", "a", "window", "of", "keys", "and", "one", "query", "sees", "its", "own", "past", "but", "never"]


def _documents() -> list[str]:
    chance = Chance(0)
    return [" ".join(chance.choices(_WORDS, k=200)) for _ in range(16)]


def _write_yaml(content: Any, path: Path) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def _texts(folder: Path) -> None:
    folder.mkdir()
    for number, text in enumerate(_documents()):
        (folder / f"{number:02d}.txt").write_text(text, encoding="utf-8")


def _records() -> str:
    return "".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(_documents()))


def _table(separator: str, path: Path) -> None:
    path.write_text(f"text{separator}n\n" + "".join(f"{text}{separator}1\n" for text in _documents()))


def _parquet(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": _documents()}), path)


def _zstandard(content: bytes, path: Path) -> None:
    import pyarrow

    with pyarrow.output_stream(path, compression="zstd") as stream:
        stream.write(content)


def _zeros(path: Path) -> None:
    """400 MB in 0.4 MB."""
    with gzip.open(path, "wb", compresslevel=6) as stream:
        for _ in range(400):
            stream.write(bytes(1_000_000))


def _zstandard_zeros(path: Path) -> None:
    _zstandard(bytes(400_000_000), path)


def _tokens(path: Path) -> None:
    import numpy as np

    np.save(path, np.arange(32, dtype=np.int32).reshape(2, 16))


_TRAIN = "{name}-gpt train --config run.yaml --out run-{name} --data.prepared data"
FIXTURES: dict[str, Fixture] = {
    "model.yaml": Fixture(partial(_write_yaml, {"model": _MODEL})),
    "rope.yaml": Fixture(partial(_write_yaml, {"model": _ROPE})),
    "run.yaml": Fixture(partial(_write_yaml, _RUN)),
    "sweep.yaml": Fixture(partial(_write_yaml, _SWEEP)),
    "texts": Fixture(_texts),
    "d.jsonl": Fixture(lambda path: path.write_text(_records()) and None),
    "d.csv": Fixture(partial(_table, ",")),
    "d.tsv": Fixture(partial(_table, "\t")),
    "d.parquet": Fixture(_parquet),
    "d.txt.gz": Fixture(lambda path: path.write_bytes(gzip.compress(_records().encode(), mtime=0)) and None),
    "d.jsonl.zst": Fixture(lambda path: _zstandard(_records().encode(), path)),
    "zeros.txt.gz": Fixture(_zeros),
    "zeros.jsonl.gz": Fixture(_zeros),
    "zeros.txt.zst": Fixture(_zstandard_zeros),
    "tokens.npy": Fixture(_tokens),
    "torch": Fixture("torch-gpt init torch --config model.yaml", ("model.yaml",)),
    "jax": Fixture("parity convert torch jax --to jax", ("torch",)),
    "jax-rope": Fixture("jax-gpt init jax-rope --config rope.yaml", ("rope.yaml",)),
    "hf": Fixture("parity convert torch hf --to hf", ("torch",)),
    "hf-rope": Fixture("parity convert jax-rope hf-rope --to hf", ("jax-rope",)),
    "hf-shards": Fixture("parity convert torch hf-shards --to hf --max-shard-size 100000", ("torch",)),
    "data": Fixture("gpt-data prepare texts data --validation-fraction 0.3", ("texts",)),
    # Of prepared data: where text lies, as its absolute path, is part of a run that reads it.
    "run-torch": Fixture(_TRAIN.format(name="torch"), ("run.yaml", "data")),
    "run-jax": Fixture(_TRAIN.format(name="jax"), ("run.yaml", "data")),
    "a.npz": Fixture("parity record torch a.npz --framework torch --tokens tokens.npy", ("torch", "tokens.npy")),
    "b.npz": Fixture("parity record jax b.npz --framework jax --tokens tokens.npy", ("jax", "tokens.npy")),
    "rec": Fixture("parity record torch rec --framework torch --tokens tokens.npy --trace", ("torch", "tokens.npy")),
    "rec2": Fixture(lambda path: shutil.copytree(path.with_name("rec"), path) and None, ("rec",)),
    "report": Fixture("parity compare rec rec2 --out report", ("rec", "rec2")),
    "sweep": Fixture("torch-gpt sweep sweep.yaml --out sweep --trials 1", ("sweep.yaml", "run.yaml", "texts")),
}


# -------------------------------------------------------------------------------------------------------- command lines


@dataclass(frozen=True)
class Line:
    """A command line that is right.

    Args:
        text: As one types it; what stands for a path is in braces, and `{new}` is not there yet.
        more: Fixtures that it needs and does not name.
        seconds: About how long it takes; long ones are tried more rarely.
        writes: Fixtures that it may change.
    """

    text: str
    more: tuple[str, ...] = ()
    seconds: float = 0.4
    writes: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """Program and subcommand."""
        return " ".join(self.text.split()[:2])

    @property
    def words(self) -> list[str]:
        return re.sub(r"[{}]", "", self.text).split()

    @property
    def paths(self) -> list[tuple[int, str]]:
        """Words that are paths, by number, and what stands in front of the path in it ("--config=")."""
        return [(n, word.partition("{")[0]) for n, word in enumerate(self.text.split()) if "{" in word]

    @property
    def needs(self) -> list[str]:
        """Fixtures, those that others need included."""
        named = [name.partition("/")[0] for name in re.findall(r"{([^}]*)}", self.text)]
        return [name for name in dict.fromkeys([*named, *self.more]) if name in FIXTURES]


def _lines_of_a_twin(name: str, seconds: float) -> list[Line]:
    train = f"{name}-gpt train --config={{run.yaml}}"
    run_again = f"{train} --out={{run-{name}}} --data.prepared={{data}} --train.steps=3"
    return [
        Line(f"{train} --out={{new}}", ("texts",), seconds),
        Line(f"{train} --out={{new}} --data.prepared={{data}}", (), seconds),
        Line(f"{train} --out={{new}} --data.source={{d.jsonl}}", (), seconds),
        Line(run_again, (), seconds, (f"run-{name}",)),
        Line(f"{name}-gpt eval {{run-{name}}}", ("data",), seconds / 2),
        Line(f"{name}-gpt eval {{{name}}} --config={{run.yaml}}", ("texts",), seconds / 2),
        Line(f"{name}-gpt generate {{run-{name}}} the --max-new-tokens=2", (), seconds / 2),
        Line(f"{name}-gpt generate {{{name}}} the a --max-new-tokens=2 --draft={{{name}}} --json", (), seconds),
        Line(f"{name}-gpt init {{new}} --config={{model.yaml}}", (), seconds / 2),
        Line(f"{name}-gpt sweep {{sweep.yaml}} --out={{new}} --trials=1", ("run.yaml", "texts"), 7),
    ]


LINES = [
    Line("parity convert {torch} {new} --to=jax"),
    Line("parity convert {torch} {new} --to=hf --report={report}/report.json --max-shard-size=1000000", seconds=0.6),
    Line("parity convert {torch} {jax} --to=jax --force", writes=("jax",)),
    Line("parity convert {jax} {new} --to=torch --dtype=bfloat16"),
    Line("parity convert {hf} {new} --to=torch"),
    Line("parity convert {hf-rope} {new} --to=jax --unrolled"),
    Line("parity convert {hf-shards} {new} --to=jax"),
    Line("parity convert {run-torch} {new} --to=jax --state"),
    Line("parity convert {run-jax} {new} --to=torch --state"),
    Line("parity convert {run-jax}@best {new} --to=torch"),
    *(Line(f"parity inspect {{{name}}}") for name in ("torch", "jax", "hf", "hf-rope", "hf-shards", "run-torch")),
    Line("parity inspect {run-jax} --json"),
    Line("parity verify {hf} --dtype=float32 --new-tokens=2 --against={torch} --text={texts}/00.txt", seconds=7),
    Line("parity verify {hf-rope} --dtype=float32 --new-tokens=2 --out={new}", seconds=7),
    Line("parity record {torch} {new}.npz --framework=torch --tokens={tokens.npy}", seconds=0.5),
    Line("parity record {jax} {new} --framework=jax --text={texts}/00.txt --trace", seconds=0.8),
    Line("parity record {hf-shards} {new}.npz --framework=torch --gradients", seconds=0.7),
    Line("parity compare {a.npz} {b.npz}", seconds=0.2),
    Line("parity compare {rec} {rec2} --out={new}", seconds=0.2),
    Line("parity check {torch} {jax} --dtype=float32 --tokens={tokens.npy} --out={new}", seconds=8),
    Line("parity check --variant=learned-mha-full --dtype=float32 --fault=window-off-by-one", seconds=8),
    Line("parity train --config={run.yaml} --out={new} --steps=2 --variant=config --dtype=float32", ("texts",), 10),
    *(line for name, seconds in (("torch", 0.7), ("jax", 2.5)) for line in _lines_of_a_twin(name, seconds)),
    Line("torch-gpt sweep {sweep.yaml} --out={sweep} --trials=1", ("run.yaml", "texts"), writes=("sweep",)),
    Line("jax-gpt plan --config={run.yaml} --topology=v5e:2x2", ("texts",), 0.3),
    *(
        Line(f"gpt-data prepare {{{name}}} {{new}} --validation-fraction=0.3", seconds=0.3)
        for name in ("texts", "d.jsonl", "d.csv", "d.tsv", "d.parquet", "d.txt.gz", "d.jsonl.zst")
    ),
    Line("gpt-data prepare {texts} {data} --force", writes=("data",), seconds=0.3),
    Line("gpt-data inspect {data} --verify", seconds=0.2),
]
COMMANDS = sorted({line.command for line in LINES})


# --------------------------------------------------------------------------------------------------------------- values

# What a flag may be given.
TEXTS = [
    *("", " ", "null", "None", "~", "true", "-1", "0", "1", "1.5", "-0.0", "1e400", "1e-400", "nan", "inf", "-inf"),
    *(".inf", ".nan", "1000000000000", "9223372036854775808", "18446744073709551616", "1" + "0" * 38, "9" * 5000),
    *("0x10", "0o17", "1_000", "\uff11\uff12", "\u0663", "[]", "{}", "[1", "[1, 2]", "{a: b", "{a: 1}", "a: b: c"),
    *("é", "日本", "\udcff", "a\nb", "a\rb", "\x1b[31mred", "a\u2028b", "a\x85b", "\x07", "\t", "x" * 300),
    *("x" * 70_000,),
    *("*a", "&a [*a]", "&a [x, x, x]", "!!python/object/apply:os.system [true]", "!!binary zzz", "2001-01-01", "--"),
    *("%", "@", "`", "'", '"', "=", "a=b", "a,b", "[" * 2000, "[" * 20_000, "{a: " * 2000, "/", "no/such", "zero"),
    *("model.n_layers=1", "nope=1", "train.steps=-1", "float64", "auto", "reference", "v5e:0x0", "v5e:99999x99999"),
]
# What a value of a YAML or JSON file may be, as text that stands in its place; what only YAML knows comes last.
JSON_VALUES = [
    *("null", "true", "false", '""', '" "', '"x"', "[]", "{}", "[1, 2]", '{"a": 1}', "-1", "0", "1", "2"),
    *("1.5", "-0.0"),
    *("1e400", "1e308", "1e-320", "1000000000000", "1000000000000000000", "9223372036854775808"),
    *("18446744073709551616",),
    *("9" * 5000, "NaN", "Infinity", "-Infinity", '"a\\nb"', '"\\u001b[31mred"', '"a\\u2028b"', '"\\ud800"', '"é"'),
    *('"' + "x" * 300 + '"', '"' + "x" * 5000 + '"', '"../outside"', '"/etc/passwd"', '"zero"', '"fifo"', '"loop"'),
    *('"folder"', '"gs://bucket/x"', '"zip://x::/etc/passwd"', '"1"', '"1e3"', '"null"', "[null]", '[{"a": []}]'),
    *('"float32"', '"<f4"', '"|O"', '["a", 1, null, true]', "[[[[[[]]]]]]", "[" * 500 + "]" * 500),
]
YAML_VALUES = [
    *JSON_VALUES,
    *(".inf", ".nan", "-.inf", "1_000", "0o17", "0x10", "yes", "~", "5e-4", "1:30", "2001-01-01", "<<", "!!set {a, b}"),
    *("!!python/name:os.system", "!!python/object/apply:os.system [true]", "!!binary zzz", "!unknown x"),
    *("&a [*a]", "*b"),
]
# Numbers that a person may mean, and that take for ever.
_ENDLESS_FIELDS = {"steps", "trials", "run_cap", "train.steps", "decay_steps"}
_HUGE = re.compile(r'^"?(\d{10,}|1e308|9+)"?$')
# Models and texts that a person may mean, and that are large: the defaults.
_LARGE_SECTIONS = {"model", "data", "source", "data.source"}


def _meant(name: str, value: str) -> bool:
    """Whether a value that takes long is one that a person may mean."""
    if name.lstrip("-") in _ENDLESS_FIELDS and _HUGE.match(value):
        return True
    if name.endswith("compile") and value in {"true", "yes"}:
        return True
    return name.lstrip("-") in _LARGE_SECTIONS and value.strip("\"'") in {"{}", "null", "~", "[]", "stdlib", "/"}


# What a path may be. The folder that a case runs in has these beside its fixtures; see `_specials`.
PATHS = [
    *("missing", "missing/below", "file.txt", "file.txt/below", "empty", "empty.yaml", "folder", "folder/"),
    *("folder/a.txt",),
    *("folder/../folder", "links", "loop", "loop/below", "dangling", "fifo", "zero", "full", "null", "socket"),
    *("x" * 300,),
    *("x/" * 2500 + "x", "a\nb", "\x1b[31mred", "a\u2028b", "folder\x07", "\udcff", "é/日本", " ", "", "."),
    *("..", "-dash"),
    *("torch", "torch/below", "run-torch", "data", "data/below", "texts", "rec", "run.yaml", "tokens.npy"),
    *("fold[er]", "*", "folder/*", "?", "@", "@best", "run-torch@99999999999999999999", "run-torch@-1"),
    *("run-torch@x@best",),
    *("~", "~nobody/x", "$HOME", "C:\\x", "owner/name", "stdlib", "tiny-cpu/x"),
    *("gs://bucket/x", "s3://bucket/x", "hf:owner/name", "hf://owner/name", "memory://x", "memory:x", "file:x"),
    *("http:x",),
    *("file:///nowhere/x", "http://localhost:1/x", "https://localhost:1/x", "ftp://localhost:1/x", "az://c/x"),
    *("abc://x",),
    *("zip://x::/etc/passwd", "zip://x::file.txt", "simplecache::memory://x", "github://a:b@c/x", "local://folder"),
]


def _specials(folder: Path) -> None:
    (folder / "file.txt").write_text("a file\n")
    (folder / "empty.yaml").write_text("")
    (folder / "empty").mkdir()
    (folder / "folder").mkdir()
    (folder / "folder" / "a.txt").write_text("something of a person's\n")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "links").mkdir()
    (folder / "links" / "again").symlink_to("..")
    os.mkfifo(folder / "fifo")
    with socket.socket(socket.AF_UNIX) as made:
        os.chdir(folder)  # a socket's name has 108 bytes at most
        made.bind("socket")
    for name in ("zero", "full", "null"):
        _device(folder / name, name)


def _device(path: Path, name: str) -> None:
    # Of our own, where we may: what replaces it must not replace that of the machine.
    try:
        os.mknod(path, 0o020666, os.stat(f"/dev/{name}").st_rdev)
        path.open("rb").close()
    except PermissionError:
        path.unlink(missing_ok=True)
        path.symlink_to(f"/dev/{name}")


# ---------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """Something to try.

    Args:
        number: Which one.
        kind: What sort of thing it is.
        words: The command line.
        note: What was done to files.
        needs: Fixtures to copy.
        writes: What the command may change when it succeeds.
        spoil: Does it, in the folder with the fixtures.
        stdout: Where standard output goes, if not to a file.
    """

    number: int
    kind: str
    words: list[str]
    note: str = ""
    needs: Sequence[str] = ()
    writes: Sequence[str] = ()
    spoil: Spoil = field(default=lambda folder: None)
    stdout: str | None = None

    @property
    def command(self) -> str:
        """Program and subcommand."""
        return " ".join(self.words[:2])


class Flag(NamedTuple):
    """An argument that a command takes: its name, "" for one without, and whether it has a value."""

    name: str
    takes_value: bool


Flags = Mapping[str, Sequence[Flag]]
Made = tuple[Line, list[str], str, Spoil]  # line, words, note, spoil


class Maker:
    """Makes cases.

    Args:
        seed: Of all of them.
        flags: Of every command.
        fixtures: Folder in which they lie.
        only: Kinds and commands to keep to; all without one.
    """

    def __init__(self, seed: int, flags: Flags, fixtures: Path, only: Sequence[str] = ()) -> None:
        self._seed, self._flags, self._fixtures = seed, flags, fixtures
        self._kinds = [kind for kind in KINDS if kind in only] or list(KINDS)
        commands = [command for command in COMMANDS if any(word in (command, *command.split()) for word in only)]
        self.lines = lines_of(commands or COMMANDS)

    def case(self, number: int) -> Case:
        """The case with a number."""
        chance = Chance(f"{self._seed}/{number}")
        for _ in range(10_000):  # until there is one: not every command has every kind
            kind = chance.choices(self._kinds, [KINDS[kind].weight for kind in self._kinds])[0]
            made = KINDS[kind].make(self, chance)
            if made is not None:
                break
        else:
            raise SystemExit("--only leaves no case: these commands have nothing of these kinds")
        line, words, note, spoil = made
        stdout = "/dev/full" if kind == "stdout" else None
        needs = [name for name in FIXTURES if name in line.needs]
        return Case(number, kind, words, note, needs, [*line.writes, "new", "new.npz"], spoil, stdout)

    # Each of these gives a line, its words after the change, what was done to files, and the function that does it.

    def _line(self, chance: Chance, wanted: Callable[[Line], object] = lambda line: True) -> Line | None:
        lines = [line for line in self.lines if wanted(line)]
        return chance.choices(lines, [1 / (0.5 + line.seconds) for line in lines])[0] if lines else None

    def flag(self, chance: Chance) -> Made | None:
        command = chance.choice(sorted({line.command for line in self.lines}))
        line = self._line(chance, lambda line: line.command == command)
        assert line is not None
        dotted = chance.random() < 0.6
        flags = [flag for flag in self._flags[command] if ("." in flag.name) == dotted and flag.name != "--force"]
        if not flags:
            return None
        flag, value = chance.choice(flags), chance.choice(TEXTS)
        if _meant(flag.name, value):
            return None
        words = line.words
        if not flag.name:  # a word without a flag takes the place of the first one, or stands behind all
            place = chance.choice([2, len(words)])
            words[place : place + 1] = [value]
        elif flag.takes_value:
            apart = chance.random() < 0.3
            words = [word for word in words if word.partition("=")[0] != flag.name]
            words += [flag.name, value] if apart else [f"{flag.name}={value}"]
        else:
            words += chance.choice([[f"{flag.name}={value}"], [flag.name, value], [f"{flag.name}x"], [flag.name] * 2])
        # Nothing of this machine's; and PyTorch's compiler takes longer than a case may.
        if any(word in {"--force", "/", "--compile"} or word.endswith("=/") for word in words):
            return None
        return line, words, "", _specials

    def path(self, chance: Chance) -> Made | None:
        line = self._line(chance, lambda line: line.paths and "--force" not in line.words)
        if line is None:
            return None
        (place, before), value = chance.choice(line.paths), chance.choice(PATHS)
        words = line.words
        words[place] = before + value
        return line, words, "", _specials

    def stdout(self, chance: Chance) -> Made | None:
        line = self._line(chance, lambda line: line.seconds < 5)
        if line is None:
            return None
        words = [word for word in line.words if word != "--json"]
        return line, words + chance.choice([[], ["--json"], ["--help"]]), "", lambda folder: None

    def yaml_field(self, chance: Chance) -> Made | None:
        found = self._yaml_of(chance)
        if found is None:
            return None
        line, name, content = found
        tree, note, change = _changed(content, YAML_VALUES, chance)
        if tree is None:
            return None
        text = change(yaml.safe_dump(tree, sort_keys=False, width=1 << 30))
        return line, line.words, f"{name}: {note}", partial(_replace_text, name, text)

    def yaml_text(self, chance: Chance) -> Made | None:
        found = self._yaml_of(chance)
        if found is None:
            return None
        line, name, content = found
        what, spoil = chance.choice(list(_BROKEN_YAML.items()))
        text = yaml.safe_dump(content, sort_keys=False)
        return line, line.words, f"{name}: {what}", lambda folder: _write(folder / name, spoil(text))

    def _yaml_of(self, chance: Chance) -> tuple[Line, str, Any] | None:
        line = self._line(chance, lambda line: any(name.endswith(".yaml") for name in line.needs))
        if line is None:
            return None
        name = next(name for name in line.needs if name.endswith(".yaml"))
        content = yaml.safe_load((self._fixtures / name).read_text(encoding="utf-8"))
        if name != "sweep.yaml":  # every field with its value, as a run has it
            whole = yaml.safe_load((self._fixtures / "run-torch/config.yaml").read_text(encoding="utf-8"))["run"]
            whole["data"]["prepared"] = None  # not every line has that folder
            content = whole if name == "run.yaml" else {"model": whole["model"]}
        return line, name, content

    def json_field(self, chance: Chance) -> Made | None:
        found = self._file(chance, _has_fields)
        if found is None:
            return None
        line, path = found
        note, content = _changed_file(self._fixtures / path, chance)
        if content is None:
            return None
        return line, line.words, f"{path}: {note}", _both(_specials, partial(_replace_bytes, path, content))

    def json_text(self, chance: Chance) -> Made | None:
        found = self._file(chance, lambda path: path.suffix in {".json", ".jsonl", ".zarray"} or _is_json(path))
        if found is None:
            return None
        line, path = found
        what, spoil = chance.choice(list(_BROKEN_JSON.items()))
        text = (self._fixtures / path).read_text(encoding="utf-8")
        return line, line.words, f"{path}: {what}", lambda folder: _write(folder / path, spoil(text))

    def file(self, chance: Chance) -> Made | None:
        found = self._file(chance, lambda path: True)
        if found is None:
            return None
        line, path = found
        folder = str(Path(path).parent)
        if folder != "." and chance.random() < 0.1:
            return _with_folder(line, folder, chance)
        what, spoil = _damage(self._fixtures, path, chance)
        return line, line.words, f"{path}: {what}", spoil

    def _file(self, chance: Chance, wanted: Callable[[Path], bool]) -> tuple[Line, str] | None:
        """A line, and a file that it reads; every folder is as likely as the next, whatever it holds."""
        line = self._line(chance, lambda line: line.needs)
        if line is None:
            return None
        groups = _groups(self._fixtures, tuple(line.needs))
        kept = {folder: files for folder, group in groups.items() if (files := [f for f in group if wanted(Path(f))])}
        if not kept:
            return None
        group = kept[chance.choice(sorted(kept))]
        path = chance.choice(group)
        return line, str(Path(path).relative_to(self._fixtures))

    def source(self, chance: Chance) -> Made | None:
        line = self._line(chance, lambda line: re.search(r"prepare|data.source", line.text) and not line.writes)
        if line is None:
            return None
        name, content = chance.choice(SOURCES)
        words = [f"--data.source={name}" if word.startswith("--data.source") else word for word in line.words]
        if line.command == "gpt-data prepare":
            words[2] = name
            words += chance.choice([[], [], ["--on-error=skip"], ["--workers=1"], ["--text-field=n"]])
        if isinstance(content, str):
            line = Line(line.text, (*line.more, content), line.seconds)
        note = f"{name}: {_SOURCE_NOTES[name]}"
        return line, words, note, lambda folder: None if isinstance(content, str) else content(folder / name)


class Kind(NamedTuple):
    """How cases of a kind are made, and how often."""

    make: Callable[[Maker, Chance], Made | None]
    weight: int
    says: str


KINDS = {
    "flag": Kind(Maker.flag, 25, "a flag with a bad value"),
    "path": Kind(Maker.path, 14, "a path to something strange"),
    "yaml-field": Kind(Maker.yaml_field, 14, "a field of a YAML file"),
    "yaml-text": Kind(Maker.yaml_text, 5, "a YAML file that is none, or a trap"),
    "json-field": Kind(Maker.json_field, 14, "a field of a JSON file or of a header"),
    "json-text": Kind(Maker.json_text, 5, "a JSON file that is none, or a trap"),
    "file": Kind(Maker.file, 16, "a file cut, flipped, emptied, removed, replaced"),
    "source": Kind(Maker.source, 5, "a broken source of text"),
    "stdout": Kind(Maker.stdout, 2, "a full disk behind standard output"),
}


def lines_of(commands: Iterable[str]) -> list[Line]:
    """The command lines of commands."""
    wanted = set(commands)
    return [line for line in LINES if line.command in wanted]


def fixtures_of(lines: Iterable[Line]) -> list[str]:
    """Fixtures that lines need, each behind those that it needs itself."""
    ordered: list[str] = []

    def add(name: str) -> None:
        for needed in FIXTURES[name].needs:
            add(needed)
        if name not in ordered:
            ordered.append(name)

    for name in ("run-torch", *(name for line in lines for name in line.needs)):
        add(name)
    if any(line.command == "gpt-data prepare" for line in lines):
        for name in ("zeros.txt.gz", "zeros.jsonl.gz", "zeros.txt.zst"):
            add(name)
    return ordered


# -------------------------------------------------------------------------------------------------------- fields, texts


def _changed(tree: Any, values: Sequence[str], chance: Chance) -> tuple[Any, str, Callable[[str], str]]:
    """A tree with one thing wrong, what that is, and what is to be done to its text; None where it would be meant."""
    tree = json.loads(json.dumps(tree, default=str))
    place: list[Any] = []
    node = tree
    while isinstance(node, dict | list) and node and (not place or chance.random() < 0.9):
        key = chance.choice(list(node) if isinstance(node, dict) else range(len(node)))
        place.append(key)
        node = node[key]
    if not place:
        return None, "", str
    parent = tree
    for key in place[:-1]:
        parent = parent[key]
    name, key = ".".join(map(str, place)), place[-1]
    what = chance.choices(["value", "gone", "unknown", "twice", "key"], [80, 6, 5, 5, 4])[0]
    if what == "value" or not isinstance(parent, dict):
        value = chance.choice(values)
        if _meant(str(key), value) or _meant(name, value):
            return None, "", str
        parent[key] = MARK
        return tree, f"{name} = {value[:60]}", lambda text: re.sub(f"[\"']?{MARK}[\"']?", lambda _: value, text)
    if what == "gone":
        if key in {"embed_dim", "model", "steps", "source", "data"}:  # the defaults are large
            return None, "", str
        del parent[key]
        return tree, f"{name} is gone", str
    if what == "unknown":
        parent["unknown_field"] = 1
        return tree, f"{name} has a neighbour unknown_field", str
    if what == "twice":
        parent[MARK] = parent[key]
        return tree, f"{name} twice", lambda text: text.replace(MARK, str(key))
    bad = chance.choice(["a\nb", "\x1b[31mred", "a\u2028b", "", "x" * 300, "../x", "null", "1", "é"])
    parent[bad] = parent.pop(key)
    return tree, f"{name} is called {bad[:20]!r}", str


def _nested_aliases(text: str) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    return "\n".join(lines) + "\n" + text


_BROKEN_YAML: dict[str, Callable[[str], str | bytes]] = {
    "empty": lambda text: "",
    "null": lambda text: "null\n",
    "a text": lambda text: "just words\n",
    "a list": lambda text: "- a\n- b\n",
    "a number": lambda text: "12\n",
    "aliases of aliases": _nested_aliases,
    "aliases of aliases as the model": lambda text: _nested_aliases("") + "model: *a9\n",
    "an alias of itself": lambda text: "model: &a {embed_dim: *a}\n",
    "100,000 brackets": lambda text: "model: " + "[" * 100_000,
    "1,000 brackets, closed": lambda text: "model: " + "[" * 1000 + "]" * 1000 + "\n",
    "nested 2,000 deep": lambda text: "".join(" " * n + f"a{n}:\n" for n in range(2000)),
    "Latin-1": lambda text: text.encode() + "# Größe\n".encode("latin-1"),
    "UTF-16": lambda text: text.encode("utf-16"),
    "a byte order mark": lambda text: text.encode("utf-8-sig"),
    "NUL": lambda text: text + "a: \0\n",
    "ESC": lambda text: text + 'b: "\x1b[31m"\n',
    "binary": lambda text: bytes(range(256)) * 16,
    "a section twice": lambda text: text + "\n" + text,
    "two documents": lambda text: text + "\n---\n" + text,
    "tabs": lambda text: text.replace("  ", "\t"),
    "an open quote": lambda text: text + 'a: "b\n',
    "a number as a section": lambda text: text + "1: {a: 2}\n",
    "null as a section": lambda text: text + "null: {a: 2}\n",
    "a list as a key": lambda text: text + "? [a, b]\n: c\n",
    "an unknown section": lambda text: text + "unknown: {a: 1}\n",
    "an unknown section of control characters": lambda text: text + '"a\\nb\\e[31m\\u2028": {a: 1}\n',
    "a tag": lambda text: text + "a: !!python/object/apply:os.system [true]\n",
    "a merge": lambda text: text + "a: &a {x: 1}\nb: {<<: *a}\n",
    "a merge of itself": lambda text: text + "b: &b {<<: *b}\n",
    "another version": lambda text: "%YAML 9.9\n---\n" + text,
    "10 MB in a line": lambda text: text + "# " + "x" * 10_000_000 + "\n",
    "a key of 100,000 letters": lambda text: text + "k" * 100_000 + ": 1\n",
    "5,000 digits as a key": lambda text: text + "9" * 5000 + ": 1\n",
    "cut in a quotation": lambda text: text[: len(text) // 2] + '\n"',
}
_BROKEN_JSON: dict[str, Callable[[str], str | bytes]] = {
    "empty": lambda text: "",
    "null": lambda text: "null",
    "a text": lambda text: '"words"',
    "a list": lambda text: "[1, 2]",
    "a number": lambda text: "12",
    "an empty object": lambda text: "{}",
    "5,000 digits": lambda text: "9" * 5000,
    "100,000 brackets": lambda text: "[" * 100_000,
    "100,000 brackets, closed": lambda text: "[" * 100_000 + "]" * 100_000,
    "100,000 objects": lambda text: '{"a":' * 100_000,
    "Latin-1": lambda text: '{"a": "Größe"}'.encode("latin-1"),
    "UTF-16": lambda text: text.encode("utf-16"),
    "a byte order mark": lambda text: text.encode("utf-8-sig"),
    "NUL": lambda text: text[:-2] + "\0" + text[-2:],
    "binary": lambda text: bytes(range(256)) * 16,
    "everything twice": lambda text: text + text,
    "a comma too many": lambda text: text.replace("}", ",}"),
    "single quotes": lambda text: text.replace('"', "'"),
    "a comment": lambda text: "// a\n" + text,
    "a first field of control characters": lambda text: text.replace("{", '{"a\\nb\\u001b[31m\\u2028": 1, ', 1),
    "a field of 100,000 letters": lambda text: text.replace("{", '{"' + "k" * 100_000 + '": 1, ', 1),
    "an unknown field": lambda text: text.replace("{", '{"unknown_field": 1, ', 1),
    "30 MB in a line": lambda text: text.replace("{", '{"a": "' + "x" * 30_000_000 + '", ', 1),
    "cut": lambda text: text[: len(text) // 2],
}


def _is_json(path: Path) -> bool:
    return path.name in {"_METADATA", "_CHECKPOINT_METADATA", "_sharding"} or path.parent.name == "array_metadatas"


def _has_fields(path: Path) -> bool:
    return path.suffix in {".json", ".jsonl", ".zarray", ".safetensors", ".npy", ".npz"} or _is_json(path)


def _changed_file(path: Path, chance: Chance) -> tuple[str, bytes | None]:
    """A file whose JSON, or whose header, has one thing wrong, and what that is."""
    if path.suffix == ".safetensors":
        whole = path.read_bytes()
        end = 8 + struct.unpack("<Q", whole[:8])[0]
        note, header = _changed_json(whole[8:end].decode(), chance)
        return f"header: {note}", None if header is None else struct.pack("<Q", len(header)) + header + whole[end:]
    if path.suffix == ".npy":
        return _changed_array(path.read_bytes(), chance)
    if path.suffix == ".npz":
        return _changed_archive(path, chance)
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return _changed_json(text, chance)
    lines = text.splitlines()
    number = chance.randrange(len(lines))
    note, line = _changed_json(lines[number], chance)
    if line is None:
        return note, None
    return f"line {number + 1}: {note}", "\n".join([*lines[:number], line.decode(), *lines[number + 1 :], ""]).encode()


def _changed_json(text: str, chance: Chance) -> tuple[str, bytes | None]:
    tree, note, change = _changed(json.loads(text), JSON_VALUES, chance)
    return note, None if tree is None else change(json.dumps(tree)).encode()


_SHAPES = [
    "(1099511627776,)",
    "(-1,)",
    "()",
    "(1,)",
    "(2, 3, 4)",
    "(0,)",
    "(9223372036854775808,)",
    "(True,)",
    "'x'",
    "None",
]
_TYPES = [
    "'|O'",
    "'<f4'",
    "'<c16'",
    "'<U1000000000'",
    "'|S0'",
    "'<i8'",
    "'|b1'",
    "'<M8'",
    "'x'",
    "None",
    "[('a', '<f4')]",
]


def _changed_array(content: bytes, chance: Chance) -> tuple[str, bytes]:
    start = 10
    length = struct.unpack("<H", content[8:start])[0]
    header = content[start : start + length].decode("latin-1")
    field, value = chance.choice([("shape", value) for value in _SHAPES] + [("descr", value) for value in _TYPES])
    pattern = {"shape": r"'shape': \([^)]*\)", "descr": r"'descr': '[^']*'"}[field]
    changed = re.sub(pattern, lambda _: f"'{field}': {value}", header).rstrip() + "\n"
    made = content[:8] + struct.pack("<H", len(changed)) + changed.encode("latin-1") + content[start + length :]
    return f"{field} = {value}", made


def _changed_archive(path: Path, chance: Chance) -> tuple[str, bytes | None]:
    made = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(made, "w") as changed:
        members = archive.namelist()
        chosen, what = chance.choice(members), chance.choice(["changed"] * 6 + ["gone", "twice", "other name", "json"])
        note = what
        for member in members:
            content = archive.read(member)
            if member != chosen:
                changed.writestr(member, content)
            elif what == "changed":
                note, content = _changed_array(content, chance)
                changed.writestr(member, content)
            elif what == "json":
                changed.writestr(member, b'{"a": 1}')
            elif what != "gone":
                changed.writestr(member, content)
                changed.writestr(member if what == "twice" else f"../{member}", content)
    return f"{chosen}: {note}", made.getvalue()


# ---------------------------------------------------------------------------------------------------------------- files


@cache
def _groups(fixtures: Path, needs: tuple[str, ...]) -> dict[str, list[str]]:
    """Files of fixtures by the folder that they lie in; arrays of Orbax, a folder each, are one."""
    groups: dict[str, list[str]] = {}
    for need in needs:
        root = fixtures / need
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if path.is_file():
                folder = path.parent.parent if (path.parent / ".zarray").exists() else path.parent
                groups.setdefault(str(folder if root.is_dir() else root), []).append(str(path))
    return groups


def _damage(fixtures: Path, path: str, chance: Chance) -> tuple[str, Spoil]:
    size = (fixtures / path).stat().st_size
    what = chance.choice(
        ["cut"] * 4 + ["flipped"] * 5 + ["longer", "empty", "gone", "other", "noise"] + ["special"] * 2
    )
    if what == "cut" and path.endswith(".yaml"):  # half of a run's file is a run too, of a large model
        what = "noise"
    if what == "cut":
        end = chance.choice([chance.randrange(max(1, size)), min(size, chance.randrange(64)), max(0, size - 1)])
        return f"cut to {end} of {size} bytes", lambda folder: os.truncate(folder / path, end)
    if what == "flipped" and size:
        byte, bit = chance.choice([chance.randrange(size), min(size - 1, chance.randrange(128))]), chance.randrange(8)
        return f"bit {bit} of byte {byte} of {size} flipped", partial(_flip, path, byte, bit)
    if what == "longer":
        return "100 zeros behind it", lambda folder: _append(folder / path, bytes(100))
    if what == "empty":
        return "emptied", lambda folder: os.truncate(folder / path, 0)
    if what == "gone":
        return "removed", lambda folder: (folder / path).unlink()
    if what == "other":
        small = [name for name in FIXTURES if (fixtures / name).is_file() and (fixtures / name).stat().st_size < 1e7]
        # Nor one config for another: a run of all defaults is one that a person may mean, and takes for ever.
        other = chance.choice([name for name in small if Path(name).suffix != ".yaml" or not path.endswith(".yaml")])
        return f"is {other}", lambda folder: shutil.copyfile(fixtures / other, folder / path) and None
    if what == "special":
        other = chance.choice(["folder", "loop", "fifo", "zero", "full", "null", "socket", "dangling"])
        return f"is a {other}", _both(_specials, partial(_put, path, other))
    noise = chance.randbytes(min(max(size, 16), 4096))
    return "noise", lambda folder: _write(folder / path, noise)


def _with_folder(line: Line, path: str, chance: Chance) -> Made:
    """Something is wrong with a whole folder."""
    other = chance.choice(["", "empty", "file.txt", "loop", "dangling", "fifo", "full", "links"])

    def spoil(folder: Path) -> None:
        shutil.rmtree(folder / path)
        if other:
            _specials(folder)
            (folder / other).rename(folder / path)

    return line, line.words, f"{path}: {f'is {other}' if other else 'removed'}", spoil


def _flip(path: str, byte: int, bit: int, folder: Path) -> None:
    with (folder / path).open("r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ (1 << bit)]))


def _put(path: str, other: str, folder: Path) -> None:
    (folder / path).unlink()
    (folder / other).rename(folder / path)


def _append(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)


def _both(first: Spoil, second: Spoil) -> Spoil:
    def both(folder: Path) -> None:
        first(folder)
        second(folder)

    return both


def _write(path: Path, content: str | bytes) -> None:
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)


def _replace_text(name: str, text: str, folder: Path) -> None:
    _specials(folder)
    _write(folder / name, text)


def _replace_bytes(name: str, content: bytes, folder: Path) -> None:
    (folder / name).write_bytes(content)


# -------------------------------------------------------------------------------------------------------------- sources


def _lines(*lines: str | bytes) -> Callable[[Path], None]:
    content = [line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass") for line in lines]
    return partial(_write_to, b"".join(line + b"\n" for line in content))


def _write_to(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _columns(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [1, 2, 3], "n": [None, "a", "b"]}), path)


def _few_rows_of_nulls(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": pyarrow.array([None, None, ""], pyarrow.string())}), path)


def _wide(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["x" * 50_000_000]}), path)


def _described() -> Iterator[tuple[str, str, Callable[[Path], None] | str]]:
    good = _records().splitlines()
    yield "zeros.txt.gz", "400 MB of zeros in 0.4", "zeros.txt.gz"
    yield "zeros.jsonl.gz", "400 MB of zeros in 0.4", "zeros.jsonl.gz"
    yield "zeros.txt.zst", "400 MB of zeros in 0.04", "zeros.txt.zst"
    records = {
        "nested": '{"text": ' + "[" * 100_000,
        "nested-closed": '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "long-line": '{"text": "' + "word " * 6_000_000 + '"}',
        "long-word": '{"text": "' + "x" * 3_000_000 + '"}',
        "digits": '{"text": "a", "n": ' + "9" * 5000 + "}",
        "number": '{"text": 12}',
        "null": '{"text": null}',
        "list": '["text"]',
        "no-field": '{"body": "a", "a\\nb\\u001b[31m": 1}',
        "surrogate": '{"text": "\\ud800"}',
        "nan": '{"text": "a", "n": NaN}',
        "twice": '{"text": "a", "text": "b"}',
        "cut": '{"text": "a',
        "two": '{"text": "a"} {"text": "b"}',
    }
    for name, line in records.items():
        yield f"{name}.jsonl", f"a record that is {name}", _lines(*good, line)
    yield "latin.jsonl", "Latin-1", _lines(*good, '{"text": "Größe"}'.encode("latin-1"))
    yield "latin.txt", "Latin-1", _lines(*good, "Größe".encode("latin-1"))
    yield "utf16.txt", "UTF-16", partial(_write_to, "\n".join(good).encode("utf-16"))
    yield "nul.txt", "NUL", _lines(*good, "a\0b")
    yield "blanks.txt", "a million blanks", _lines(*good, " " * 1_000_000 + "x")
    yield "newlines.txt", "a million line ends", partial(_write_to, b"\n" * 1_000_000)
    yield "one-line.txt", "20 MB without a line end", partial(_write_to, b"word " * 4_000_000)
    yield "word.txt", "a word of 2 MB", partial(_write_to, b"x" * 2_000_000)
    yield "surrogates.txt", "surrogates", _lines("a\ud800b")
    yield "empty.txt", "empty", _lines()
    yield "one.txt", "one letter", partial(_write_to, b"x")
    yield "mark.txt", "a byte order mark alone", partial(_write_to, b"\xef\xbb\xbf")
    yield "end.txt", "the text of a special token", _lines("a <|endoftext|> b", *good)
    yield "name\nof\x1b[31m\u2028.jsonl", "a name of control characters", _lines('{"text": 1}')
    yield "a[1].jsonl", "a name of a pattern", _lines(*good)
    yield "quote.csv", "an open quote", _lines("text,n", '"a,1', "b,2")
    yield "columns.csv", "too many columns", _lines("text,n", "a,1,2,3")
    yield "header.csv", "a header alone", _lines("text,n")
    yield "heads.csv", "a column twice", _lines("text,text", "a,b")
    yield "body.csv", "no such column", _lines('"a\x1b[31mb",n', "a,1")
    yield "nul.csv", "NUL", _lines("text,n", "a\0b,1")
    yield "field.csv", "a field of 10 MB", _lines("text,n", "x" * 10_000_000 + ",1")
    yield "not.gz", "no gzip", _lines("words")
    yield "not.jsonl.zst", "no Zstandard", _lines("words")
    yield "not.parquet", "no Parquet", _lines("words")
    yield "magic.parquet", "the ends of Parquet alone", partial(_write_to, b"PAR1" + bytes(64) + b"PAR1")
    yield "types.parquet", "a column of numbers", _columns
    yield "nulls.parquet", "nulls and nothing", _few_rows_of_nulls
    yield "wide.parquet", "a text of 50 MB", _wide
    whole = gzip.compress("\n".join(good).encode(), mtime=0)
    yield "cut.txt.gz", "cut", partial(_write_to, whole[: len(whole) // 2])
    yield "sum.txt.gz", "a wrong checksum", partial(_write_to, whole[:-8] + bytes(4) + whole[-4:])
    yield "more.txt.gz", "something behind it", partial(_write_to, whole + b"something")
    yield "two.txt.gz", "two in one", partial(_write_to, whole + whole)
    yield "head.txt.gz", "the head alone", partial(_write_to, whole[:10])


_DESCRIBED = list(_described())
SOURCES = [(name, content) for name, _, content in _DESCRIBED]
_SOURCE_NOTES = {name: note for name, note, _ in _DESCRIBED}
