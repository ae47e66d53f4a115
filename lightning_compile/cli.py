"""The command line: `lightning-compile demo` and whatever else COMMANDS names."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# name -> (module, one line of help). A module has add_arguments(parser) and run(args) -> exit status, and is imported
# only when its command (or the help of it) is asked for, so that `lightning-compile --help` does not import torch.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("lightning_compile.demo.command", "train a small model three ways and compare them (minutes)"),
    "bench": ("lightning_compile.bench.command", "the operator beside others on this machine: table and plots (minutes)"),
}


def parser_for(name: str | None) -> argparse.ArgumentParser:
    """The parser of the whole command line; only the arguments of command `name` are filled in."""
    parser = argparse.ArgumentParser(
        prog="lightning-compile",
        description="Causal linear attention in plain PyTorch code, found by torch.compile and run on tiled kernels.",
    )
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for command, (module, summary) in COMMANDS.items():
        sub = commands.add_parser(command, help=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        if command == name:
            implementation = importlib.import_module(module)
            sub.description = implementation.__doc__
            implementation.add_arguments(sub)
            sub.set_defaults(run=implementation.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = next((word for word in argv if not word.startswith("-")), None)
    args = parser_for(name).parse_args(argv)
    return args.run(args)
