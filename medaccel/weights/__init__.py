# SPDX-License-Identifier: Apache-2.0
"""Finds trained weights: those that the package holds, and larger ones that are fetched once and kept.

`catalogue.json` lists all of them with their SHA-256. Weights that are not in the package lie in a cache folder:
``MEDACCEL_WEIGHTS``, else ``medaccel/weights`` in the user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``).
No file is used before its SHA-256 was compared.
"""

from __future__ import annotations

import os
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medaccel.data.files import atomic_path, check_input, read_json
from medaccel.studies.digest import file_sha256

#: `medaccel restoration apply` restores with these weights unless it is told others.
RESTORATION = "pet_restoration"
_FOLDER = Path(__file__).parent
_CATALOGUE = _FOLDER / "catalogue.json"
_TIMEOUT = 60.0  # s without an answer
_CHUNK = 1 << 20
_FIELDS = {"file": str, "bytes": int, "sha256": str, "purpose": str, "card": str, "url": str}


@dataclass(frozen=True)
class Weights:
    """Describes one file of weights.

    Args:
        name: the name that commands take.
        file: its file name.
        bytes: its size.
        sha256: SHA-256 of its content, in hexadecimal digits.
        purpose: what it is for, in a few words.
        card: file name of its model card, in this package.
        url: where it is fetched from; empty if the package holds it.
    """

    name: str
    file: str
    bytes: int
    sha256: str
    purpose: str
    card: str
    url: str = ""

    @property
    def place(self) -> Path:
        """Returns the file's path, whether it is there yet or not."""
        return (cache_folder() if self.url else _FOLDER) / self.file

    @property
    def card_path(self) -> Path:
        """Returns the model card's path."""
        return _FOLDER / self.card


def cache_folder() -> Path:
    """Returns the folder of fetched weights; it need not exist."""
    chosen = os.environ.get("MEDACCEL_WEIGHTS")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medaccel" / "weights"


def catalogue(path: Path = _CATALOGUE) -> dict[str, Weights]:
    """Returns all weights by name.

    Raises:
        ValueError: the catalogue lacks a field, or a field has another type.
    """
    found = {}
    for name, entry in read_json(path).items():
        for field, kind in _FIELDS.items():
            if not isinstance(entry.get(field, "" if field == "url" else None), kind):
                raise ValueError(f"{path}: {name}: {field} is {entry.get(field)!r}; expected a {kind.__name__}")
        found[name] = Weights(name, **{field: entry[field] for field in _FIELDS if field in entry})
    return found


def known(name: str, among: Mapping[str, Weights] | None = None) -> Weights:
    """Returns the weights of that name; raises ValueError, with all names, if there are none."""
    among = catalogue() if among is None else among
    if name not in among:
        raise ValueError(f"weights {name!r} are unknown; expected one of {', '.join(among)}, or the path of a file")
    return among[name]


def find(name_or_path: str | os.PathLike[str]) -> Path:
    """Returns the path of weights, by their name or by the path of a file.

    A name goes before a file of the same name in the working folder; ``./name`` is always a file.

    Raises:
        ValueError: neither weights nor a file have that name; the file's SHA-256 is another than the catalogue's.
        FileNotFoundError: the weights are known but not here yet; the message says how to get them.
    """
    among = catalogue()
    if str(name_or_path) not in among:
        path = Path(name_or_path)
        if path.name == str(name_or_path) and not path.suffix and not path.exists():
            known(str(name_or_path), among)
        return path
    chosen = among[str(name_or_path)]
    if not chosen.place.exists():
        raise FileNotFoundError(
            f"{chosen.place}: the weights {chosen.name!r} are not here yet; `medaccel weights get {chosen.name}` "
            f"fetches them ({chosen.bytes / 1e6:.1f} MB), and --from-file takes a copy of the file"
        )
    return _verified(chosen, chosen.place)


def get(
    name: str,
    *,
    from_file: Path | None = None,
    mirror: str | None = None,
    force: bool = False,
    say: Callable[[str], Any] = lambda _: None,
) -> Path:
    """Brings weights to their place, and returns it; weights that are there already are only verified.

    Args:
        name: a name of the catalogue.
        from_file: a copy of the file, for machines without internet.
        mirror: address of a folder that holds the file, instead of the catalogue's address: https, http or file.
        force: fetch again what is there already.
        say: receives a sentence before a download.

    Raises:
        ValueError: the name is unknown; both sources are given; the content's SHA-256 is another than the
            catalogue's, and then nothing is kept; the package itself holds the weights.
        OSError: the file or the address can't be read.
    """
    chosen = known(name)
    if from_file is not None and mirror is not None:
        raise ValueError("from_file and mirror are both given; expected at most one of them")
    if chosen.place.exists() and not force:
        return _verified(chosen, chosen.place)
    if not chosen.url:
        raise ValueError(f"{chosen.place}: the package itself holds the weights {name!r}; reinstall it")
    chosen.place.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(chosen.place, force=True) as temporary:
        if from_file is not None:
            shutil.copyfile(check_input(from_file), temporary)
        else:
            address = chosen.url if mirror is None else f"{mirror.rstrip('/')}/{chosen.file}"
            say(f"fetching {address} ({chosen.bytes / 1e6:.1f} MB)")
            _download(address, Path(temporary), chosen.bytes)
        _verified(chosen, Path(temporary), said=from_file or chosen.place)
    return chosen.place


def _download(address: str, target: Path, size: int) -> None:
    """Reads an address into a file. Proxies are the environment's (https_proxy, no_proxy), as urllib has them."""
    if urllib.parse.urlsplit(address).scheme not in ("https", "http", "file"):
        raise ValueError(f"mirror: the address is {address!r}; expected one that begins with https, http or file")
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT) as source, open(target, "wb") as file:
            while chunk := source.read(_CHUNK):
                file.write(chunk)
                if file.tell() > size:  # no server fills the disk
                    raise ValueError(f"{address}: holds more than the {size} bytes that were expected")
    except (urllib.error.URLError, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        raise OSError(
            f"{address}: can't be fetched ({reason}); --mirror names another address, --from-file a copy of the file"
        ) from error


def _verified(chosen: Weights, path: Path, said: Path | None = None) -> Path:
    """Returns the path if the file there is the catalogue's."""
    found = file_sha256(check_input(path))
    if found != chosen.sha256:
        raise ValueError(
            f"{said or path}: SHA-256 is {found}; expected {chosen.sha256}, that of the weights {chosen.name!r}"
        )
    return path
