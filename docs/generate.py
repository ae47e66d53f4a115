"""Writes the pages that are made from tables: python docs/generate.py

codes.md and errors.md from the tables of the package. `--check` writes nothing and fails where a page is out of date.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from lightning_compile import errors
from lightning_compile.patterns import codes

HERE = Path(__file__).resolve().parent
PAGES: dict[str, Callable[[], str]] = {"codes.md": codes.page, "errors.md": errors.page}


def main() -> int:
    stale = [name for name, page in PAGES.items() if not (HERE / name).exists() or (HERE / name).read_text() != page()]
    for name in stale if "--check" not in sys.argv else ():
        (HERE / name).write_text(PAGES[name]())
    print("\n".join(stale))
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
