# SPDX-License-Identifier: Apache-2.0
"""Converts options to their annotated types, or refuses them in a sentence that says what was expected.

A group of options is a dataclass derived from `Settings`; it knows which of its values were given.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, Union

# At run time the base is only registered as a mapping: jsonargparse takes a class for a group of options if all of
# its bases are dataclasses.
if TYPE_CHECKING:
    _Base = Mapping[str, Any]
else:
    _Base = object

_COUNTED = {2: "two", 3: "three", 4: "four"}
_Group = TypeVar("_Group", bound="Settings")


class UnfitError(ValueError):
    """Says that a value does not fit its option.

    Args:
        problem: text after the option's name in the message, such as " is 'abc'; expected a number".
        path: names that lead to the option, the outermost first.
        name: the option's name in the message.
    """

    def __init__(self, problem: str, path: Sequence[str] = (), name: str = "") -> None:
        super().__init__(f"{name}{problem}".lstrip(" :"))
        self.problem, self.path, self.name = problem, tuple(path), name

    def within(self, name: str, separator: str = ".") -> UnfitError:
        """Returns the same error, seen from one level further out."""
        whole = f"{name}{separator}{self.name}" if self.name else name
        return UnfitError(self.problem, (name, *self.path), whole)


class Limit:
    """Limits an option's value beyond its type: it is the metadata of an `Annotated` type.

    Args:
        fits: a function that tells whether a value of the type is allowed.
        expected: the allowed values in words.
    """

    def __init__(self, fits: Callable[[Any], bool], expected: str) -> None:
        self.fits, self.expected = fits, expected

    def refusal(self, value: Any) -> str | None:
        """Returns the expected values in words if the value isn't allowed, else None."""
        return None if self.fits(value) else self.expected


Count = Annotated[int, Limit(lambda n: n >= 1, "a whole number >= 1")]
CountFromZero = Annotated[int, Limit(lambda n: n >= 0, "a whole number >= 0")]
Positive = Annotated[float, Limit(lambda x: x > 0, "a number above 0")]
NotNegative = Annotated[float, Limit(lambda x: x >= 0, "a number >= 0")]


@dataclass(frozen=True, eq=False)
class Settings(_Base):
    """Groups options, each with a type and a default.

    All options are attributes, with their defaults. As a mapping, the group holds only the given options: a study's
    options are kept, compared and combined as they were written, and the defaults of the others don't matter. Two
    groups are equal if the same options were given the same values.
    """

    #: A message puts this between the group's name and an option's.
    separator: ClassVar[str] = ": "
    #: A message about names that the group doesn't have puts this after the group's name.
    unknown_names: ClassVar[str] = " names {names}"
    #: If True, the group is recorded as it was written, else as its types have it.
    as_written: ClassVar[bool] = True
    #: This base of the group has its options explained by --help with the group; the others are explained elsewhere.
    explained: ClassVar[type[Settings] | None] = None
    #: Options in files of earlier versions have these names; the values are today's names.
    renamed: ClassVar[Mapping[Any, str]] = {}

    def __new__(cls, *values: Any, **given: Any) -> Any:
        self = super().__new__(cls)
        # __init__ itself checks the number of values.
        object.__setattr__(self, "_written", dict(zip(cls.option_names(), values, strict=False)) | given)
        return self

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def read(cls: type[_Group], given: Any) -> _Group:
        """Reads a group from a mapping, such as YAML gives.

        Raises:
            ValueError: `given` is no mapping, has an unknown name, or a value of another type or out of range.
        """
        if isinstance(given, cls):
            return given
        current = cls.with_current_names(given)
        group = cls(**current)
        written = given.written() if isinstance(given, Settings) else dict(given)
        object.__setattr__(group, "_written", written)
        return group

    @classmethod
    def with_current_names(cls, given: Any) -> dict[str, Any]:
        """Returns the given options under today's names, without checking the values.

        Raises:
            ValueError: `given` is no mapping, has an unknown name, or an option under both its old name and its new
                one.
        """
        if not isinstance(given, Mapping):
            raise UnfitError(f" is {given!r}; expected settings by name, {{name: value}}")
        for old, new in cls.renamed.items():
            if old in given and new in given:
                raise UnfitError(f": {old} is given beside {new}, its name today; expected {new} alone")
        current = {cls.renamed.get(key, key): value for key, value in given.items()}
        known = cls.option_names()
        unknown = sorted(str(key) for key in current if key not in known)
        if unknown:
            raise UnfitError(cls.unknown(unknown, given))
        return current

    @classmethod
    def unknown(cls, names: Sequence[str], given: Mapping[str, Any]) -> str:
        """Returns the text after the group's name in the message about names that it doesn't have."""
        known = cls.option_names()
        expected = f"; expected some of {', '.join(known) or 'none'}{nearest(names[0], known)}"
        return cls.unknown_names.format(names=list(names)) + expected

    @classmethod
    def option_names(cls) -> list[str]:
        """Returns the options' names, in their order."""
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Returns all options' defaults, plain: lists for tuples."""
        return cls().whole()

    def whole(self) -> dict[str, Any]:
        """Returns all options, plain: the given ones, and the others' defaults."""
        return {name: plain(getattr(self, name)) for name in self.option_names()}

    def written(self) -> dict[str, Any]:
        """Returns the given options, plain: as they were written, or as the types have them."""
        given = vars(self)["_written"] if self.as_written else dict(self.items())
        return {name: plain(value) for name, value in given.items()}

    def __iter__(self) -> Iterator[str]:
        return (self.renamed.get(name, name) for name in vars(self)["_written"])

    def __len__(self) -> int:
        return len(vars(self)["_written"])

    def __contains__(self, name: object) -> bool:
        return name in tuple(self)

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        return getattr(self, name)

    def __eq__(self, other: object) -> bool:
        return dict(self.items()) == dict(other) if isinstance(other, Mapping) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    if not TYPE_CHECKING:

        def keys(self) -> Collection[str]:
            return tuple(self)

        def items(self) -> Collection[tuple[str, Any]]:
            return [(name, getattr(self, name)) for name in self]

        def values(self) -> Collection[Any]:
            return [getattr(self, name) for name in self]

        def get(self, name: str, default: Any = None) -> Any:
            return getattr(self, name) if name in self else default


