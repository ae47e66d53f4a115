"""The report as one page that needs nothing beside it."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

import torch
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from . import picture, text
from .candidate import Sketch

if TYPE_CHECKING:
    from .report import Report


def page(report: Report) -> str:
    """The whole page."""
    from .. import __version__

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8"))
    return template.render(report=report, version=__version__, torch=torch.__version__, svg=_svg, short=text.short,
                           estimated=text.estimated)


def _svg(sketch: Sketch, title: str) -> Markup:
    return Markup(picture.svg(sketch, title))  # it escapes what it writes
