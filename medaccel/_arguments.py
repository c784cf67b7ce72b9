# SPDX-License-Identifier: Apache-2.0
"""Checks a command line's names and values before jsonargparse sees them, so that a mistake gets one sentence, and
lists may be written as people write them: `--methods a b`, `--methods a,b`, `--methods "[a, b]"`.

Options that are groups of options, such as `--trainer.steps`, are combined here, one by one, from files and words:
given values are kept as they were written, and options that were not given are left out.
"""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from jsonargparse import get_loader

from medaccel.studies.typed import checked, combined, converted, hints_of, is_group, nearest, plain

if TYPE_CHECKING:
    from medaccel._parser import Parser


def prepared(
    parser: Parser, arguments: Sequence[str], hints: Mapping[str, Any]
) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Returns a command's arguments as its parser takes them: values checked and written as JSON.

    Args:
        parser: the command's parser; its `error` is called for refused arguments.
        arguments: the command's arguments, without its name.
        hints: types of options by name, such as `hints_of` gives.

    Returns:
        The arguments, and the given options of each group.
    """
    try:
        line = _Line(parser, arguments, hints)
        return line.prepared(), line.groups()
    except ValueError as error:
        parser.error(str(error))


class _Line:
    def __init__(self, parser: Parser, arguments: Sequence[str], hints: Mapping[str, Any]) -> None:
        self.parser, self.arguments = parser, list(arguments)
        self.actions = parser._option_string_actions
        names = {name.lstrip("-").partition(".")[0] for name in self.actions}
        self.hints = {name: hint for name, hint in hints.items() if name in names}
        self.positionals = sum(not action.option_strings for action in parser._actions)
        #: These are the given values of options that have a name for each of their parts.
        self.given: dict[str, Any] = {}

    def groups(self) -> dict[str, dict[str, Any]]:
        """Returns the given options of each group, as a run's record has them."""
        groups = {name: hint for name, hint in self.hints.items() if is_group(hint)}
        given = {name: self.given.get(name, {}) for name in groups}
        return {name: v if groups[name].as_written else checked(name, v, groups[name]) for name, v in given.items()}

    def prepared(self) -> list[str]:
        result: list[str] = []
        free: list[str] = []
        at = 0
        while at < len(self.arguments):
            word = self.arguments[at]
            at += 1
            if word == "--":
                return [*result, *self._named(), word, *free, *self.arguments[at:]]
            if not word.startswith("-") or word == "-" or _is_number(word):
                free.append(word)
                continue
            option, equals, value = word.partition("=")
            name = option.lstrip("-")
            action = self.actions.get(option)
            named = _has_names(self.hints.get(name.partition(".")[0]))
            if action is None and not named:
                raise ValueError(f"{option} is no option of this command{self._nearest(name)}")
            if action is not None and (action.nargs == 0 or action.dest == "print_config"):
                result.append(word)
                continue
            values = [value] if equals else []
            if not equals:
                while at < len(self.arguments) and self._belongs(name, values, self.arguments[at]):
                    values.append(self.arguments[at])
                    at += 1
                # Words that the command needs at its end don't belong to the list.
                while len(values) > 1 and at == len(self.arguments) and len(free) < self.positionals:
                    free.append(values.pop())
            if not values:
                raise ValueError(f"{option} has no value")
            if named:
                base, *path = _path(name)
                self._add(base, _given(values, self._hint(name)), path)
            else:
                result.append(f"{option}={self._value(name, values)}")
        return [*result, *self._named(), *free]

    def _add(self, base: str, value: Any, path: Sequence[str] = ()) -> None:
        """Notes the given value of an option that has a name for each of its parts."""
        hint = self.hints[base]
        # The value is checked alone, so that a message is about this value.
        checked(base, combined(None, value, hint, path), hint)
        before = self.given.get(base)
        if before is None and path and base in self.parser.defaults_of_tables:
            before = self.parser.defaults_of_tables[base]
        self.given[base] = combined(before, value, hint, path)

    def _named(self) -> list[str]:
        """Returns the options that have names for their parts, combined, for the parser."""
        found = {name: checked(name, value, self.hints[name]) for name, value in self.given.items()}
        return [f"--config={json.dumps(found, default=str)}"] if found else []

    def _hint(self, name: str) -> Any:
        """Returns the type of an option, or of a part of one, such as `--select.init`; None for an option without a
        type here."""
        base, *path = _path(name)
        hint = self.hints.get(base)
        for key in path:
            if hint is not None and is_group(hint):
                hint = hints_of(hint).get(hint.renamed.get(key, key))
            else:
                inner = typing.get_args(hint) if _kind(hint) == "table" else ()
                hint = inner[1] if len(inner) == 2 else None
        return hint

    def _belongs(self, name: str, values: Sequence[str], word: str) -> bool:
        """Tells whether a word is a value of the option before it."""
        if word.startswith("-") and word != "-" and not _is_number(word):
            return False
        if not values:
            return True
        hint = self._hint(name)
        kind = _kind(hint)
        if kind == "scalar or list":  # one number or several, such as a filter's widths
            return _is_number(word) and _is_number(values[0])
        # Brackets hold the whole list, unless it is a list of lists.
        nested = hint is not None and _kind(next(iter(typing.get_args(hint)), None)) == "list"
        return kind == "list" and (nested or not values[0].startswith(("[", "{")))

    def _value(self, name: str, values: Sequence[str]) -> str:
        if name == "config":
            return self._config(values[0])
        hint = self.hints.get(name)
        if hint is None:
            return values[0] if len(values) == 1 else json.dumps([_loaded(value) for value in values])
        found = converted(name, _given(values, hint), hint)
        if _is_text(hint) or (isinstance(found, str) and _has_choices(hint)):
            return "null" if found is None else values[0]
        return json.dumps(found, default=str)

    def _config(self, path: str) -> str:
        """Converts a YAML file, whose keys and values are the command's, to JSON; options with parts are noted."""
        content = _read(path)
        known = {action.dest: action for action in self.parser._actions if action.dest not in ("help", "config")}
        values: dict[str, Any] = {}
        for key, value in content.items():
            base, *parts = _path(str(key))
            if _has_names(self.hints.get(base)):
                try:
                    self._add(base, value, parts)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error
                continue
            if key not in known:
                raise ValueError(f"{path}: {key} is no option of this command{self._nearest(str(key), '')}")
            if key in self.hints:
                try:
                    value = plain(converted(str(key), value, self.hints[key]))
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error
            elif known[key].nargs == 0 and not isinstance(value, bool):
                raise ValueError(f"{path}: {key} is {value!r}; expected true or false")
            values[str(key)] = value
        return json.dumps(values, default=str)

    def _nearest(self, name: str, dashes: str = "--") -> str:
        names = {option.lstrip("-") for option in self.actions if option.startswith("--")}
        if "." not in name:
            names = {one for one in names if "." not in one} | set(self.hints)
        return nearest(name, sorted(names)).replace("mean ", f"mean {dashes}")


