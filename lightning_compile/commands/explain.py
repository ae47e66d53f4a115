"""Shows what the backend would make of a model: which sites it would rewrite, which not, and why. Compiles nothing for the
device and runs none of the model's operations.

The model is `package.module:name` or `file.py:name`, where the name is a module, a class that can be made without arguments,
a function without arguments that returns a model or (model, inputs), or a function of tensors. Or, with --hf, the type of a
model in transformers: `--hf mamba2`.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CannotTrace, from_one, writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lightning-compile explain`."""
    parser.add_argument("model", nargs="?", metavar="MODULE:NAME", help="the model, or what makes it")
    parser.add_argument("--shape", action="append", default=[], metavar="N,N,...[:DTYPE]",
                        help="one input; once for each (2,512,64 or 2,512:int64)")
    parser.add_argument("--hf", metavar="TYPE", help="a model type of transformers, with random weights")
    parser.add_argument("--size", choices=("tiny", "default"), default="tiny", help="with --hf: the size of the model")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="with --hf: a setting of the model")
    parser.add_argument("--tokens", type=int, default=512, help="with --hf: length of the input")
    parser.add_argument("--when", choices=("profitable", "always"), default="profitable", help="as in the backend's options")
    parser.add_argument("--min-rewrites", type=int, metavar="N", help="exit status 1 if fewer sites would be rewritten")
    parser.add_argument("--snapshot", type=Path, metavar="FILE", help="exit status 1 if a site of this file is lost")
    parser.add_argument("--update-snapshot", action="store_true", help="write the snapshot instead of comparing with it")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write the report as a page")
    parser.add_argument("--repro", type=Path, metavar="FOLDER", help="also write a script for each site")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """The command; errors have exit statuses of their own, see `lightning_compile.cli`."""
    import lightning_compile

    from . import loading

    from_one("--tokens", args.tokens)
    with working(args.hf or args.model or "", quiet=args.json):
        model, inputs, keywords = loading.model_of(args)
        try:
            report = lightning_compile.explain(model, *inputs, options={"when": args.when}, **keywords)
        except Exception as e:
            why = str(e).strip().splitlines()[0] if str(e).strip() else "no message"
            raise CannotTrace(why=f"{type(e).__name__}: {why}") from e
    if args.json:
        print(report.to_json())
    else:
        show(report)
    written = [report.to_html(args.html)] if args.html else []
    if args.repro:
        writable(args.repro)
        written += [report.save_repro(c, args.repro / f"site{n}.py") for n, c in enumerate(report, 1)
                    if c.detail is not None and c.detail.script]
    for path in written:
        print(f"written: {path}", file=sys.stderr)
    report.check(min_rewrites=args.min_rewrites, snapshot=args.snapshot, update=args.update_snapshot)
    return 0


def show(report: Any) -> None:
    """With colours where there are any."""
    from rich.console import Console

    if sys.stdout.isatty():
        Console().print(report)
    else:
        print(report)


@contextlib.contextmanager
def working(what: str, quiet: bool) -> Iterator[None]:
    """A sign of life on a terminal, for what may take a minute."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(f"tracing {what}") if console.is_terminal and not quiet else contextlib.nullcontext():
        yield


