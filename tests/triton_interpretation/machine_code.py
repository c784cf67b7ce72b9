# SPDX-License-Identifier: Apache-2.0
"""Reads a kernel's machine code (SASS): registers, local memory, and the length of the loop that does the work."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MachineCode:
    """Describes a compiled kernel.

    Attributes:
        registers: per thread.
        local_accesses: instructions that load or store local memory: spilled registers, or arrays.
        atomics: instructions that update global memory atomically.
        matrix_products: instructions of the matrix units.
        loop: instructions in the longest innermost loop that evaluates exponentials, idle ones not counted; 0 if
            there is none.
        exponentials: those of that loop.
    """

    registers: int
    local_accesses: int
    atomics: int
    matrix_products: int
    loop: int
    exponentials: int


def read(cubin: bytes, cuobjdump: str) -> MachineCode:
    """Disassembles a compiled kernel by `cuobjdump`, which comes with Triton and with CUDA."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [cuobjdump, "-res-usage", "-sass", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return parse(text)


def parse(text: str) -> MachineCode:
    """Reads what ``cuobjdump -res-usage -sass`` prints of one kernel."""
    code = [(int(address, 16), line) for address, line in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;]+);", text)]
    registers = re.search(r"REG:(\d+)", text)
    if registers is None or not code:
        raise ValueError(f"cuobjdump said nothing that is understood:\n{text[:2000]}")

    def count(names: str) -> int:
        return sum(bool(re.search(rf"\b(?:{names})\b", line)) for _, line in code)

    body = max(_loops(code), key=len, default=[])
    exponentials = sum("MUFU.EX2" in line for line in body)
    return MachineCode(
        registers=int(registers[1]),
        local_accesses=count("STL|LDL"),
        # Not ATOMS, in shared memory: sm_100 allots its tensor memory by it.
        atomics=count("ATOM|ATOMG|RED|REDG"),
        matrix_products=count("HMMA|HGMMA|UTC[A-Z]*MMA"),
        loop=len(body),
        exponentials=exponentials,
    )


def _loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """Returns the instructions of the innermost loops with exponentials in them."""
    position = {address: number for number, (address, _) in enumerate(code)}
    spans = []
    for number, (address, line) in enumerate(code):
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", line)
        if target and int(target[1], 16) < address:
            spans.append((position[int(target[1], 16)], number + 1))
    working = [(a, b) for a, b in spans if any("MUFU.EX2" in line for _, line in code[a:b])]
    innermost = [(a, b) for a, b in working if not any(a <= c and d <= b and (c, d) != (a, b) for c, d in working)]
    return [[line for _, line in code[a:b] if "NOP" not in line] for a, b in innermost]
