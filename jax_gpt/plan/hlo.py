"""Reads the text of a compiled XLA program: what it multiplies, what it sends, and how often.

The compiler's own totals count the body of a loop once and leave kernels out. Here every instruction is weighed with
the trips of the loops around it. Only the text is read; nothing of JAX is needed.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from jax_gpt.plan.hlo_text import Computation, Instruction, Shape, braces, computations, pairs, replica_groups

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")


@dataclass(frozen=True)
class Collective:
    """One communication between devices.

    Args:
        kind: Such as "reduce-scatter".
        payload: Bytes of the whole array: an all-gather's result, the operand of the others. Of a ragged all-to-all
            the smaller of both arrays: only rows that are there travel, and the other has room for the worst case.
        groups: Devices that talk to each other, by their place in the program's list; of a permutation, its pairs.
        times: How often it runs in a step.
        hidden: Whether it runs while the device goes on with something else.
        place: Path of the operation in the traced program.
        between_slices: Whether it goes over the network of the data centre; its one group then numbers the slices.
    """

    kind: str
    payload: int
    groups: tuple[tuple[int, ...], ...]
    times: int
    hidden: bool
    place: str
    between_slices: bool = False

    @property
    def wire_bytes(self) -> float:
        """What a device sends in one execution, on a ring: each part passes every device but one."""
        if self.kind == "collective-permute":
            return float(self.payload)
        n = max(map(len, self.groups), default=1)
        return (2 if self.kind == "all-reduce" else 1) * self.payload * (n - 1) / n


@dataclass(frozen=True)
class Kernel:
    """A custom kernel (Pallas), of which the program's text does not say what it computes.

    Args:
        name: As it was given when it was traced.
        operands: Shapes.
        times: How often it runs in a step.
    """

    name: str
    operands: tuple[Shape, ...]
    times: int


class Program:
    """A compiled program.

    Args:
        text: Of an optimized HLO module.

    Raises:
        ValueError: the text has no entry computation.
    """

    def __init__(self, text: str) -> None:
        self.computations, self.entry = computations(text)
        self.unknown_loops: set[str] = set()

    def executed(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """Every instruction that runs, with the computation it stands in and how often it runs."""
        yield from self._executed(self.entry, 1)

    def _executed(self, computation: Computation, times: int) -> Iterator[tuple[Computation, Instruction, int]]:
        for instruction in computation.instructions.values():
            yield computation, instruction, times
            if instruction.opcode == "while":
                inner = [("body", times * self.trips(computation, instruction))]
            elif instruction.opcode == "conditional":  # one of them runs: all are counted, which is the most it can be
                inner = []
                for name in re.findall(r"%([\w.\-]+)", braces(instruction.attributes, "branch_computations=")):
                    yield from self._executed(self.computations[name], times)
            else:
                inner = [(name, times) for name in ("calls", "to_apply") if instruction.opcode in _CALLS[name]]
            for attribute, inner_times in inner:
                called = instruction.called(attribute)
                if called in self.computations:
                    yield from self._executed(self.computations[called], inner_times)

    def trips(self, computation: Computation, loop: Instruction) -> int:
        """How often the body of a `while` runs: as the compiler noted it or, as it is rarely, from limit and step.

        A loop of which neither can be told counts once and is noted in `unknown_loops`.
        """
        noted = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if noted:
            return int(noted[1])
        found = self._counted(computation, loop)
        if found is None:
            self.unknown_loops.add(loop.name)
            return 1
        return found

    def _counted(self, computation: Computation, loop: Instruction) -> int | None:
        condition = self.computations[loop.called("condition") or ""]
        body = self.computations[loop.called("body") or ""]
        root = condition.root
        direction = re.search(r"direction=(\w+)", root.attributes)
        if root.opcode == "fusion":
            inside = self.computations[root.called("calls") or ""]
            direction = re.search(r"direction=(\w+)", inside.root.attributes)
            names = [inside.parameters.get(i, "") for i in range(len(root.operands))]
            sides = [
                self._linear(condition, root.operands[names.index(name)])
                if name in names
                else self._linear(inside, name)
                for name in inside.root.operands
            ]
        else:
            sides = [self._linear(condition, name) for name in root.operands]
        if direction is None or len(sides) != 2 or None in sides:
            return None
        (index, shift), (limit_index, limit) = sides  # type: ignore[misc]  # None was sorted out
        if index is None:
            return None
        if limit_index is not None:
            limit += self._start(computation, loop, limit_index) or 0
        start = self._start(computation, loop, index)
        after = self._linear(body, body.root.operands[index])
        if start is None or after is None or after[0] != index or not after[1]:
            return None
        span = limit - shift - start + (direction[1] in {"LE", "GE"}) * (1 if after[1] > 0 else -1)
        return max(0, math.ceil(span / after[1]))

    def _start(self, computation: Computation, loop: Instruction, index: int) -> int | None:
        initial = computation.instructions[loop.operands[0]]
        if initial.opcode != "tuple":
            return None
        value = self._linear(computation, initial.operands[index])
        return value[1] if value and value[0] is None else None

    def _linear(self, computation: Computation, name: str) -> tuple[int | None, int] | None:
        """An integer as (element of the loop's tuple or None, what is added to it); None if it is something else."""
        instruction = computation.instructions.get(name)
        if instruction is None:
            return None
        operands = instruction.operands
        match instruction.opcode:
            case "constant":
                return (None, int(operands[0])) if re.fullmatch(r"-?\d+", operands[0]) else None
            case "get-tuple-element":
                index = re.search(r"index=(\d+)", instruction.attributes)
                source = computation.instructions[operands[0]]
                if source.opcode == "parameter" and index:
                    return int(index[1]), 0
                if source.opcode == "fusion" and index:
                    return self._through_fusion(computation, source, int(index[1]))
                return None
            case "copy" | "bitcast" | "convert" | "copy-start" | "copy-done":
                return self._linear(computation, operands[0])
            case "add" | "subtract":
                left, right = (self._linear(computation, operand) for operand in operands)
                if left is None or right is None or (left[0] is not None and right[0] is not None):
                    return None
                sign = 1 if instruction.opcode == "add" else -1
                return left[0] if left[0] is not None else right[0], left[1] + sign * right[1]
            case "fusion":
                return self._through_fusion(computation, instruction, None)
        return None

    def _through_fusion(
        self, computation: Computation, fusion: Instruction, index: int | None
    ) -> tuple[int | None, int] | None:
        inside = self.computations[fusion.called("calls") or ""]
        result = inside.root
        if index is not None:
            result = inside.instructions[result.operands[index]]
        if result.opcode == "parameter":
            return self._linear(computation, fusion.operands[int(result.operands[0])])
        if result.opcode == "constant":
            return self._linear(inside, result.name)
        if result.opcode not in {"add", "subtract"}:
            return None
        sides = []
        for operand in result.operands:
            source = inside.instructions[operand]
            outside = source.opcode == "parameter"
            sides.append(
                self._linear(computation, fusion.operands[int(source.operands[0])])
                if outside
                else self._linear(inside, operand)
            )
        left, right = sides
        if left is None or right is None or (left[0] is not None and right[0] is not None):
            return None
        return left[0] if left[0] is not None else right[0], left[1] + (
            right[1] if result.opcode == "add" else -right[1]
        )

    def matmul_flops(self) -> float:
        """Multiplications and additions of all matrix products and convolutions of a step, on one device."""
        return self._product_flops(ragged=False)

    def ragged_flops(self) -> float:
        """Those of products of groups of rows, as if every row there is room for belonged to one."""
        kernels = (kernel for kernel in self._kernels() if kernel.name.startswith(_RAGGED))
        return self._product_flops(ragged=True) + sum(kernel.times * _ragged_flops(kernel) for kernel in kernels)

    def _product_flops(self, *, ragged: bool) -> float:
        products = (
            times * _product_flops(computation, instruction)
            for computation, instruction, times in self.executed()
            if instruction.opcode in {"dot", "convolution"} and instruction.ragged == ragged
        )
        return float(sum(products))

    def cycles(self) -> int:
        """The compiler's estimate of a step on one device, without kernels and without waiting for others."""
        inside_fusions = {
            called
            for computation in self.computations.values()
            for instruction in computation.instructions.values()
            if instruction.opcode == "fusion" and (called := instruction.called("calls"))
        }
        return sum(
            times * instruction.cycles
            for computation, instruction, times in self.executed()
            if computation.name not in inside_fusions
        )

    def kernels(self) -> list[Kernel]:
        """The Pallas kernels of a step, without those that the compiler makes of products of groups of rows."""
        return [kernel for kernel in self._kernels() if not kernel.name.startswith(_RAGGED)]

    def _kernels(self) -> list[Kernel]:
        return [
            Kernel(
                re.split(r"/|\.\d+$", instruction.place.removesuffix("/pallas_call"))[-1] or instruction.name,
                tuple(computation.instructions[name].shapes[0] for name in instruction.operands),
                times,
            )
            for computation, instruction, times in self.executed()
            if 'custom_call_target="tpu_custom_call"' in instruction.attributes
        ]

    def collectives(self) -> list[Collective]:
        """What devices send to each other in a step, each once however many parts the compiler made of it."""
        found = []
        reduced_and_cut = {
            name: computation for name, computation in self.computations.items() if "all-reduce-scatter" in name
        }
        asynchronous = {
            instruction.called("calls")
            for computation in self.computations.values()
            for instruction in computation.instructions.values()
            if instruction.opcode == "async-start"
        }
        for computation, instruction, times in self.executed():
            if instruction.opcode == "send" and "_xla_megascale_transfer_type" in instruction.attributes:
                found.append(_between_slices(instruction, times))
                continue
            kind = instruction.opcode.removesuffix("-start")
            if kind not in _COLLECTIVES or _continues(computation):
                continue
            if computation.name in reduced_and_cut:
                kind = "reduce-scatter"
            started = instruction.opcode.endswith("-start")
            operands = [shape for name in instruction.operands for shape in computation.instructions[name].shapes]
            if kind == "all-gather":
                results = instruction.shapes[len(operands) :] if started else instruction.shapes
                payload = sum(shape.bytes for shape in results[: len(operands)])
            elif kind == "ragged-all-to-all":
                payload = min(shape.bytes for shape in operands[:2])
            else:
                payload = sum(shape.bytes for shape in operands)
            found.append(
                Collective(
                    kind,
                    payload,
                    pairs(instruction) if kind == "collective-permute" else replica_groups(instruction.attributes),
                    times,
                    started or _starts(computation) or computation.name in asynchronous,
                    instruction.place,
                )
            )
        return found

    def place_of(self, name: str) -> str:
        """The path in the traced program of an instruction, wherever it stands; "" where none is noted."""
        for computation in self.computations.values():
            if name in computation.instructions:
                return computation.instructions[name].place
        return ""


_RAGGED = "ragged-dot"  # kernels' names: the products, and one that only counts
_CALLS = {"calls": {"fusion", "async-start"}, "to_apply": {"call"}}


def _between_slices(send: Instruction, times: int) -> Collective:
    """What goes to other slices: sent to the host, whose runtime does what its type says. Never taken to be hidden.

    The target is slices x devices of each, in lists with ranges: "{1,2}x{0:3}".
    """
    options = dict(re.findall(r'_xla_megascale_(transfer_type|target)="([^"]*)"', send.attributes))
    kind = options["transfer_type"].lower().replace("_", "-").replace("one-to-one", "collective-permute")
    ends = [part.split(":") for part in options["target"].partition("x")[0].strip("{}").split(",")]
    slices = sum(int(part[-1]) - int(part[0]) + 1 for part in ends)
    sent = send.shapes[0].bytes
    payload = sent * slices if kind == "all-gather" else sent
    return Collective(kind, payload, (tuple(range(slices)),), times, False, send.place, between_slices=True)


def _continues(computation: Computation) -> bool:
    """Whether a collective here goes on with one that another computation has started."""
    ends = any("AsyncCollectiveDone" in one.attributes for one in computation.instructions.values())
    return ends or computation.name.startswith("async_collective_fusion")


def _starts(computation: Computation) -> bool:
    return any("AsyncCollectiveStart" in one.attributes for one in computation.instructions.values())


def _product_flops(computation: Computation, instruction: Instruction) -> float:
    left, right = (computation.instructions[name].shapes[0] for name in instruction.operands[:2])
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
        return 2.0 * math.prod(instruction.shapes[0].dims) * math.prod(left.dims[axis] for axis in axes)
    # Each group's product is one position of a window: of a row's as many as there are groups, one is computed.
    groups = instruction.shapes[0].dims[0] if instruction.ragged else 1
    return _convolution_flops(instruction, left, right) / groups


def _ragged_flops(kernel: Kernel) -> float:
    """Of rows with a kernel for each group or, for the gradient of that, of rows with rows."""
    factors = [shape.dims for shape in kernel.operands if len(shape.dims) > 1]
    if not factors:
        return 0.0
    (rows, inputs), other = factors
    return 2.0 * rows * (math.prod(other[1:]) if len(other) == 3 else inputs * other[1])


def _convolution_flops(instruction: Instruction, left: Shape, right: Shape) -> float:
    """Twice the pairs of an element of the result and an element that it is summed over.

    Windows that reach into padding or between the elements of a dilated operand multiply nothing there.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        raise ValueError(f"convolution {instruction.name} without dim_labels")
    kernel, output = labels[2], labels[3]
    result = instruction.shapes[0]

    def size(shape: Shape, names: str, axis: str) -> int:
        return shape.dims[names.index(axis)]

    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    options = dict(part.split("=") for part in window[1].split()) if window else {}

    def option(name: str, axis: int, default: str) -> str:
        return options[name].split("x")[axis] if name in options else default

    pairs = 1
    for axis, label in enumerate(sorted(label for label in output if label.isdigit())):
        taps = size(right, kernel, label)
        low = int(option("pad", axis, "0_0").split("_")[0])
        stride, hole = int(option("stride", axis, "1")), int(option("rhs_dilate", axis, "1"))
        spread, length = int(option("lhs_dilate", axis, "1")), size(left, labels[1], label)
        positions = (
            out * stride - low + tap * hole for out in range(size(result, output, label)) for tap in range(taps)
        )
        pairs *= sum(0 <= position <= (length - 1) * spread and position % spread == 0 for position in positions)
    batch_groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    batch = size(left, labels[1], "b") // (int(batch_groups[1]) if batch_groups else 1)
    return 2.0 * batch * size(right, kernel, "i") * size(right, kernel, "o") * pairs
