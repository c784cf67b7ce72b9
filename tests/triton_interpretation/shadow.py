# SPDX-License-Identifier: Apache-2.0
"""Keeps shadow memory of one kernel launch: which elements exist, and which program touched them from which line."""

from __future__ import annotations

import linecache
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .errors import LaneRace, OutOfBounds, ProgramRace

Addresses = npt.NDArray[np.uint64]
Program = tuple[int, int, int]
Site = tuple[str, int]  # (file, line)

NOBODY = -1


def element_addresses(tensor: torch.Tensor) -> Addresses:
    """Addresses of a tensor's elements in row-major order; an expanded (zero-stride) axis counts once."""
    offsets = np.zeros(1, np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        steps = np.arange(1 if stride == 0 and size else size, dtype=np.int64) * stride
        offsets = (offsets[:, None] + steps).ravel()
    return np.uint64(tensor.data_ptr()) + (offsets * tensor.element_size()).astype(np.uint64)


def describe_site(site: Site) -> str:
    """Returns the file's name, the line and the statement."""
    file, line = site
    return f"{file.rsplit('/', 1)[-1]}:{line} `{linecache.getline(file, line).strip()}`"


class _Touched:
    """Records, per element, the first program that touched it in one way, and from where.

    The first is enough: programs run to their end one after the other, so when one comes to an element that
    others touched before, the first of those is another.
    """

    def __init__(self, count: int) -> None:
        self.program = np.full(count, NOBODY, np.int32)
        self.site = np.zeros(count, np.int32)

    def note(self, elements: npt.NDArray[np.intp], program: int, site: int) -> None:
        fresh = elements[self.program[elements] == NOBODY]
        self.program[fresh], self.site[fresh] = program, site

    def by_another(self, elements: npt.NDArray[np.intp], program: int) -> tuple[int, int, int] | None:
        """Returns (element, program, site) of the first element that another program touched, or None."""
        before = self.program[elements]
        clash = np.flatnonzero((before != NOBODY) & (before != program))
        if not clash.size:
            return None
        element = int(elements[clash[0]])
        return element, int(self.program[element]), int(self.site[element])


class Shadow:
    """Bounds and races of one launch.

    Args:
        kernel: the kernel's name, for messages.
        tensors: the tensor arguments by name; an address is in bounds when it is the start of an element
            of one of them, so a step out of a view into its neighbour in the same storage is seen too.
        bounds, races: what to check.
    """

    def __init__(self, kernel: str, tensors: Mapping[str, torch.Tensor], *, bounds: bool, races: bool) -> None:
        self.kernel, self.bounds, self.races = kernel, bounds, races
        self.grid: Program = (1, 1, 1)
        # The widest element first: np.unique keeps the first of the views that share an address.
        self._tensors = sorted(tensors.items(), key=lambda item: -item[1].element_size())
        found = [element_addresses(tensor) for _, tensor in self._tensors]
        self._starts = np.cumsum([0, *map(len, found)])
        together = np.concatenate(found) if found else np.empty(0, np.uint64)
        self._addresses, self._origin = np.unique(together, return_index=True)
        widths = [np.full(len(a), t.element_size()) for a, (_, t) in zip(found, self._tensors, strict=True)]
        self._widths = np.concatenate(widths)[self._origin] if widths else np.empty(0, np.int64)
        count = len(self._addresses)
        self._stored, self._loaded, self._atomic = _Touched(count), _Touched(count), _Touched(count)
        self._written = np.zeros(count, bool)
        self._sites: list[Site] = []
        self._site_numbers: dict[Site, int] = {}

    def written_addresses(self) -> Addresses:
        """Addresses of the elements that were stored or atomically updated so far."""
        return self._addresses[self._written]

    def access(
        self, kind: str, addresses: Addresses, width: int, program: Program, site: Site, values: Any = None
    ) -> None:
        """Checks and notes an access of the active lanes.

        Args:
            kind: "load", "store" or "atomic".
            addresses: (lanes,) of the active lanes only.
            width: bytes of an element.
            values: (lanes,) what is stored, for stores.

        Raises:
            OutOfBounds, ProgramRace, LaneRace.
        """
        if addresses.size == 0:
            return
        elements = np.searchsorted(self._addresses, addresses)
        elements = np.minimum(elements, max(len(self._addresses) - 1, 0))
        if not len(self._addresses):
            good = np.zeros(addresses.shape, bool)
        else:
            good = (self._addresses[elements] == addresses) & (self._widths[elements] >= width)
        if not good.all():
            if self.bounds:
                raise self._out_of_bounds(kind, addresses[~good], addresses.size, width, program, site)
            elements = elements[good]
            values = None if values is None else values[good]
        if self.races:
            self._check_lanes(elements, values, program, site)
            self._check_programs(kind, elements, program, site)
        if kind != "load":
            self._written[elements] = True

    def _check_lanes(self, elements: npt.NDArray[np.intp], values: Any, program: Program, site: Site) -> None:
        if values is None:
            return
        order = np.argsort(elements, kind="stable")
        twice = elements[order][1:] == elements[order][:-1]
        if not twice.any():
            return
        patterns = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")[order]  # NaN equals itself
        clash = np.flatnonzero(twice & (patterns[1:] != patterns[:-1]))
        if clash.size:
            element = self._name(int(elements[order][clash[0]]))
            message = f"lanes of one store write different values to {element}; which one stays is undefined"
            raise LaneRace(message, kernel=self.kernel, program=program, site=describe_site(site))

    def _check_programs(self, kind: str, elements: npt.NDArray[np.intp], program: Program, site: Site) -> None:
        number = int(np.ravel_multi_index(program, self.grid))
        touched = {"store": self._stored, "load": self._loaded, "atomic": self._atomic}
        rivals = {"store": ("store", "load", "atomic"), "load": ("store", "atomic"), "atomic": ("store", "load")}
        for other in rivals[kind]:
            clash = touched[other].by_another(elements, number)
            if clash is not None:
                element, rival, rival_site = clash
                index = tuple(int(i) for i in np.unravel_index(rival, self.grid))
                there = describe_site(self._sites[rival_site])
                article = "an" if other == "atomic" else "a"
                message = (
                    f"{kind} of {self._name(element)} races with {article} {other} by program {index} at {there}"
                )
                raise ProgramRace(message, kernel=self.kernel, program=program, site=describe_site(site))
        touched[kind].note(elements, number, self._number(site))

    def _number(self, site: Site) -> int:
        if site not in self._site_numbers:
            self._site_numbers[site] = len(self._sites)
            self._sites.append(site)
        return self._site_numbers[site]

    def _name(self, element: int) -> str:
        origin = int(self._origin[element])
        number = int(np.searchsorted(self._starts, origin, side="right")) - 1
        name, tensor = self._tensors[number]
        strides = zip(tensor.shape, tensor.stride(), strict=True)
        shape = [1 if stride == 0 and size else size for size, stride in strides]
        index = np.unravel_index(origin - int(self._starts[number]), shape) if shape else ()
        return f"{name}[{', '.join(str(int(i)) for i in index)}]"

    def _out_of_bounds(
        self, kind: str, bad: Addresses, lanes: int, width: int, program: Program, site: Site
    ) -> OutOfBounds:
        where = self._distance(int(bad[0]), width)
        message = f"{kind} outside every tensor argument by {bad.size} of {lanes} active lanes; the first {where}"
        return OutOfBounds(message, kernel=self.kernel, program=program, site=describe_site(site))

    def _distance(self, address: int, width: int) -> str:
        ranges = []
        for name, tensor in self._tensors:
            if not tensor.numel():
                continue
            strides = zip(tensor.shape, tensor.stride(), strict=True)
            begin = tensor.data_ptr()
            end = begin + (sum((n - 1) * s for n, s in strides) + 1) * tensor.element_size()
            away = max(begin - address, address + width - end, 0)
            ranges.append((away, begin, end, f"{name} {tuple(tensor.shape)}"))
        if not ranges:
            return "has no tensor argument with elements near it"
        _, begin, end, name = min(ranges)
        if address < begin:
            return f"lies {begin - address} bytes before {name}"
        if address + width > end:
            return f"lies {address - end} bytes past the end of {name}"
        return f"lies between the elements of {name} (a gap of the view, or a misaligned address)"
