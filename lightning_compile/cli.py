"""The command line. COMMANDS is the one place where a command is named.

Exit status: 0 done; 1 it ran, and what was asked for does not hold (fewer sites, a wrong result, a bad machine); 2 the words of
the command line are wrong, or name no model; 3 the model does not run; 4 a package is missing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

# name -> (module, one line of help). A module has add_arguments(parser) and run(args) -> exit status, and is imported
# only when its command (or the help of it) is asked for.
COMMANDS: dict[str, tuple[str, str]] = {
    "explain": ("lightning_compile.commands.explain", "what would be rewritten in a model, and why not the rest"),
    "doctor": ("lightning_compile.commands.doctor", "versions, GPU, compilers, and packages that get in the way"),
    "demo": ("lightning_compile.demo.command", "train a small model three ways and compare them (minutes)"),
    "bench": ("lightning_compile.bench.command", "the operator beside others on this machine: table and plots (minutes)"),
    "zoo": ("lightning_compile.zoo.command", "formulations of linear attention: sites, and errors against fp64 (minutes)"),
}
STATUS = {"LE101": 1, "LE203": 1, "LE301": 2, "LE302": 3, "LE303": 4, "LE304": 2, "LE305": 2, "LE306": 2, "LE307": 2}


def parser_for(name: str | None) -> argparse.ArgumentParser:
    """The parser of the whole command line; only the arguments of command `name` are filled in."""
    from . import __version__

    parser = argparse.ArgumentParser(
        prog="lightning-compile",
        description="Causal linear attention in plain PyTorch code, found by torch.compile and run on tiled kernels.",
        epilog="Exit status: 0 done; 1 what was asked for does not hold; 2 wrong arguments; 3 the model does not run; 4 a "
               "package is missing.",
    )
    parser.add_argument("--version", action="version", version=f"lightning-compile {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for command, (module, summary) in COMMANDS.items():
        sub = commands.add_parser(command, help=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        if command == name:
            implementation = importlib.import_module(module)
            sub.description = implementation.__doc__
            implementation.add_arguments(sub)
            sub.set_defaults(implementation=implementation)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    from .errors import LightningError

    argv = list(sys.argv[1:] if argv is None else argv)
    name = next((word for word in argv if not word.startswith("-")), None)
    args = parser_for(name).parse_args(argv)
    try:
        return args.implementation.run(args)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except LightningError as e:
        print(e, file=sys.stderr)
        return STATUS.get(e.code, 1)
