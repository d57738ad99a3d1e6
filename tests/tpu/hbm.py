"""What a computation reads from HBM, instruction by instruction, out of a scheduled program.

A layout with `S(1)` is of VMEM, one without a memory space of HBM.
"""

import re
from typing import NamedTuple

from jaxgen.plan.hlo import Instruction, Program

# These move nothing: a loop's body is read for itself, and what is done was counted as it started.
STILL = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional"}
WINDOWS = {"gather", "dynamic-slice", "slice"}
UPDATES = {"scatter", "dynamic-update-slice"}


class Read(NamedTuple):
    """One operand of an instruction."""

    instruction: Instruction
    source: Instruction
    num_bytes: int


def size(instruction):
    """Bytes of all arrays of the result."""
    return sum(num_bytes for _, num_bytes in instruction.arrays)


def operands(instruction):
    """The names of an instruction's operands: all up to the parenthesis that closes them."""
    depth = 1
    for at, letter in enumerate(instruction.rest):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if not depth:
            return re.findall(r"%([\w.\-]+)", instruction.rest[:at])
    raise ValueError(instruction.rest)


def _bytes_of(program, instruction, place, whole):
    """What an instruction reads of one operand, which has `whole` bytes."""
    if instruction.opcode in WINDOWS:
        return whole if place else size(instruction)
    if instruction.opcode in UPDATES:
        return whole if place else 0
    if instruction.opcode == "slice-start":
        # Its result: what it reads from, the slice, a counter.
        return instruction.arrays[1][1]
    if instruction.opcode != "fusion":
        return whole
    body = program.computations[instruction.attribute(r"calls=%?([\w.\-]+)")]
    inside = (i.name for i in body if i.opcode == "parameter" and i.rest.startswith(f"{place})"))
    names, total = {next(inside)}, 0
    for user in body:
        if user.opcode in ("parameter", "constant"):
            continue
        for at, name in enumerate(operands(user)):
            if name not in names:
                continue
            if user.opcode == "bitcast":
                names.add(user.name)
            elif user.opcode in WINDOWS | UPDATES:
                total += _bytes_of(program, user, at, whole)
            else:
                return whole
    return total


def reads(program: Program, computation):
    """Returns what is read: by all branches of conditionals, and not by loops inside."""
    found = []
    body = program.computations[computation]
    by_name = {instruction.name: instruction for instruction in body}
    for instruction in body:
        if branches := instruction.attribute(r"branch_computations=\{([^}]*)\}"):
            for branch in branches.split(","):
                found += reads(program, branch.strip().lstrip("%"))
        if instruction.opcode in STILL or instruction.opcode.endswith("-done"):
            continue
        for place, name in enumerate(operands(instruction)):
            source = by_name[name]
            if source.shape.startswith("(") or re.search(r"S\([1-9]\)", source.shape):
                continue
            if num_bytes := _bytes_of(program, instruction, place, size(source)):
                found.append(Read(instruction, source, num_bytes))
    return found
