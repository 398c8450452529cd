"""Reads the lines of a compiled XLA program: instructions, the computations that they stand in, groups of devices."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}

_SHAPE = re.compile(r"([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")
_START = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")


@dataclass(frozen=True)
class Shape:
    """Of one array.

    Args:
        dtype: As XLA writes it, such as "bf16".
        dims: Sizes of its axes.
    """

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Without the padding of a layout."""
        return int(math.prod(self.dims) * BYTES.get(self.dtype, 1))

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Args:
        name: Without the percent sign.
        shapes: Of its result: one, or the parts of a tuple.
        opcode: Such as "fusion".
        operands: Names; for a constant its value, for a parameter its number.
        attributes: All that follows the operands.
        root: Whether it is the result of its computation.
    """

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute such as "body" names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    @property
    def place(self) -> str:
        """The path of the operation in the traced program; "" where none is noted."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def ragged(self) -> bool:
        """Whether it is a product of groups of rows, or a fusion of one."""
        return self.place.endswith("ragged_dot_general")

    @property
    def cycles(self) -> int:
        """The compiler's estimate for one execution; 0 where it has none, or of ragged products a wild one."""
        if self.ragged:
            return 0
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else 0


@dataclass
class Computation:
    """A function of the program."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @cached_property
    def root(self) -> Instruction:
        return next(instruction for instruction in self.instructions.values() if instruction.root)

    @cached_property
    def parameters(self) -> dict[int, str]:
        """Name of each parameter by its number."""
        found = self.instructions.values()
        return {int(one.operands[0]): one.name for one in found if one.opcode == "parameter"}


def computations(text: str) -> tuple[dict[str, Computation], Computation]:
    """All of a module by their names, and the one that it begins with.

    Raises:
        ValueError: the text has no entry computation.
    """
    found: dict[str, Computation] = {}
    entry = None
    current: Computation | None = None
    for line in _logical_lines(text):
        if current is None:
            header = _HEADER.match(line)
            if header:
                current = found.setdefault(header[2], Computation(header[2]))
                entry = current if header[1] else entry
        elif line == "}":
            current = None
        else:
            instruction = _instruction(line)
            if instruction:
                current.instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError("no ENTRY computation: this is no text of an HLO module")
    return found, entry


def replica_groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    """The groups of a collective in any of the forms that XLA writes: lists, an iota, or axes of a mesh.

    Raises:
        ValueError: another form.
    """
    if "replica_groups={" in attributes:
        text = braces(attributes, "replica_groups=")
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", text[1:-1]))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        sizes = [int(size) for size in iota[2].split(",")]
        order = [int(axis) for axis in iota[3].split(",")] if iota[3] else list(range(len(sizes)))
        members = _transposed(sizes, order)
        group_size = int(iota[1].split(",")[-1])
        return tuple(tuple(members[i : i + group_size]) for i in range(0, len(members), group_size))
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes)
    if mesh:
        axes = dict(re.findall(r"'?([\w.\-]+)'?=(\d+)", mesh[1]))
        names, sizes = list(axes), [int(size) for size in axes.values()]
        used = [names.index(name) for name in re.findall(r"'?([\w.\-]+)'?", mesh[2])]
        order = [axis for axis in range(len(names)) if axis not in used] + used
        members = _transposed(sizes, order)
        group_size = math.prod(sizes[axis] for axis in used)
        return tuple(tuple(members[i : i + group_size]) for i in range(0, len(members), group_size))
    raise ValueError(f"replica groups in an unknown form: {attributes[:200]}")


def _transposed(sizes: list[int], order: list[int]) -> list[int]:
    """0, 1, 2, ... laid out in `sizes`, read with the axes in another order."""
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    members = [0]
    for axis in order:
        members = [member + strides[axis] * i for member in members for i in range(sizes[axis])]
    return members


def pairs(instruction: Instruction) -> tuple[tuple[int, ...], ...]:
    """From which device to which a permutation sends."""
    text = braces(instruction.attributes, "source_target_pairs=")
    return tuple(tuple(map(int, pair.split(","))) for pair in re.findall(r"\{(\d+,\d+)\}", text))


def _logical_lines(text: str) -> Iterator[str]:
    """Lines of a module, with those joined that the metadata of kernels breaks up."""
    inside, pending = False, ""
    for line in text.splitlines():
        if not inside:
            inside = bool(_HEADER.match(line))
            yield line
        elif line == "}":
            yield from (pending, line) if pending else (line,)
            inside, pending = False, ""
        elif _START.match(line):
            if pending:
                yield pending
            pending = line
        else:
            pending += line


def _instruction(line: str) -> Instruction | None:
    start = _START.match(line)
    if start is None:
        return None
    rest = line[start.end() :]
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shapes = tuple(
        Shape(dtype, tuple(int(size) for size in dims.split(",") if size))
        for dtype, dims in _SHAPE.findall(re.sub(r"\{[^}]*\}|/\*.*?\*/", "", rest[: end + 1]))
    )
    opcode = re.match(r"\s*([\w\-]+)\(", rest[end + 1 :] if rest.startswith("(") else rest[end:])
    if opcode is None:
        return None
    offset = (end + 1 if rest.startswith("(") else end) + opcode.end() - 1
    close = _closing(rest, offset)
    inside = re.sub(r"/\*.*?\*/", "", rest[offset + 1 : close])
    if opcode[1] in {"constant", "parameter"}:
        operands: tuple[str, ...] = (inside.strip(),)
    else:
        operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(start[2], shapes, opcode[1], operands, rest[close + 1 :], bool(start[1]))


def _closing(text: str, opening: int) -> int:
    """Where the bracket that opens at a place closes."""
    depth = 0
    for match in re.finditer(r"[()]", text[opening:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return opening + match.start()
    return len(text) - 1


def braces(text: str, before: str) -> str:
    """The braces that follow a word, with all in them."""
    if before not in text:
        return "{}"
    start = text.index(before) + len(before)
    depth = 0
    for match in re.finditer(r"[{}]", text[start:]):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return text[start : start + match.end()]
    return text[start:]
