"""What this package is made of, as a number for the keys of caches."""

from __future__ import annotations

import functools
import hashlib
import secrets
from pathlib import Path


@functools.cache
def source_hash() -> str:
    """Of all our sources: a changed kernel or rule must not meet what was cached by the old one. Where they cannot be read, a
    number of this process: nothing that is cached counts then."""
    from . import __path__ as folders

    digest = hashlib.sha256()
    here = Path(folders[0])
    roots = [here] if (here / "patterns").is_dir() else [here, here.parent / "patterns", here.parent / "kernels"]
    files = [file for root in roots for file in sorted(root.rglob("*.py"))]
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest() if files else secrets.token_hex()
