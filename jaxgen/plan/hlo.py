"""Reads what a compiled, scheduled XLA program does: which operations run, and how often.

The text is `compiled.as_text()`. It is parsed by its lines, for the protocol buffer behind it is
not part of JAX's interface.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

# A line `%name (parameters) -> result {` opens a computation; the rest are its instructions.
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_COLLECTIVE = re.compile(
    r"(all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute)"
    r"(-start)?$"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    """The result as written, layouts included; a tuple in parentheses."""
    opcode: str
    rest: str
    """Operands and attributes as written."""

    @property
    def arrays(self) -> list[tuple[str, int]]:
        """(dtype, bytes) of each array in the result."""
        found = []
        for dtype, dims in _ARRAY.findall(self.shape):
            elements = math.prod(int(n) for n in dims.split(",") if n)
            bits = 8 if dtype == "pred" else int(re.sub(r"^[a-z]+(\d+).*", r"\1", dtype))
            found.append((dtype, -(-elements * bits // 8)))
        return found

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression over operands and attributes."""
        match = re.search(pattern, self.rest)
        return match and match[1]

    @property
    def op_name(self) -> str:
        """The JAX operation it came from, as a path of transformations and functions."""
        return self.attribute(r'op_name="([^"]*)"') or ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that devices exchange."""

    kind: str
    """all-gather, all-reduce, reduce-scatter, all-to-all, collective-permute."""
    dtype: str
    num_bytes: int
    """Of the whole array: what a gather returns, what a reduction takes."""
    group: tuple[int, ...]
    """Devices, by their place in the mesh, that take part with the first of them; of a permutation
    all that send or receive."""
    pairs: tuple[tuple[int, int], ...]
    """Of a permutation: who sends to whom."""
    trips: int
    """Times it runs in one call of the program."""
    asynchronous: bool
    """Whether computation may run while it does."""
    hidden: bool
    """Whether matrix products or kernels do, by the schedule."""
    op_name: str
    """The JAX operation it came from."""

    @property
    def group_size(self) -> int:
        """Devices that take part with each other."""
        return len(self.group)

    def axes(self, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
        """The mesh axes that it runs over: those in which devices of one group differ."""
        linked = self.pairs or [(self.group[0], other) for other in self.group]
        sizes = tuple(mesh_shape.values())
        ends = np.unravel_index(np.array(linked), sizes)
        return tuple(
            axis for axis, at in zip(mesh_shape, ends, strict=True) if (at[:, 0] != at[:, 1]).any()
        )

    @property
    def wire_bytes(self) -> float:
        """Bytes each device sends in one call of the program, by the bandwidth-optimal algorithm.

        Source: Chan et al. 2007, "Collective communication: theory, practice, and experience".
        """
        if self.kind == "collective-permute":
            return float(self.num_bytes * self.trips)
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.num_bytes * self.trips * (self.group_size - 1) / self.group_size


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One array that a TPU sends to other slices, over the data-centre network."""

    kind: str
    """What it is part of: all-reduce, all-gather, one-to-one (of a permutation), ..."""
    dtype: str
    num_bytes: int
    """What each device hands over."""
    trips: int
    """Times it runs in one call of the program."""
    op_name: str
    """The JAX operation it came from, as far as it is written."""


