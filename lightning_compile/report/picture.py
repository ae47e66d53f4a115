"""Sketches as SVG: layers from top to bottom, neighbours near each other. Colours are the page's."""

from __future__ import annotations

from html import escape

import networkx as nx

from .candidate import Sketch, SketchNode

WIDE, HIGH, ACROSS, DOWN = 168, 42, 16, 34  # of a box, and between boxes, in pixels


def svg(sketch: Sketch, title: str) -> str:
    """One picture, as an inline element."""
    nodes = {n.name: n for n in sketch.nodes}
    graph = nx.DiGraph()
    graph.add_nodes_from(nodes)
    graph.add_edges_from((m, n.name) for n in sketch.nodes for m in n.inputs if m in nodes)
    rows = _rows(graph)
    place = {name: (row, column) for row, names in enumerate(rows) for column, name in enumerate(names)}
    most = max(map(len, rows), default=1)
    width, height = most * (WIDE + ACROSS) + ACROSS, len(rows) * (HIGH + DOWN) + DOWN

    def corner(name: str) -> tuple[float, float]:
        row, column = place[name]
        left = (width - len(rows[row]) * (WIDE + ACROSS) + ACROSS) / 2
        return left + column * (WIDE + ACROSS), DOWN / 2 + row * (HIGH + DOWN)

    lines = [_edge(corner(a), corner(b)) for a, b in graph.edges]
    boxes = [_box(n, *corner(n.name)) for n in sketch.nodes]
    return (f'<svg role="img" aria-label="{escape(title)}" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" xmlns="http://www.w3.org/2000/svg">{"".join(lines + boxes)}</svg>')


def _rows(graph: nx.DiGraph) -> list[list[str]]:
    """Layers by the longest way to the result, so that what is read stands just above where it is read; each ordered by the
    mean place of what it is joined to, down and up a few times."""
    depth: dict[str, int] = {}
    for name in reversed(list(nx.topological_sort(graph))):
        depth[name] = max((depth[m] + 1 for m in graph.successors(name)), default=0)
    last = max(depth.values(), default=0)
    rows: list[list[str]] = [[] for _ in range(last + 1)]
    for name in graph.nodes:
        rows[last - depth[name]].append(name)
    for turn in range(6):
        down = turn % 2 == 0
        place = {name: i - len(row) / 2 for row in rows for i, name in enumerate(row)}
        for row in rows if down else reversed(rows):
            joined = graph.predecessors if down else graph.successors
            mean = {name: _mean([place[m] for m in joined(name)], place[name]) for name in row}
            row.sort(key=mean.__getitem__)
            place.update({name: i - len(row) / 2 for i, name in enumerate(row)})
    return rows


def _mean(places: list[float], otherwise: float) -> float:
    return sum(places) / len(places) if places else otherwise


def _edge(a: tuple[float, float], b: tuple[float, float]) -> str:
    x, y, u, v = a[0] + WIDE / 2, a[1] + HIGH, b[0] + WIDE / 2, b[1]
    half = (y + v) / 2
    return f'<path class="edge" d="M{x:.0f} {y:.0f} C{x:.0f} {half:.0f} {u:.0f} {half:.0f} {u:.0f} {v - 1:.0f}"/>'


def _box(n: SketchNode, x: float, y: float) -> str:
    what, _, shape = n.label.partition("\n")
    middle = x + WIDE / 2
    return (f'<g class="{n.kind}"><title>{escape(n.name)}: {escape(what)} {escape(shape)}</title>'
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{WIDE}" height="{HIGH}" rx="6"/>'
            f'<text x="{middle:.0f}" y="{y + 17:.0f}">{escape(_short(what))}</text>'
            f'<text class="shape" x="{middle:.0f}" y="{y + 33:.0f}">{escape(_short(shape))}</text></g>')


def _short(text: str, most: int = 27) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
