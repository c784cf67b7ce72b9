# SPDX-License-Identifier: Apache-2.0
"""Runs the command `medaccel`. Each sub-command has --help with examples and takes a YAML --config with overrides."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NoReturn

from jsonargparse import Namespace

from medaccel._arguments import prepared
from medaccel._commands import COMMANDS, GROUPS, PACKAGES
from medaccel.studies.settings import nearest


def parse(argv: Sequence[str]) -> tuple[str, Namespace]:
    """Returns a command's name, such as "restoration run", and its options; ends the process with status 2 if they
    can't be parsed.

    Each command has a parser of its own: jsonargparse's nested parsers answer a mistyped key in a file with the
    command's name alone, and all of them would be built for every call.
    """
    words = list(argv)
    name = next((name for name in (" ".join(words[:2]), *words[:1]) if name in COMMANDS), None)
    if name is None:
        _listing(words)
    command = COMMANDS[name]
    _require(name, command.packages)
    parser = command.parser()
    parser.prog = f"medaccel {name}"
    arguments = words[len(name.split()) :]
    words, groups = prepared(parser, arguments, command.types())
    found = parser.parse_args(words)
    for group, given in groups.items():
        found[group] = given
    return name, found


def _listing(words: Sequence[str]) -> NoReturn:
    """Answers words that name no command: with the help, the version, or a list of the commands."""
    import medaccel

    group = words[0] if words and words[0] in GROUPS else None
    prefix = "" if group is None else f"{group} "
    known = {name.removeprefix(prefix): c.help for name, c in COMMANDS.items() if name.startswith(prefix)}
    if group is None:
        description = "Fast kernels for 3-D medical imaging, and the studies built on them."
    else:
        description = GROUPS[group]
    text = "\n".join(f"  {name:<20}{what}" for name, what in known.items())
    parser = argparse.ArgumentParser(
        prog=f"medaccel {prefix}".strip(),
        usage="%(prog)s COMMAND [options]",
        description=f"{description}\n\ncommands:\n{text}\n\n%(prog)s COMMAND --help has the options, and examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"medaccel {medaccel.__version__}")
    rest = list(words[1:] if group else words)
    if rest and rest[0].startswith("-"):
        parser.parse_args(rest[:1])
    found = f"{rest[0]!r} is no command{nearest(rest[0], known)}" if rest else "a command is missing"
    print(f"{parser.prog}: error: {found}; expected one of {', '.join(known)}", file=sys.stderr)
    sys.exit(2)


def _require(name: str, packages: Sequence[str]) -> None:
    """Ends the process with a sentence if a package that a command imports is not installed."""
    missing = [package for package in packages if not _installed(package)]
    if missing:
        print(_without(f"medaccel {name}", missing), file=sys.stderr)
        sys.exit(2)


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # ValueError: the module is in sys.modules without a spec
        return False


def _without(what: str, missing: Sequence[str]) -> str:
    names = ", ".join(PACKAGES[package] for package in missing)
    there = "which is not installed" if len(missing) == 1 else "which are not installed"
    return f'medaccel: error: {what} needs {names}, {there} here: pip install "medaccel[pipelines]"'


def _warning_line(message: Warning | str, *details: Any, **more: Any) -> None:
    print(f"medaccel: warning: {message}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0 if it ended well; 2, with a sentence on stderr, if it was refused before anything was made or removed; 1,
        with a sentence, if it failed later; 130 after Ctrl-C.
    """
    name, arguments = parse(sys.argv[1:] if argv is None else argv)
    warnings.showwarning = _warning_line
    try:
        return COMMANDS[name].call(arguments) or 0
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in PACKAGES:
            raise
        print(_without(f"medaccel {name}", [package]), file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"medaccel: error: {error}", file=sys.stderr)
        return getattr(error, "exit_status", 1)
    except KeyboardInterrupt:
        how = " without --force" if arguments.get("force") else ""
        print(f"medaccel: interrupted; run the same command again{how} to go on where it stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