def _read(path: str) -> Mapping[Any, Any]:
    """Reads a YAML file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config is {path}; expected a YAML file ({_reason(error)})") from error
    try:
        content = get_loader("yaml")(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if content is None:
        content = {}
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds {content!r}; expected options by name, as `seed: 0`")
    return content


def _path(name: str) -> list[str]:
    """Returns the names that lead to a part of an option; a number with a point is one of them."""
    return re.split(r"\.(?!\d)|(?<!\d)\.", name)


def _given(values: Sequence[str], hint: Any) -> Any:
    """Returns the value that the words after an option mean."""
    if _is_text(hint):
        return None if values[0] == "null" and _optional(hint) else values[0]
    if len(values) == 1:
        if _kind(hint) == "list" and _of_text(hint) and not values[0].startswith(("[", "{")):
            return values[0]  # one entry, or several with commas
        found = _loaded(values[0])
        taken = found is not None or hint in (None, Any) or _optional(hint) or _has_names(hint)
        return found if taken else values[0]
    found = [value if _of_text(hint) else _loaded(value) for value in values]
    if all(isinstance(value, str) and "," in value for value in found):
        return [_loaded(f"[{value}]") for value in values]
    return found


def _loaded(text: str) -> Any:
    """Parses a value as YAML; returns the text itself if it is no YAML."""
    try:
        return get_loader("yaml")(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{text} is not YAML ({' '.join(str(error).split())})") from error


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _kind(hint: Any) -> str:
    """Says which form a type's values have: list, table, group, scalar, or scalar or list."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _kind(hint.__origin__)
    if origin in (tuple, list):
        return "list"
    if origin is dict:
        return "table"
    if is_group(hint):
        return "group"
    kinds = {_kind(one) for one in inner if one is not type(None)} if origin not in (None, Literal) else set()
    if kinds == {"scalar", "list"}:
        return "scalar or list"
    return kinds.pop() if len(kinds) == 1 else "scalar"


def _has_names(hint: Any) -> bool:
    """Tells whether an option's parts have names."""
    return _kind(hint) in ("group", "table")


def _optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _is_text(hint: Any) -> bool:
    """Tells whether values are taken letter by letter, such as a path that is called 1e3."""
    if typing.get_origin(hint) is Annotated:
        return _is_text(hint.__origin__)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return {one for one in typing.get_args(hint) if one is not type(None)} <= {str, Path}
    return hint in (str, Path) or typing.get_origin(hint) is Literal


def _has_choices(hint: Any) -> bool:
    """Tells whether a type is a union with words to choose from, such as `bool | Literal["bw", "lbm"]`."""
    return any(typing.get_origin(one) is Literal for one in typing.get_args(hint))


def _of_text(hint: Any) -> bool:
    inner = typing.get_args(hint)
    return bool(inner) and inner[0] in (str, Path)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