class Program:
    """A parsed program."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        count = re.search(r"num_partitions=(\d+)", text)
        self.num_devices = int(count[1]) if count else 1
        body: list[Instruction] = []
        for line in text.splitlines():
            if opened := _COMPUTATION.match(line):
                body = self.computations[opened[2]] = []
                self.entry = opened[2] if opened[1] else self.entry
            elif instruction := _INSTRUCTION.match(line):
                body.append(Instruction(*instruction.groups()))
        # A TPU's reduce-scatter is a fusion of an all-reduce and a slice, run by its own algorithm.
        self._scatters = {
            instruction.name
            for name, body in self.computations.items()
            if name.startswith("all-reduce-scatter")
            for instruction in body
        }
        if not self.entry:
            raise ValueError("not the text of a compiled program: it has no ENTRY computation")

    def executed(self, computation: str | None = None) -> Iterator[tuple[Instruction, int]]:
        """Yields every instruction that runs, and how often; those inside a fusion too.

        Each branch of a conditional counts as taken.

        Raises:
            ValueError: a loop's number of trips is not written in the program.
        """
        for instruction in self.computations[computation or self.entry]:
            yield instruction, 1
            if instruction.opcode == "while":
                body = instruction.attribute(r"body=%?([\w.\-]+)")
                trips = self._trips(instruction)
                assert body is not None
                for inner, times in self.executed(body):
                    yield inner, trips * times
                continue
            called = _CALLED.findall(instruction.rest)
            if branches := instruction.attribute(_BRANCHES.pattern):
                called += [name.strip().lstrip("%") for name in branches.split(",")]
            # The function that a reduction applies to each pair of elements is not counted.
            if instruction.opcode in ("fusion", "call", "conditional", "async-start"):
                for name in called:
                    yield from self.executed(name)

    def collectives(self) -> list[Collective]:
        """Returns all exchanges between devices, one for each array."""
        found: list[Collective] = []
        chains: set[tuple[str, str]] = set()
        hidden = self._hidden()
        for instruction, trips in self.executed():
            match = _COLLECTIVE.match(instruction.opcode)
            if not match:
                continue
            kind, start = match[1], bool(match[2])
            # A TPU runs a collective beside the fusions between its start and its end; each of them
            # repeats it, with the same chain and channel.
            chain, channel = _chain(instruction)
            if chain is not None:
                if (chain, channel) in chains:
                    continue
                chains.add((chain, channel))
            pairs = self._pairs(instruction)
            group = tuple(sorted({n for pair in pairs for n in pair})) or self._group(instruction)
            arrays = instruction.arrays
            whole = len(group) if kind == "reduce-scatter" else 1
            if instruction.name in self._scatters:
                kind = "reduce-scatter"
            # A start returns its operands too.
            if start and kind == "all-gather":
                arrays = arrays[len(arrays) // 2 :]
            elif start and kind == "collective-permute":
                arrays = arrays[1:2]
            found += [
                Collective(
                    kind=kind,
                    dtype=dtype,
                    num_bytes=num_bytes * whole,
                    group=group,
                    pairs=pairs,
                    trips=trips,
                    asynchronous=start or chain is not None,
                    hidden=(chain, channel) in hidden if chain else instruction.name in hidden,
                    op_name=instruction.op_name,
                )
                for dtype, num_bytes in arrays
            ]
        return [collective for collective in found if collective.group_size > 1]

    def _hidden(self) -> set[Any]:
        """What runs beside products: (chain, channel) of fusions, names of other starts."""
        products: dict[str, bool] = {}

        def has_product(name: str) -> bool:
            if name not in products:
                products[name] = any(map(is_product, self.computations.get(name, ())))
            return products[name]

        def is_product(instruction: Instruction) -> bool:
            if instruction.opcode in ("convolution", "dot"):
                return True
            if instruction.opcode == "custom-call":
                return "tpu_custom_call" in instruction.rest
            return any(map(has_product, _CALLED.findall(instruction.rest)))

        hidden: set[Any] = set()
        for name, body in self.computations.items():
            for at, instruction in enumerate(body):
                match = _COLLECTIVE.match(instruction.opcode)
                if not match:
                    continue
                chain = _chain(instruction)
                if chain[0] is not None and has_product(name):
                    hidden.add(chain)
                elif match[2]:
                    ends = f"%{instruction.name})"
                    rest = body[at + 1 :]
                    until = next((i for i, other in enumerate(rest) if ends in other.rest), 0)
                    if any(map(is_product, rest[:until])):
                        hidden.add(instruction.name)
        return hidden

    def transfers(self) -> list[Transfer]:
        """Returns all arrays that go to other slices; those inside a slice are collectives."""
        found = []
        for instruction, trips in self.executed():
            kind = instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"')
            if instruction.opcode != "send" or kind is None:
                continue
            # A send returns what it sends, a counter and a token.
            dtype, num_bytes = instruction.arrays[0]
            name = instruction.attribute(r'_xla_host_transfer_rendezvous="([^"]*)"') or ""
            kind = kind.lower().replace("_", "-")
            found.append(Transfer(kind, dtype, num_bytes, trips, instruction.op_name or name))
        return found

    def _trips(self, loop: Instruction) -> int:
        known = loop.attribute(r'known_trip_count":\{"n":"(\d+)"')
        if known:
            return int(known)
        condition = self.computations[loop.attribute(r"condition=%?([\w.\-]+)") or ""]
        constants = {
            i.name: int(i.rest.split(")")[0])
            for i in condition
            if i.opcode == "constant" and i.rest.split(")")[0].isdigit()
        }
        # A scan counts from 0 by 1 while its counter is below a constant.
        for instruction in condition:
            bound = instruction.attribute(r"%([\w.\-]+)\), direction=LT")
            if instruction.opcode == "compare" and bound in constants:
                return constants[bound]
        raise ValueError(f"loop {loop.name} ({loop.op_name}) does not say how often it runs")

    def _pairs(self, instruction: Instruction) -> tuple[tuple[int, int], ...]:
        listed = instruction.attribute(r"source_target_pairs=\{(\{[\d,{}]*\})\}") or ""
        pairs = re.findall(r"\{(\d+),(\d+)\}", listed)
        return tuple((int(source), int(target)) for source, target in pairs)

    def _group(self, instruction: Instruction) -> tuple[int, ...]:
        """The first of the groups that take part with each other, in one of four notations."""
        text = instruction.rest
        if named := re.search(
            r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{", text
        ):
            sizes = {axis: int(n) for axis, n in re.findall(r"'([^']+)'=(\d+)", named[1])}
            taken = re.findall(r"'([^']+)'", text[named.end() :].split("}")[0])
            ids = _device_ids(named[2] or f"[{math.prod(sizes.values())}]")
            first = tuple(slice(None) if axis in taken else 0 for axis in sizes)
            return tuple(ids.reshape(tuple(sizes.values()))[first].flatten().tolist())
        if listed := instruction.attribute(r"replica_groups=\{\{([\d,]+)\}"):
            return tuple(map(int, listed.split(",")))
        if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\]\S*),", text):
            return tuple(_device_ids(tiled[3]).reshape(int(tiled[1]), int(tiled[2]))[0].tolist())
        return tuple(range(self.num_devices))


def _chain(instruction: Instruction) -> tuple[str | None, str]:
    """What the parts of one asynchronous collective of a TPU have in common."""
    chain = instruction.attribute(r'chain_id="(\d+)"')
    return chain, instruction.attribute(r"channel_id=(\d+)") or ""


def _device_ids(text: str) -> np.ndarray:
    """Reads `[2,4]T(1,0)`, which is arange(8) as [2, 4], transposed, or the ids one by one."""
    if iota := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        dims = tuple(map(int, iota[1].split(",")))
        ids = np.arange(math.prod(dims)).reshape(dims)
        return (ids.transpose(tuple(map(int, iota[2].split(",")))) if iota[2] else ids).flatten()
    return np.array([int(n) for n in text.split(",")])
