"""Every error that this package raises on purpose: a code, what was seen, what to do.

Each class is one error and holds its text. `docs/errors.md` is generated from here and from the operator's own
(`kernels/errors.py`) by `docs/generate.py`.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator

from .kernels.errors import OPERATOR_ERRORS, Coded


class LightningError(Coded):
    """Base of all errors of this package but the operator's."""


class TooFewRewrites(LightningError, RuntimeError):
    """Fewer sites were rewritten than `min_rewrites` asks for."""

    code = "LE101"
    seen = "min_rewrites is {wanted}, but {found} site(s) of a graph were rewritten"
    advice = "the report says why each candidate was left as it is; lightning_compile.explain(model, *inputs) says more.{report}"


class UnknownOption(LightningError, ValueError):
    """An option that neither this backend nor Inductor has."""

    code = "LE102"
    seen = "unknown option {name!r}"
    advice = "known are lightning's {ours} and Inductor's {inductors}"


class WrongOption(LightningError, ValueError):
    """A value that an option does not take."""

    code = "LE103"
    seen = "option {name!r} is {value!r}"
    advice = "it must be {allowed}"


class UnknownArgument(LightningError, TypeError):
    """A keyword argument that the backend does not take."""

    code = "LE104"
    seen = "backend 'lightning' was called with {names}"
    advice = "it takes mode= and options=; put settings into options={{...}}"


class NoSuchSite(LightningError, IndexError):
    """A number that no row of the report has."""

    code = "LE201"
    seen = "site {site} was asked for, and the report has {number}"
    advice = "sites are numbered from 1, as in the printed report"


class NothingToSave(LightningError, ValueError):
    """A candidate without a graph to write down."""

    code = "LE202"
    seen = "the candidate at {where} has no script"
    advice = ("make the report with lightning_compile.explain(model, *inputs); candidates that call graphs of their own, and "
              "errors of the pass, have none")


class ReportMismatch(LightningError, AssertionError):
    """`Report.check` found less than it was asked for."""

    code = "LE203"
    seen = "{complaints}"
    advice = "{remedy}"



class CannotLoad(LightningError, ValueError):
    """The command line was given a model that cannot be made."""

    code = "LE301"
    seen = "{what!r} gives no model: {why}"
    advice = "{remedy}"


class UnknownShape(LightningError, ValueError):
    """`lightning-compile bench` was asked for a shape that it does not have."""

    code = "LE304"
    seen = "there is no shape or set of shapes {name!r}"
    advice = "there are the shapes A to E and the sets {sets}"


class UnknownPeer(LightningError, ValueError):
    """`lightning-compile bench` was asked for an implementation that it does not know."""

    code = "LE305"
    seen = "there is no peer {names}"
    advice = "there are {peers}; names are separated by semicolons"


class CannotTrace(LightningError, RuntimeError):
    """The model that the command line was given does not run."""

    code = "LE302"
    seen = "the model could not be traced: {why}"
    advice = "call it once in eager mode with the same inputs and see whether it runs; --shape gives one input each"


class MissingPackage(LightningError, ImportError):
    """A command needs a package that is not installed."""

    code = "LE303"
    seen = "{command} needs {package}, which is not installed"
    advice = "run: pip install {package}"


class WrongWord(LightningError, ValueError):
    """A word of the command line that makes no sense here."""

    code = "LE306"
    seen = "{word} was given, but {why}"
    advice = "{remedy}"


class CannotWrite(LightningError, OSError):
    """A file that was asked for could not be written."""

    code = "LE307"
    seen = "{path} could not be written: {why}"
    advice = "name a file in a folder that is there and may be written to"


ERRORS = (TooFewRewrites, UnknownOption, WrongOption, UnknownArgument, NoSuchSite, NothingToSave, ReportMismatch, CannotLoad,
          CannotTrace, MissingPackage, UnknownShape, UnknownPeer, WrongWord, CannotWrite)


def on_this_machine(device: str | None) -> None:
    """WrongWord where a command is to run on a GPU that is not there."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise WrongWord(word="--device cuda", why="torch sees no GPU here",
                        remedy="leave it out, or see what lightning-compile doctor says")


def from_one(word: str, number: int) -> None:
    """WrongWord where an option is to be a number of something, and there are none."""
    if number < 1:
        raise WrongWord(word=f"{word} {number}", why="that is less than 1", remedy="give 1 or more")


def writable(folder: pathlib.Path) -> None:
    """Makes a folder for what is going to be written there: CannotWrite before the work and not after it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def writing(path: os.PathLike[str]) -> Iterator[None]:
    """Within it, what the system says against writing is a CannotWrite."""
    try:
        yield
    except OSError as e:
        raise CannotWrite(path=path, why=e.strerror or e) from e


def page() -> str:
    """docs/errors.md."""
    lines = ["# Errors", "",
             "Every error that is raised on purpose: what was seen, and what to do. Why a candidate was not rewritten is no "
             "error; that has [codes](codes.md) of its own. This page is generated: "
             "`python docs/generate.py`.", ""]
    for error in (*ERRORS, *OPERATOR_ERRORS):
        bases = ", ".join(f"`{b.__name__}`" for b in error.__mro__[1:] if b.__module__ == "builtins" and b not in (
            object, BaseException, Exception))
        lines += [f"## {error.code}: {error.__name__}", "", f"Seen: {_quoted(error.seen)}.", "",
                  f"What to do: {_quoted(error.advice)}.", "", f"It is also a {bases}.", ""]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """Fields in braces as words; the report at the end of one is no part of what it says."""
    text = text.removesuffix("{report}").removesuffix(".")
    if not re.sub(r"[{]\w+(![rs])?[}]", "", text):
        return "the message says"
    return re.sub(r"[{](\w+)(![rs])?[}]", r"*\1*", text.replace("{{", "").replace("}}", ""))
