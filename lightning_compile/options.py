"""The options of `torch.compile(backend="lightning", options=...)`: ours, checked here, and Inductor's, checked by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from . import compat
from .errors import UnknownOption, WrongOption

When = Literal["profitable", "always"]
Verify = Literal["off", "compile", "run"]


@dataclass(frozen=True)
class Options:
    """`when`: rewrite where the cost model says that it pays, or wherever it is right. `min_rewrites`: the least number of
    sites in a graph. `verify`: check matches while compiling, or also compare with the original on real inputs. `time_limit`:
    seconds that the pass may take for a graph, not counting layers like one with an attention; what is not decided by then is
    left as it is."""

    when: When = "profitable"
    min_rewrites: int = 0
    verify: Verify = "compile"
    time_limit: float = 10.0

    def __post_init__(self) -> None:
        for name, choices in (("when", get_args(When)), ("verify", get_args(Verify))):
            if getattr(self, name) not in choices:
                raise WrongOption(name=name, value=getattr(self, name), allowed=f"one of {list(choices)}")
        if isinstance(self.min_rewrites, bool) or not isinstance(self.min_rewrites, int) or self.min_rewrites < 0:
            raise WrongOption(name="min_rewrites", value=self.min_rewrites, allowed="a number of sites, 0 or more")
        if isinstance(self.time_limit, bool) or not isinstance(self.time_limit, (int, float)) or not self.time_limit > 0:
            raise WrongOption(name="time_limit", value=self.time_limit, allowed="a number of seconds, more than 0")


NAMES = tuple(f.name for f in fields(Options))


def split(options: Mapping[str, Any] | None) -> tuple[Options, dict[str, Any]]:
    """(ours, Inductor's). ValueError for a value that is none of ours."""
    if not isinstance(options, (Mapping, type(None))) or not all(isinstance(name, str) for name in options or {}):
        raise WrongOption(name="options", value=options, allowed="a dictionary with names")
    rest = dict(options or {})
    return Options(**{name: rest.pop(name) for name in NAMES if name in rest}), rest


def inductor_config(mode: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """What Inductor makes of a mode and its options. ValueError, with all known names, for one that nobody knows."""
    known = compat.inductor_names()
    unknown = [name for name in options if name.replace("-", "_") not in known]
    if unknown:
        raise UnknownOption(name=unknown[0], ours=list(NAMES), inductors=sorted(known))
    return compat.inductor_settings(mode, options)
