"""`python -m lightning_compile` is `lightning-compile`."""

import sys
from pathlib import Path

from lightning_compile.cli import main

if __name__ == "__main__":
    if Path(sys.path[0], __package__) == Path(__file__).parent:  # in the repository its other folders are no packages of others
        del sys.path[0]
    sys.exit(main())
