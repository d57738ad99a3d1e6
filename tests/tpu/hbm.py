"""What a loop's body reads from HBM, instruction by instruction, out of a scheduled program.

Memory space 1, `S(1)` in a layout, is VMEM; an array without one is in HBM.
"""

import re

from jaxgen.plan.hlo import Instruction, Program

# These move no bytes of their own: done follows start, and its bytes are counted there.
MOVELESS = {
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "constant",
    "while",
    "conditional",
}
WINDOWS = {"gather", "dynamic-slice", "slice"}
UPDATES = {"scatter": 2, "dynamic-update-slice": 1}


def operands(instruction: Instruction) -> list[str]:
    depth = 1
    for at, letter in enumerate(instruction.rest):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if not depth:
            return re.findall(r"%([\w.\-]+)", instruction.rest[:at])
    raise ValueError(instruction.rest)


def num_bytes(instruction: Instruction) -> int:
    return sum(size for _, size in instruction.arrays)


def _of_operand(program: Program, instruction: Instruction, place: int, whole: int) -> int:
    """Bytes that an instruction reads of one operand, which has `whole` bytes."""
    if instruction.opcode in WINDOWS:
        return num_bytes(instruction) if place == 0 else whole
    if instruction.opcode in UPDATES:
        return whole if place else 0
    if instruction.opcode in ("slice-start", "async-start"):
        return Instruction("", instruction.shape.split("), ", 1)[1].split("}, ")[0], "", "").arrays[
            0
        ][1]
    if instruction.opcode != "fusion":
        return whole
    body = program.computations[instruction.attribute(r"calls=%([\w.\-]+)") or ""]
    inside = next(
        i.name for i in body if i.opcode == "parameter" and i.rest.startswith(f"{place})")
    )
    names, total = {inside}, 0
    for user in body:
        used = operands(user) if user.opcode not in ("parameter", "constant") else []
        for at, name in enumerate(used):
            if name not in names:
                continue
            if user.opcode == "bitcast":
                names.add(user.name)
            elif user.opcode in {*WINDOWS, *UPDATES}:
                total += _of_operand(program, user, at, whole)
            else:
                return whole
    return total


def reads(program: Program, computation: str) -> list[tuple[Instruction, str, int]]:
    """Returns (instruction, operand, bytes) of all that is read, branches but not inner loops."""
    found = []
    body = program.computations[computation]
    by_name = {instruction.name: instruction for instruction in body}
    for instruction in body:
        if branches := instruction.attribute(r"branch_computations=\{([^}]*)\}"):
            for branch in branches.split(","):
                found += reads(program, branch.strip().lstrip("%"))
        if instruction.opcode in MOVELESS or instruction.opcode.endswith(("-done", "-update")):
            continue
        for place, name in enumerate(operands(instruction)):
            source = by_name[name]
            if source.shape.startswith("(") or re.search(r"S\([1-9]\)", source.shape):
                continue
            size = _of_operand(program, instruction, place, num_bytes(source))
            if size:
                found.append((instruction, name, size))
    return found
