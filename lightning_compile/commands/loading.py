"""Models and inputs from words of a command line."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CannotLoad
from . import hugging_face

Model = Callable[..., Any]


def model_of(args: argparse.Namespace) -> tuple[Model, Sequence[Any], dict[str, Any]]:
    """(model, inputs, keyword arguments) as the options of `explain` say.

    Raises:
        CannotLoad: what was named does not exist, or is no model.
    """
    if bool(args.model) == bool(args.hf):
        raise CannotLoad(what=args.model or "the command line", why="give either MODULE:NAME or --hf TYPE",
                         remedy="lightning-compile explain --help shows both")
    if args.hf:
        return hugging_face.model(args.hf, args.size, dict(map(setting, args.set)), args.tokens)
    model, inputs = made(args.model)
    given = tuple(map(tensor, args.shape))
    if not given and not inputs:
        raise CannotLoad(what=args.model, why="no inputs are given", remedy="give one --shape for each, e.g. --shape 2,512,64")
    return model, given or inputs, {}


def made(word: str) -> tuple[Model, Sequence[Any]]:
    """(model, the inputs that came with it) for `module:name` or `file.py:name`."""
    where, colon, name = word.rpartition(":")
    if not colon or not where or not name:
        raise CannotLoad(what=word, why="there is no colon in it", remedy="write package.module:name or file.py:name")
    try:
        thing = getattr(module(where), name)
    except (ImportError, OSError) as e:
        raise CannotLoad(what=word, why=f"{type(e).__name__}: {e}", remedy="is it spelled right, and on the path?") from e
    except AttributeError as e:
        if not str(e).startswith("module "):
            raise failed(word, e) from e
        raise CannotLoad(what=word, why=str(e), remedy="the name behind the colon must stand in the module") from e
    except Exception as e:
        raise failed(word, e) from e
    if isinstance(thing, nn.Module):
        return thing, ()
    if not callable(thing):
        raise CannotLoad(what=word, why=f"it is of type {type(thing).__name__}", remedy="name a module, a class or a function")
    required = [p for p in inspect.signature(thing).parameters.values() if p.default is p.empty and p.kind in (
        p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if required and inspect.isclass(thing):
        raise CannotLoad(what=word, why=f"it needs the arguments {[p.name for p in required]}",
                         remedy="name a function without arguments that makes it")
    if required:
        return thing, ()
    try:
        result = thing()
    except Exception as e:
        raise failed(word, e) from e
    if isinstance(result, tuple) and len(result) == 2 and callable(result[0]):
        return result[0], tuple(result[1]) if isinstance(result[1], (tuple, list)) else (result[1],)
    if not callable(result):
        raise CannotLoad(what=word, why=f"it returned something of type {type(result).__name__}",
                         remedy="return a model, or (model, inputs)")
    return result, ()


def failed(word: str, error: Exception) -> CannotLoad:
    """The user's own code raised."""
    return CannotLoad(what=word, why=f"it raised {type(error).__name__}: {error}",
                      remedy="call it in Python, which shows the traceback")


def module(where: str) -> Any:
    """A module by its name or its file."""
    if not where.endswith(".py"):
        sys.path.insert(0, "")
        try:
            return importlib.import_module(where)
        finally:
            sys.path.remove("")
    folder = str(Path(where).resolve().parent)                  # as where Python runs the file
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(Path(where).stem, where)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


def tensor(word: str) -> Tensor:
    """A random tensor for `2,512,64` or `2,512:int64`."""
    sizes, _, name = word.partition(":")
    dtype = getattr(torch, name or "float32", None)
    try:
        shape = [int(s) for s in sizes.replace("x", ",").split(",")] if sizes else []
    except ValueError:
        shape = None
    if shape is None or min(shape, default=0) < 0 or not isinstance(dtype, torch.dtype):
        raise CannotLoad(what=f"--shape {word}", why="it is no list of sizes with a dtype of torch behind a colon",
                         remedy="write 2,512,64 or 2,512:int64")
    try:
        return (torch.randn if dtype.is_floating_point or dtype.is_complex else torch.ones)(shape, dtype=dtype)
    except RuntimeError as e:                               # more than the memory holds, or a dtype without random numbers
        raise CannotLoad(what=f"--shape {word}", why=str(e).splitlines()[0], remedy="give smaller sizes, or another dtype") from e


def setting(word: str) -> tuple[str, Any]:
    """KEY=VALUE, the value as Python would read it, or as it is."""
    key, equals, value = word.partition("=")
    if not equals:
        raise CannotLoad(what=f"--set {word}", why="there is no = in it", remedy="write KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
