# SPDX-License-Identifier: Apache-2.0
"""Defines the reports of the checked interpreter and of the compiler's gates."""

from __future__ import annotations


class KernelFault(Exception):
    """A fault in a Triton kernel; the message names the kernel, the program and the source line.

    Attributes:
        kernel: name of the launched kernel.
        program: index (x, y, z) of the program in the grid, or None where no single program is at fault.
        site: `file:line` of the statement at fault (in a device function: that function's line).
    """

    def __init__(self, message: str, *, kernel: str, program: tuple[int, int, int] | None, site: str) -> None:
        at = kernel if program is None else f"{kernel}, program {program}"
        super().__init__(f"{at}, {site}: {message}" if site else f"{at}: {message}")
        self.kernel, self.program, self.site = kernel, program, site


class OutOfBounds(KernelFault):
    """An active lane touched an address that is no element of any tensor argument."""


class ProgramRace(KernelFault):
    """Reports that two programs touched one element, at least one of them by a plain store."""


class LaneRace(KernelFault):
    """Reports that two lanes of one store wrote different values to one element."""


class IntegerOverflow(KernelFault):
    """Reports that an integer of up to 32 bits overflowed in an addition, subtraction or multiplication."""


class DeviceAssertion(KernelFault):
    """A `tl.device_assert` did not hold."""


class Unmodelled(KernelFault):
    """The kernel uses something that the interpreter would get wrong."""


class UnwrittenOutput(Exception):
    """Elements of an output that no program stored."""


class UnsupportedTriton(Exception):
    """The installed Triton is not one whose internals the harness knows."""


class CompilationFailed(Exception):
    """Reports that Triton or ptxas refused a kernel."""


class ResourceLimit(AssertionError):
    """A compiled kernel spills registers or needs more shared memory than the architecture has."""
