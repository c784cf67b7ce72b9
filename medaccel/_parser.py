# SPDX-License-Identifier: Apache-2.0
"""Builds a command's parser from dataclasses of options: each field has an option with its type and explanation.

The command line has an option for every field of a group, such as `--trainer.steps`; --help explains fields that
several groups share once.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import shutil
import sys
import textwrap
import typing
from argparse import SUPPRESS
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import yaml
from docstring_parser import parse
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from medaccel.studies.typed import Settings, describe, hints_of, is_group, is_list, plain

_INDENT = 10  # columns before an explanation


class Formatter(DefaultHelpFormatter):
    """Keeps the line breaks of examples, and takes explanations of options as they are."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "max_help_position": _INDENT})

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:") or isinstance(text, _Laid):
            return text
        return super()._fill_text(text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str:
        if getattr(action, "explained", False):
            return str(action.help)
        return str(super()._get_help_string(action))


class _Laid(str):
    """Is a text that is laid out already."""


class Parser(ArgumentParser):
    """Parses a command's arguments; its errors are a sentence without the usage of all options."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        #: These are the defaults of options that are tables of a user's own names.
        self.defaults_of_tables: dict[str, Any] = {}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sentence = " ".join(message.replace("Parser key ", "").split())
        print(f"{self.prog}: error: {sentence}", file=sys.stderr)
        print(f"{self.prog} --help lists the options", file=sys.stderr)
        sys.exit(2)


def add_options(parser: Parser, kind: Any) -> None:
    """Adds the fields of a dataclass, those without a default as positional arguments.

    Args:
        parser: the parser to add to.
        kind: the dataclass; its fields may be groups of options.
    """
    hints, said = hints_of(kind), explanations(kind)
    named = {name: hint for name, hint in hints.items() if is_group(hint) or _table_of_groups(hint)}
    parser.add_class_arguments(kind, as_positional=True, skip=set(named))
    parser._action_groups[-1].title = kind.__doc__.partition(";")[0].strip()
    defaults = {field.name: default_of(field) for field in dataclasses.fields(kind)}
    for action in parser._actions:
        if action.dest in hints:
            _explain(action, hints[action.dest], said[action.dest], defaults[action.dest])
            if action.option_strings and typing.get_origin(hints[action.dest]) is dict:
                parser.defaults_of_tables[action.dest] = plain(defaults[action.dest])
    explained: dict[type[Settings], str] = {}
    # Options that explain for several come before the others that have them too.
    for name, hint in sorted(named.items(), key=lambda item: getattr(item[1], "explained", None) is None):
        if is_group(hint):
            _add_group(parser, name, hint, said[name], explained, kind)
        else:
            _add_table(parser, name, hint, said[name], defaults[name], explained)
    if parser.usage is None and not any(not action.option_strings for action in parser._actions):
        parser.usage = "%(prog)s [--config FILE] [options]"


def explanations(kind: Any) -> dict[str, str]:
    """Returns the explanations of each field in the docstrings of a dataclass and its bases.

    Raises:
        ValueError: a field has no explanation.
    """
    said: dict[str, str] = {}
    for one in reversed(inspect.getmro(kind)):
        for param in parse(vars(one).get("__doc__") or "").params:
            for name in param.arg_name.split(", "):
                said[name] = " ".join((param.description or "").split())
    missing = [field.name for field in dataclasses.fields(kind) if not said.get(field.name)]
    if missing:
        raise ValueError(f"{kind.__name__}: {', '.join(missing)} has no explanation in the docstring; expected one")
    return {field.name: said[field.name] for field in dataclasses.fields(kind)}


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Returns a field's default; MISSING if it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _add_group(
    parser: Parser, name: str, kind: type[Settings], said: str, explained: dict[type[Settings], str], owner: Any
) -> None:
    """Adds an option for each field of a group, and of the groups in it."""
    hints, texts = hints_of(kind), explanations(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    leaves = {key: hint for key, hint in hints.items() if not is_group(hint)}
    own = getattr(kind, "explained", None)
    whole = next((base for base in explained if issubclass(kind, base)), None) if own is None else None
    text = f"{said[0].upper()}{said[1:]}".rstrip(".") + "."
    if own is not None:
        text += " Any other option of those below may stand here, too."
    if whole is not None:
        text += f" The options of {explained[whole]} may stand here, too; those with other defaults are listed again."
    section = parser.add_argument_group(f"--{name}", text)
    set_elsewhere = getattr(owner, "set_elsewhere", {}).get(name, ())
    for key, hint in leaves.items():
        action = section.add_argument(f"--{name}.{key}", type=_bare(hint), default=SUPPRESS)
        default = default_of(fields[key] if own is None or key not in own.option_names() else _field(own, key))
        _explain(action, hint, texts[key], default)
        repeated = whole is not None and key in whole.option_names() and default == default_of(_field(whole, key))
        if repeated or key in set_elsewhere or (own is not None and key not in own.option_names()):
            action.help = SUPPRESS
    if own is not None:
        explained[own] = f"--{name}"
    for key, hint in hints.items():
        if is_group(hint):
            _add_group(parser, f"{name}.{key}", hint, texts[key], explained, kind)


def _add_table(
    parser: Parser, name: str, hint: Any, said: str, default: Any, explained: Mapping[type[Settings], str]
) -> None:
    """Adds an option whose parts are groups under names that are the user's own; --help shows them under NAME."""
    kind = typing.get_args(hint)[1]
    texts = explanations(kind)
    lines = []
    for field in dataclasses.fields(kind):
        inner = hints_of(kind)[field.name]
        word = f"--{name}.NAME.{field.name}" + (f" {_metavar(inner)}" if not is_group(inner) else ".…")
        lines += [f"  {word}", *_wrapped(_text(inner, texts[field.name], default_of(field)))]
    width = shutil.get_terminal_size().columns - 4
    head = textwrap.wrap(f"{said[0].upper()}{said[1:]}", width, initial_indent="  ", subsequent_indent="  ")
    section = parser.add_argument_group(f"--{name}", _Laid("\n".join([*head, "", *lines])))
    parser.defaults_of_tables[name] = plain(default)
    action = section.add_argument(f"--{name}", type=dict[str, Any], default=plain(default))
    _explain(action, dict, "all of them at once, which takes the place of those before", plain(default))


def _wrapped(text: str) -> list[str]:
    width = max(shutil.get_terminal_size().columns - 2, 30)
    return textwrap.wrap(text, width, initial_indent=" " * _INDENT, subsequent_indent=" " * _INDENT)


def _explain(action: argparse.Action, hint: Any, said: str, default: Any) -> None:
    action.help = _text(hint, said, default)
    action.explained = True  # type: ignore[attr-defined]
    if action.option_strings:
        action.metavar = _metavar(hint)


def _text(hint: Any, said: str, default: Any) -> str:
    """Returns an explanation, with the expected values and the default."""
    facts = [] if is_group(hint) else [describe(hint)]
    if default is not dataclasses.MISSING and not is_group(hint) and default not in ({}, ""):
        facts.append(f"default: {_written(default)}")
    return f"{said.rstrip('.')} ({'; '.join(facts)})" if facts else said.rstrip(".")


def _written(value: Any) -> str:
    value = str(value) if isinstance(value, Path) else plain(value)
    return str(yaml.safe_dump(value, default_flow_style=True, width=10_000)).replace("\n...", "").strip()


def _metavar(hint: Any) -> str:
    """Returns the placeholder for an option's value."""
    if typing.get_origin(hint) is Annotated:
        return _metavar(hint.__origin__)
    if typing.get_origin(hint) is Literal:
        return "{" + ",".join(map(str, typing.get_args(hint))) + "}"
    if is_list(hint):
        return "LIST"
    if typing.get_origin(hint) is dict or hint is dict:
        return "{NAME: …}"
    words = {bool: "true|false", int: "N", float: "X", Path: "PATH", str: "TEXT"}
    inner = [one for one in typing.get_args(hint) if one is not type(None)]
    return words.get(hint) or (_metavar(inner[0]) if inner else "VALUE")


def _bare(hint: Any) -> Any:
    """Returns a type as jsonargparse needs it: the conditions that `Annotated` adds are checked before."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _bare(hint.__origin__)
    if is_group(hint) or not inner or origin is Literal:
        return hint
    bare = tuple(one if one is Ellipsis else _bare(one) for one in inner)
    return typing.Union[bare] if origin not in (tuple, list, dict) else origin[bare]  # noqa: UP007


def _table_of_groups(hint: Any) -> bool:
    inner = typing.get_args(hint)
    return typing.get_origin(hint) is dict and len(inner) == 2 and is_group(inner[1])


def _field(kind: type[Settings], name: str) -> dataclasses.Field[Any]:
    return next(field for field in dataclasses.fields(kind) if field.name == name)
