# SPDX-License-Identifier: Apache-2.0
"""Checks a command line's names and values before jsonargparse sees them, so that a mistake gets one sentence, and
lists may be written as people write them: `--methods a b`, `--methods a,b`, `--methods "[a, b]"`.
"""

from __future__ import annotations

import json
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, get_loader

from medaccel.studies.settings import converted, nearest


class Formatter(DefaultHelpFormatter):
    """Keeps the line breaks of examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return text
        return super()._fill_text(text, width, indent)


class Parser(ArgumentParser):
    """Parses a command's arguments; its errors are a sentence without the usage of all options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sentence = " ".join(message.replace("Parser key ", "").split())
        print(f"{self.prog}: error: {sentence}", file=sys.stderr)
        print(f"{self.prog} --help lists the options", file=sys.stderr)
        sys.exit(2)


def prepared(parser: Parser, arguments: Sequence[str], hints: Mapping[str, Any]) -> list[str]:
    """Returns a command's arguments as its parser takes them: values checked and written as JSON.

    Args:
        parser: the command's parser; its `error` is called for refused arguments.
        arguments: the command's arguments, without its name.
        hints: types of options by name, such as `hints_of` gives.
    """
    try:
        return _Line(parser, arguments, hints).prepared()
    except ValueError as error:
        parser.error(str(error))


class _Line:
    def __init__(self, parser: Parser, arguments: Sequence[str], hints: Mapping[str, Any]) -> None:
        self.parser, self.arguments = parser, list(arguments)
        self.actions = parser._option_string_actions
        self.hints = {name: hint for name, hint in hints.items() if f"--{name}" in self.actions}
        self.positionals = sum(not action.option_strings for action in parser._actions)

    def prepared(self) -> list[str]:
        result: list[str] = []
        free: list[str] = []
        at = 0
        while at < len(self.arguments):
            word = self.arguments[at]
            at += 1
            if word == "--":
                return [*result, word, *free, *self.arguments[at:]]
            if not word.startswith("-") or word == "-" or _is_number(word):
                free.append(word)
                continue
            option, equals, value = word.partition("=")
            name = option.lstrip("-")
            action = self.actions.get(option)
            base = name.partition(".")[0]
            nested = action is None and _kind(self.hints.get(base)) == "settings"
            if action is None and not nested:
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
            result.append(f"{option}={self._value(name, values)}")
        return [*result, *free]

    def _belongs(self, name: str, values: Sequence[str], word: str) -> bool:
        """Tells whether a word is a value of the option before it."""
        if word.startswith("-") and word != "-" and not _is_number(word):
            return False
        if not values:
            return True
        kind = "list" if "." in name else _kind(self.hints.get(name))
        if kind == "scalar or list":  # one number or several, such as a filter's widths
            return _is_number(word) and _is_number(values[0])
        # Brackets hold the whole list, unless it is a list of lists.
        hint = self.hints.get(name)
        nested = hint is not None and _kind(next(iter(typing.get_args(hint)), None)) == "list"
        return kind == "list" and (nested or not values[0].startswith(("[", "{")))

    def _value(self, name: str, values: Sequence[str]) -> str:
        if name == "config":
            return self._config(values[0])
        hint = self.hints.get(name, self._entry(name))
        if hint is None:
            return values[0] if len(values) == 1 else json.dumps([_loaded(value) for value in values])
        if _is_text(hint):
            found = converted(name, None if values[0] == "null" and _optional(hint) else values[0], hint)
            return "null" if found is None else values[0]
        given = _given(values, hint)
        if given is None and not _optional(hint):
            given = values[0]
        return json.dumps(converted(name, given, hint), default=str)

    def _entry(self, name: str) -> Any:
        """Returns the type of a list within settings, such as `--select.init`; None for settings without a type
        here."""
        base, _, key = name.partition(".")
        inner = typing.get_args(self.hints.get(base))
        return inner[1] if key and "." not in key and len(inner) == 2 and _kind(inner[1]) == "list" else None

    def _config(self, path: str) -> str:
        """Converts a YAML file, whose keys and values are the command's, to JSON."""
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
        known = {action.dest: action for action in self.parser._actions if action.dest not in ("help", "config")}
        values: dict[str, Any] = {}
        for key, value in content.items():
            base = str(key).partition(".")[0]
            if key not in known and not ("." in str(key) and _kind(self.hints.get(base)) == "settings"):
                raise ValueError(f"{path}: {key} is no option of this command{self._nearest(str(key), '')}")
            if key in self.hints:
                try:
                    value = converted(str(key), value, self.hints[key])
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error
            elif key in known and known[key].nargs == 0 and not isinstance(value, bool):
                raise ValueError(f"{path}: {key} is {value!r}; expected true or false")
            values[str(key)] = value
        return json.dumps(values, default=str)

    def _nearest(self, name: str, dashes: str = "--") -> str:
        return nearest(name, [option.lstrip("-") for option in self.actions if option.startswith("--")]).replace(
            "mean ", f"mean {dashes}"
        )


def _given(values: Sequence[str], hint: Any) -> Any:
    """Returns the value that the words after an option mean."""
    if len(values) == 1:
        listed = _kind(hint) == "list" and not values[0].startswith(("[", "{"))  # one entry, or several with commas
        return values[0] if listed else _loaded(values[0])
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
    """Says which form a type's values have: list, settings, scalar, or scalar or list."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (tuple, list):
        return "list"
    if origin is dict:
        return "settings"
    kinds = {_kind(one) for one in inner if one is not type(None)} if origin not in (None, Literal) else set()
    if kinds == {"scalar", "list"}:
        return "scalar or list"
    return kinds.pop() if len(kinds) == 1 else "scalar"


def _optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _is_text(hint: Any) -> bool:
    """Tells whether values are taken letter by letter, such as a path that is called 1e3."""
    kinds = set(typing.get_args(hint)) - {type(None)} if typing.get_origin(hint) is not Literal else {str}
    return hint in (str, Path) or (bool(kinds) and kinds <= {str, Path})


def _of_text(hint: Any) -> bool:
    inner = typing.get_args(hint)
    return bool(inner) and inner[0] in (str, Path)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
