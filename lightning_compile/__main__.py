"""`python -m lightning_compile` is `lightning-compile`."""

import sys

from lightning_compile.cli import main

if __name__ == "__main__":
    sys.exit(main())