def settings_class(name: str, defaults: Mapping[str, Any], base: type[_Group]) -> type[_Group]:
    """Makes a group of options whose types are those of their defaults."""
    kinds = [(key, type(value), dataclasses.field(default=value)) for key, value in defaults.items()]
    return dataclasses.make_dataclass(name, kinds, bases=(base,), frozen=True, eq=False)


Mapping.register(Settings)


def plain(value: Any) -> Any:
    """Converts a value to the form in YAML and checkpoints: a list for a tuple, a dict for a group."""
    if isinstance(value, Settings):
        return value.written()
    if isinstance(value, Mapping):
        return {name: plain(entry) for name, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def check_fields(options: Any) -> None:
    """Converts the fields of a frozen dataclass to their annotated types, such as lists to tuples and text to paths.

    Raises:
        ValueError: a value has another type.
    """
    kind: Any = type(options)
    given = set(options) if isinstance(options, Settings) else None
    for name, hint in hints_of(kind).items():
        if given is None or name in given:
            object.__setattr__(options, name, converted(name, getattr(options, name), hint))


@cache
def hints_of(target: Any) -> dict[str, Any]:
    """Returns the annotations of a dataclass's fields or of a function's parameters, as types."""
    if dataclasses.is_dataclass(target):
        hints = typing.get_type_hints(target, include_extras=True)
        return {field.name: hints[field.name] for field in dataclasses.fields(target)}
    function = target.__init__ if inspect.isclass(target) else target
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        hint = parameter.annotation
        if isinstance(hint, str):
            try:
                hint = eval(hint, function.__globals__)
            except NameError:  # imported for type checkers alone
                hint = Any
        found[name] = Any if hint is inspect.Parameter.empty else hint
    return found


def nearest(name: str, known: Collection[str]) -> str:
    """Returns a question after the known name that is most like an unknown one; empty if no name is like it."""
    found = difflib.get_close_matches(str(name), [str(other) for other in known], n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def converted(name: str, value: Any, hint: Any) -> Any:
    """Converts a value to the type `hint`: lists may be given as lists, as text with commas, or as their only entry.

    Args:
        name: the beginning of a message.
        value: a plain value, such as YAML gives.
        hint: a type. A type that is unknown here, such as a class, takes any value.

    Raises:
        ValueError: the value isn't of that type.
    """
    try:
        return _converted(value, hint)
    except UnfitError as unfit:
        raise unfit.within(name, separator(hint)) from None


def checked(name: str, value: Any, hint: Any) -> Any:
    """Converts a value to the type `hint`, plain and under today's names; options that were not given stay out.

    Names and types are checked, but not a group's rules about several of its options: it may not be complete yet.

    Raises:
        ValueError: a name is unknown, or a value isn't of its type.
    """
    if not is_group(hint):
        return plain(converted(name, value, hint))
    try:
        given = hint.with_current_names(value)
        return {key: checked(key, entry, hints_of(hint)[key]) for key, entry in given.items()}
    except UnfitError as unfit:
        raise unfit.within(name, separator(hint)) from None


def combined(before: Any, given: Any, hint: Any, path: Sequence[str] = ()) -> Any:
    """Combines the earlier options with those given now.

    A group keeps the options that are not given again; any other value, such as a table of names that are a user's
    own, takes the former one's place.

    Args:
        before: the earlier value; None if there is none.
        given: the value now.
        hint: the type of both.
        path: names that lead from `before` to the part that `given` stands for.
    """
    if path:
        given = {path[0]: given}
    elif not is_group(hint) or not isinstance(given, Mapping):
        return given
    result = dict(before or {})
    for key, entry in given.items():
        name, inner = _inner(hint, key)
        twin = next((other for other in result if _inner(hint, other)[0] == name), None)
        earlier = None if twin is None else result[twin]
        if twin is not None and is_group(hint) and twin != key:
            del result[twin]  # the option's name in earlier versions
            twin = None
        result[key if twin is None else twin] = combined(earlier, entry, inner, path[1:])
    return result


def _inner(hint: Any, key: Any) -> tuple[Any, Any]:
    """Returns the name by which keys of a group or a table are compared, and the type of its value."""
    if is_group(hint):
        name = hint.renamed.get(key, key)
        return name, hints_of(hint).get(name, Any)
    inner = typing.get_args(hint)
    # A fraction is the same however it is written.
    name = float(key) if re.fullmatch(r"\d+(\.\d*)?", str(key)) else str(key)
    return name, inner[1] if len(inner) == 2 else Any


def is_group(hint: Any) -> bool:
    """Tells whether a type is a group of options."""
    return inspect.isclass(hint) and issubclass(hint, Settings)


def separator(hint: Any) -> str:
    """Returns the text that messages put between the name of an option of this type and the name of a part of it."""
    return str(hint.separator) if is_group(hint) else "."


def describe(hint: Any) -> str:
    """Describes a type in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return str(hint.__metadata__[0].expected)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(one) for one in inner if one is not type(None))
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if is_list(hint):
        if origin is tuple and inner and inner[-1] is not Ellipsis:
            return f"{_COUNTED.get(len(inner), len(inner))} {_plural(inner[0])}"
        return f"a list of {_plural(inner[0])}" if inner else "a list"
    if origin in (dict, Mapping) or hint is dict or is_group(hint):
        return "settings by name, {name: value}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    return words.get(hint, "another value")


def _plural(hint: Any) -> str:
    words = {bool: "true or false", int: "whole numbers", float: "numbers", str: "names", Path: "paths"}
    if is_list(hint):
        return f"lists of {describe(hint)}"
    return words.get(hint, "values")


def is_list(hint: Any) -> bool:
    """Tells whether a type's values are lists."""
    origin = typing.get_origin(hint) or hint
    return origin in (tuple, list, Sequence)


def _unfit(value: Any, hint: Any) -> UnfitError:
    return UnfitError(f" is {value!r}; expected {describe(hint)}")


def _converted(value: Any, hint: Any) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _limited(value, hint)
    if origin in (Union, types.UnionType):
        return _first_that_fits(value, hint, inner)
    if origin is Literal:
        if value not in inner or isinstance(value, bool):
            raise _unfit(value, hint)
        return value
    if is_group(hint):
        return _grouped(value, hint)
    if is_list(hint):
        return _listed(value, hint, inner)
    if origin in (dict, Mapping) or hint is dict:
        return _mapped(value, hint, inner)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value
    if hint is str and isinstance(value, str):
        return value
    if hint is Path and isinstance(value, str | Path) and str(value):
        return Path(value)
    if hint in (bool, int, float, str, Path):
        raise _unfit(value, hint)
    return value


def _grouped(value: Any, kind: type[Settings]) -> Settings:
    try:
        return kind.read(value)
    except UnfitError:
        raise
    except ValueError as error:  # the group's rules about several of its options
        raise UnfitError(f": {error}") from error


def _limited(value: Any, hint: Any) -> Any:
    try:
        found = _converted(value, hint.__origin__)
    except UnfitError:
        raise _unfit(value, hint) from None
    expected = hint.__metadata__[0].refusal(found)
    if expected is not None:
        raise UnfitError(f" is {value!r}; expected {expected}")
    return found


def _first_that_fits(value: Any, hint: Any, options: Sequence[Any]) -> Any:
    if value is None:
        if type(None) in options:
            return None
        raise _unfit(value, hint)
    # A scalar is tried first: it would pass for a list of one.
    for option in sorted((one for one in options if one is not type(None)), key=is_list):
        try:
            return _converted(value, option)
        except UnfitError as unfit:
            last = unfit
    raise last if len(options) == 1 + (type(None) in options) else _unfit(value, hint)


def _listed(value: Any, hint: Any, inner: Sequence[Any]) -> Any:
    entry = inner[0] if inner else Any
    fixed = len(inner) if typing.get_origin(hint) is tuple and inner and inner[-1] is not Ellipsis else None
    entries = value
    if isinstance(value, str):
        entries = [_scalar(part.strip(), entry) for part in value.split(",") if part.strip()]
    elif not isinstance(value, list | tuple):
        if value is None or isinstance(value, Mapping):
            raise _unfit(value, hint)
        entries = [value]
    if is_list(entry) and entries and not any(isinstance(one, list | tuple) for one in entries):
        entries = [entries]  # one entry of several numbers
    if fixed is not None and len(entries) != fixed:
        raise _unfit(value, hint)
    try:
        found = [_converted(one, entry) for one in entries]
    except UnfitError:
        raise _unfit(value, hint) from None
    return found if typing.get_origin(hint) is list else tuple(found)


def _scalar(text: str, hint: Any) -> Any:
    """Converts a part of a text with commas: to a number if the list holds numbers."""
    if hint in (int, float, Any) or is_list(hint):
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def _mapped(value: Any, hint: Any, inner: Sequence[Any]) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise _unfit(value, hint)
    kind = inner[1] if len(inner) == 2 else Any
    return {key: converted(str(key), entry, kind) for key, entry in value.items()}
