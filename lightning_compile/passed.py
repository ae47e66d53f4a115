"""Checks that have passed, remembered in this process and on disk: what equals it needs no other one.

A check is named by a hash of all that it depends on: this package's sources, PyTorch's version, and the signature of the site.
On disk each is a small JSON file beside Inductor's caches (`$TORCHINDUCTOR_CACHE_DIR`), written under another name and then
moved. A file says nothing but that a check of that name has passed. One that cannot be read, or says something else, is
ignored. Who may write there may also write Inductor's caches, which hold code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from .compat import cache_folder
from .sources import source_hash

log = logging.getLogger("lightning_compile")

_here: set[str] = set()
_told: list[Path] = []


def name_of(signature: Any) -> str:
    """The name of a check. A signature is made of tuples, numbers, strings and bytes, so its text is the same everywhere."""
    return hashlib.sha256(repr((source_hash(), torch.__version__, signature)).encode()).hexdigest()


def folder() -> Path | None:
    """Where files are; None where caches are switched off. No folder has the name of a package: some run Python inside of it."""
    caches = cache_folder()
    return None if caches is None else caches / "lightning_checks"


def has_passed(name: str) -> bool:
    if name not in _here and _on_disk(name):
        _here.add(name)
    return name in _here


def remember(name: str) -> None:
    """Written at once or not at all; a folder that cannot be written to costs nothing but the memory."""
    _here.add(name)
    where = folder()
    if where is None:
        return
    temporary = ""
    try:
        where.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=where, prefix=".", delete=False) as file:
            temporary = file.name
            file.write(json.dumps({"passed": name}) + "\n")
        os.replace(temporary, where / f"{name}.json")
    except OSError as e:
        log.debug("a passed check was not written: %s", e)
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _on_disk(name: str) -> bool:
    where = folder()
    if where is None:
        return False
    file = where / f"{name}.json"
    try:
        text = file.read_bytes()
    except OSError:
        return False
    try:
        if json.loads(text) == {"passed": name}:
            return True
    except ValueError:
        pass
    if not _told:
        _told.append(file)
        log.warning("%s is no record of a passed check; it is ignored and the check runs again", file)
    return False
