"""The two checks of every match, at compile time, on small sizes in fp64 (see `check`)."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import passed
from .compat import no_hooks, no_modes
from .emit import Site, emit
from .kernels import reference
from .kernels.operator import linear_attention
from .patterns.clock import OutOfTime
from .patterns.codes import NearMiss, near_miss
from .patterns.index import Affine, Index, hint, product, same
from .patterns.match import MAX_FEATURES
from .patterns.normal_form import Leaf, Numbers, Read, Value
from .patterns.records import Key, Record
from .patterns.side_table import SideTable
from .patterns.sizes import another_value, hint_of
from .reading import whole
from .replay import computed_alike, leaf_key, leaf_keys, region, replay
from .signature import relied_sign, signature
from .small import KEPT, PAD, Sizes, Unsolvable, compared, evaluate, keep_order

TOLERANCE = 1e-7  # of fp64 results, relative to the largest element
POSITIONS = 5     # small lengths are this, plus the largest offset
WHOLE = 128       # lengths, and chunks, up to this may be checked as they are
MOST = 2**26      # multiplications of a check's brute force, but at the smallest sizes
LARGEST = 2**23   # elements of a tensor at small sizes
HEADS = 64        # batch sizes up to this may be checked as they are
MERGED = 256      # ... where no smaller ones were found
FEATURES = ((3, 4), (4, 6), (8, 8), (MAX_FEATURES, MAX_FEATURES))  # sizes of d and e, at most the user's own
DYNAMIC = 8       # the most of these where there is a dynamic number of them
UNROLLED_FEATURES = (FEATURES[0], (4, 4), FEATURES[-1])
UNROLLED_CHECKS = ("weights of positions along the states", "replay of the recorded operations, of a long loop some pieces",
                   "gradients")
CHECKS = ("normal form against operator", "gradients", "replay of the recorded operations")


class Eager:
    """Builder that runs the calls on small tensors."""

    def __init__(self, sizes: Sizes, leaves: dict[Leaf, Tensor]) -> None:
        self.sizes, self.leaves, self.device = sizes, leaves, torch.device("cpu")

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        args = tuple(torch.float64 if isinstance(a, torch.dtype) and a.is_floating_point else a for a in args)
        return function(*args, **kwargs)

    def leaf(self, leaf: Leaf) -> Tensor:
        return self.leaves[leaf]

    def size(self, x: Index) -> int:
        return self.sizes.of(x)

    def number(self, s: Any) -> Any:
        return self.sizes.number(s)

    def place(self, leaf: Leaf, axis: int, a: Affine) -> Affine:
        return self.sizes.of_axis(leaf, axis, a)

    def numbers(self, x: Any, dtype: torch.dtype) -> Tensor:
        return torch.tensor(x, dtype=torch.float64 if dtype.is_floating_point else dtype)

    def full(self, leaf: Leaf, axis: int, digits: Sequence[Index]) -> bool:
        return self.leaves[leaf].shape[axis] == product(self.sizes.of(x) for x in digits)


def check(table: SideTable, site: Site, targets: Sequence[Key]) -> NearMiss | None:
    """None if the site may be rewritten, else the check that failed.

    1. The normal form, evaluated by brute force, against the calls that are going to replace it, with the quadratic
       reference for the operator; then with the operator itself, whose gradients must be those of the normal form.
    2. The recorded operations of the user's code, run again, against the same: this does not trust the rules.
    """
    try:
        stop = set(leaf_keys(leaf for m in site.matches() for leaf in m.leaves()))
        regions = [region(table, key, stop) for key in targets]
        if not all(computed_alike(table, leaf_key(leaf), leaf_key(x)) for m in site.matches() for leaf in m.leaves()
                   for x in leaf.again):
            return near_miss("LC502", seen="tensors that were taken for one are computed in other ways")
        name = passed.name_of(signature(site, table, regions, stop))
        if passed.has_passed(name):
            return None
        with _collecting_later(), no_modes(), no_hooks(), torch.random.fork_rng(devices=()), torch.enable_grad(), \
                torch.autocast("cpu", enabled=False):
            failed = _check(table, site, targets, regions)
        if failed is None:
            passed.remember(name)
        return failed
    except NearMiss as e:
        return e
    except OutOfTime:
        raise
    except Exception as e:                                  # an error about one site leaves the others
        return _not_checkable(e)


@contextlib.contextmanager
def _collecting_later() -> Iterator[None]:
    """What a check makes is alive until it ends: there is no garbage to look for in between."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _check(table: SideTable, site: Site, targets: Sequence[Key], regions: Sequence[list[Record]]) -> NearMiss | None:
    """At small sizes; where these do not fit (features that are split somewhere else), at others; where a check fails that had
    to guess how constants shrink (a decay over a chunk is a number), with the user's own chunks, or the user's own length, if
    they are short enough; and where no small sizes are found of axes that batch and heads share, and that are split here and
    there, with the user's own of these."""
    for own in (False, True):
        failed = (_check_unrolled if site.main.unrolled else _check_closed)(table, site, targets, regions, own)
        if failed is None or failed.code != "LC503":
            break
    return failed


def _check_closed(table: SideTable, site: Site, targets: Sequence[Key], regions: Sequence[list[Record]],
                  own: bool) -> NearMiss | None:
    failed = _not_checkable(Unsolvable("no sizes were found at which it takes little time"))
    rows, alike = site.main.rows, [pair for m in site.matches() for pair in compared(m.value.terms)]
    n, chunk = (product(x.size for x in digits) for digits in (rows, rows[1:]))
    prefix = site.main.prefix if isinstance(site.main.prefix, int) else 0
    windows = any(r.described[0] == "slice_scatter" for records in regions for r in records)
    tiles = (True, False) if windows else (False,)          # windows of features that are written are as many at any size
    ways = [set[Index]()]                                   # of the digits of a position, those that keep their sizes
    if isinstance(chunk, int) and 1 < chunk <= WHOLE:
        ways.append(set(rows[1:]))
    if isinstance(n, int) and n <= WHOLE:
        ways.append(set(rows))
    for kept in ways:
        for features, in_tiles in itertools.product(FEATURES, tiles):
            if _work(site, kept, features, own) > MOST and (own or kept or features is not FEATURES[0]):
                continue
            try:
                sizes = Sizes(*_small(site, table, regions, features, kept, own), rows, n if len(kept) == len(rows) else PAD,
                              in_tiles, compared=alike, prefix=prefix)
                if _largest(site, table, sizes) > LARGEST:  # heads, say, that are as many as features
                    continue
                keep_order((t for m in site.matches() for t in m.value.terms), sizes)
                found = _compare(table, site, targets, regions, sizes)
            except (Unsolvable, RuntimeError, LookupError, ArithmeticError) as e:
                failed = _not_checkable(e)
                continue
            if found is None:
                return None
            failed = found
    return failed


def _work(site: Site, kept: Collection[Index], features: tuple[int, int], own: bool) -> int:
    """Multiplications by brute force."""
    n = product(hint(x.size) if x in kept else 4 for x in site.main.rows)
    d, e = (min(most, hint(product(x.size for x in digits))) for most, digits in zip(features, (site.main.d, site.main.e)))
    batch = product(min(hint(x.size), MERGED) for x in site.main.batch) if own else 6
    return batch * n * n * d * e


def _largest(site: Site, table: SideTable, sizes: Sizes) -> int:
    """Elements of the largest tensor that is read."""
    axes = [table.values[id(r.leaf.tensor)].axes for m in site.matches() for r in m.reads()]
    return max(map(math.prod, map(sizes.shape, axes)), default=0)


def _check_unrolled(table: SideTable, site: Site, targets: Sequence[Key], regions: Sequence[list[Record]],
                    own: bool) -> NearMiss | None:
    """A loop keeps its length. Where that is dynamic, as far as the loop has as many pieces, it is checked with two of them.
    Tensors that go on where it ends are as long as in the example."""
    from .unrolled_check import compare

    failed: NearMiss | None = None
    symbols = {s for x in site.main.rows for s in getattr(x.size, "free_symbols", ())}
    longer = {s: hint_of(s) for m in site.matches() for r in m.reads() for a, n in zip(r.index, r.leaf.shape)
              if set(a.coef) & {*m.i, *m.j} or not a.coef for s in getattr(n, "free_symbols", ())}
    lengths = [longer | {s: hint_of(s) for s in symbols}] + [longer | {s: another_value(s) for s in symbols}] * bool(symbols)
    for features in UNROLLED_FEATURES:
        for length in lengths:
            try:
                small = _small(site, table, regions, features, site.main.rows, own, length)
                failed = compare(table, site, targets, regions, Sizes(*small, pad=None, tiles=features[0] != MAX_FEATURES))
            except (Unsolvable, RuntimeError, LookupError, ArithmeticError) as e:
                failed = _not_checkable(e)
            if failed is not None:
                break
        if failed is None:
            return None
    return failed


def _not_checkable(e: Exception) -> NearMiss:
    return near_miss("LC503", seen=f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"[:200])


def _compare(table: SideTable, site: Site, targets: Sequence[Key], regions: Sequence[list[Record]],
             sizes: Sizes) -> NearMiss | None:
    leaves = random_leaves(site, table, sizes)
    builder = Eager(sizes, leaves)
    shapes = [sizes.shape(m.value.axes) for m in site.matches()]
    plain = [None] * len(shapes)
    read = leaves | {f: whole(builder, f) for m in site.matches() for f in m.value.leaves() if not f.held}
    wanted = [evaluate(m.value, m.value.terms, sizes, read) for m in site.matches()]
    by_reference = emit(builder, [builder] * len(shapes), site, reference.linear_attention, shapes, plain)
    by_operator = emit(builder, [builder] * len(shapes), site, linear_attention, shapes, plain)
    for w, r, o in zip(wanted, by_reference, by_operator):
        for name, x in (("reference", r), ("operator", o)):
            if (error := difference(w, x)) > TOLERANCE:
                return near_miss("LC501", seen=f"the {name} is off by {error:.1e}")
    if (error := difference_of_gradients(leaves, wanted, by_operator, table, sizes)) > TOLERANCE:
        return near_miss("LC501", seen=f"a gradient is off by {error:.1e}")
    inputs = {key: leaves[leaf].detach().to(_replayed(leaf.tensor.dtype)) for key, leaf in leaf_keys(leaves).items()}
    with torch.no_grad():
        for key, records, r in zip(targets, regions, by_reference):
            x = replay(records, key, inputs, table, sizes)
            if (error := difference(x, r)) > TOLERANCE:
                return near_miss("LC502", seen=f"off by {error:.1e}")
    return None


def _replayed(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.bool else torch.float64


def difference_of_gradients(leaves: Mapping[Leaf, Tensor], wanted: Sequence[Tensor], found: Sequence[Tensor],
                            table: SideTable, sizes: Sizes) -> float:
    """The largest of the differences between the gradients of two computations; along the digits in which a leaf is the same
    everywhere, what counts is their sum."""
    operands = {leaf: x for leaf, x in leaves.items() if x.requires_grad}
    cotangents = [torch.randn_like(w) for w in wanted]
    most = 0.0
    for (leaf, x), e, f in zip(operands.items(), *(_gradients(o, [*operands.values()], cotangents) for o in (wanted, found))):
        e, f = (torch.zeros_like(x) if g is None else g for g in (e, f))
        if leaf.flat:
            digits = [y for axis in table.values[id(leaf.tensor)].axes for y in axis]
            flat = [n for n, y in enumerate(digits) if y in leaf.flat]
            e, f = (g.reshape([sizes.of(y) for y in digits]).sum(flat) for g in (e, f))
        most = max(most, difference(e, f))
    return most


def _gradients(outs: Sequence[Tensor], operands: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """None where an operand has none; detached outputs give none."""
    used = [(x, g) for x, g in zip(outs, cotangents) if x.requires_grad]
    if not used:
        return [None] * len(operands)
    return torch.autograd.grad([x for x, _ in used], operands, [g for _, g in used], allow_unused=True)


def difference(a: Tensor, b: Tensor) -> float:
    """Relative to the largest element; infinite for other shapes and for NaN."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.detach().double(), b.detach().double()
    error = float((a - b).abs().max()) / max(float(a.abs().max()), 1e-30)
    return error if error == error else float("inf")


def _small(site: Site, table: SideTable, regions: Sequence[list[Record]], features: tuple[int, int], kept: Collection[Index],
           own: bool, length_symbols: Mapping[Any, int] | None = None) -> tuple[dict[Index, int], set[Index], dict[Any, int]]:
    """Distinct small sizes for the variables of the site, but for the digits of a position that are `kept`; all variables of
    its regions; values for the symbols, those of a loop's length as given. `own`: batch sizes are the user's own."""
    offsets = [abs(c) for m in site.matches() for t in m.value.terms for e in t.indicators
               if isinstance(c := e.const, int)]
    offsets += [abs(a.const) for m in site.matches() for r in (*m.q, *m.k, *m.v) for a in r.index
                if isinstance(a.const, int) and set(a.coef) & {*m.i, *m.j}]
    length = POSITIONS + max([c for c in offsets if c < 64], default=0)
    given: dict[Index, int] = {}
    symbols: dict[Any, int] = dict(length_symbols or {})
    if not all(isinstance(x.size, int) for x in (*site.main.d, *site.main.e)):
        features = min(features[0], DYNAMIC), min(features[1], DYNAMIC)

    def choose(x: Index, n: int) -> None:
        if x in given:
            return
        symbol = next((s for s in symbols if same(s, x.size)), None) if not isinstance(x.size, int) else None
        if symbol is not None:
            given[x] = symbols[symbol]
            return
        given[x] = n if not isinstance(x.size, int) else min(n, x.size)
        if not isinstance(x.size, int) and getattr(x.size, "is_Symbol", False):
            symbols[x.size] = given[x]
        elif not isinstance(x.size, int):
            del given[x]                                    # follows from its symbols

    main = site.main
    for x in {x for g in main.decay for x in g.over} | _tabulated(site):
        if isinstance(x.size, int):
            choose(x, x.size)                               # tables of numbers belong to their size
    numbered = _numbered(regions) if len(main.rows) > 1 else set()
    for depth, x in enumerate(reversed(main.rows)):
        if x in kept or x.first in numbered or len(main.rows) > 1 and isinstance(x.size, int) and x.size <= KEPT:
            choose(x, hint(x.size, symbols))
        else:
            choose(x, length if len(main.rows) == 1 else (4, 3, 2)[depth % 3])
    for x in main.d:
        side_by_side = [own for r in main.q if x in r.index[-1].coef and len(r.leaf.parts) > 1 for _, _, own in r.leaf.parts]
        for y in {y for own in side_by_side for y in own}:
            choose(y, features[0])
        choose(x, sum(product(given[y] for y in own) for own in side_by_side) or features[0])
    for x in main.e:
        choose(x, features[1])
    offset = {x for m in site.matches() for r in m.reads() for a in r.index if a.const != 0 for x in a.coef}
    for p, x in enumerate(reversed(main.batch)):
        # q, k and v in one projection, [3, heads, features]: their offsets are multiples of the number of heads
        keep = isinstance(x.size, int) and x.size <= (MERGED if own else HEADS if x in offset else 0)
        digits = _finest(x) if not keep and x not in given else [x]
        for q, y in enumerate(digits):                      # batch and heads on one axis: it is what they are together
            choose(y, x.size if keep else (2, 3)[(p + q) % 2])
    given.update({y: given[x] for m in site.matches() for x, y in m.ends if x in given})
    if isinstance(main.prefix, int) and main.prefix and main.i[0] in given:
        given[main.j[0]] = given[main.i[0]] + main.prefix
    universe = set[Index]()
    for records in regions:                                 # variables of sums are tied to those of axes
        for r in records:
            for v in r.values:
                universe.update(*v.axes)
    universe |= {x for m in site.matches() for leaf in m.leaves() for axis in table.values[id(leaf.tensor)].axes for x in axis}
    universe |= {x for m in site.matches() for x in _variables(m.value)}
    universe |= {x for m in site.matches() for _, v in m.made() for x in _variables(v)}
    for x in universe:
        for s in getattr(x.size, "free_symbols", ()):
            symbols.setdefault(s, 2 + len(symbols))
    return given, universe, symbols


def _numbered(regions: Sequence[list[Record]]) -> set[Index]:
    """Variables, by their first names, that run over tensors which were put side by side one by one, or over windows that were
    written so: there are as many at any sizes."""
    at = {"stack": 1, "select_scatter": 2, "slice_scatter": 2}  # the place of their argument `dim`
    found = set[Index]()
    for r in (r for records in regions for r in records):
        if (name := r.described[0]) not in at:
            continue
        dim = r.args[at[name]] if len(r.args) > at[name] else r.kwargs.get("dim", 0)
        axis = r.values[0].axes[dim % len(r.values[0].axes)]
        if name != "slice_scatter":
            found |= {x.first for x in axis if isinstance(x.size, int)}
        elif len(r.args) > 4 and type(r.args[3]) is type(r.args[4]) is int:
            window = r.args[4] - r.args[3]                  # of the axis, or of a part of it, the number of windows
            whole = [y for x in axis for y in x.tied]
            parts = [z for y in whole for z in y.parents if z.window is not None and z.window[0] is y]
            found |= {group[0].first for y in (*whole, *parts) for z in y.tied for group in z.splits
                      if isinstance(group[0].size, int) and same(group[0].size * window, z.size)}
    return found | {z.first for x in found for y in x.tied for z in y.parents if z.window is not None and z.window[0] is y}


def _finest(x: Index, above: frozenset[Index] = frozenset()) -> list[Index]:
    """The digits that a variable falls into, or the variable itself."""
    above = above | {x}
    parts = next((group for group in x.splits if group and not above.intersection(group)), ())
    return [z for y in parts for z in _finest(y, above)] or [x]


def _tabulated(site: Site) -> set[Index]:
    """Batch variables that a table of numbers is read at."""
    found = set()
    for m in site.matches():
        for t in m.value.terms:
            for e in t.exponent:
                found |= {x for f in e.factors if isinstance(f, Numbers) for x in f.at.coef}
                found |= {x for n in e.exponent for x in n.free()}
    return found & set(site.main.batch)


def _variables(v: Value) -> set[Index]:
    found = v.variables()
    for t in v.terms:
        found.update(t.bound)
        for f in t.factors:
            for at in f.index if isinstance(f, Read) else (f.at,):
                found.update(at.coef)
        for at in t.indicators:
            found.update(at.coef)
        for e in t.exponent:
            found |= e.free()
    return found


def _truths(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Truth values of both kinds; the first along each axis is true, for a sum over nothing may be what is divided by."""
    x = torch.rand(tuple(shape), generator=generator, dtype=torch.float64) < 0.7
    for axis in range(x.dim()):
        x.narrow(axis, 0, min(1, x.shape[axis])).fill_(True)
    return x.double()


def _masked_numbers(v: Value) -> bool:
    """Whether a leaf is numbers under a mask, of which some are told from others: no tensors."""
    return not v.leaves() and v.masked is None and any(t.indicators for t in v.terms)


def _flat(x: Tensor, axes: Sequence[tuple[Index, ...]], flat: Collection[Index], sizes: Sizes) -> Tensor:
    """Numbers that are the same everywhere along the digits `flat`."""
    digits = [y for axis in axes for y in axis]
    whole = x.reshape([sizes.of(y) for y in digits])
    for n, y in enumerate(digits):
        if y in flat:
            whole = whole.narrow(n, 0, 1).expand_as(whole)
    return whole.reshape(x.shape).clone()


def random_leaves(site: Site, table: SideTable, sizes: Sizes) -> dict[Leaf, Tensor]:
    """A leaf read through a function (reciprocal) keeps away from zero."""
    generator = torch.Generator().manual_seed(0)
    leaves: dict[Leaf, Tensor] = {}
    functions = {r.leaf for m in site.matches() for r in m.reads() if r.function}
    for m in site.matches():
        for r in m.reads():
            if r.leaf not in leaves:
                shape = sizes.shape(table.values[id(r.leaf.tensor)].axes)
                x = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
                if r.leaf.unit:
                    x = x / 2                               # between a quarter and three quarters
                elif r.leaf.falling:
                    x = -x
                elif not (r.leaf.positive or r.leaf in functions):
                    x = x * (torch.randint(0, 2, shape, generator=generator) * 2 - 1)
                if r.leaf.flat:
                    x = _flat(x, table.values[id(r.leaf.tensor)].axes, r.leaf.flat, sizes)
                if sign := relied_sign(r.leaf):
                    x = x.abs() * sign
                if (numbers := r.leaf.definition) is not None and _masked_numbers(numbers):
                    leaves[r.leaf] = evaluate(numbers, numbers.terms, sizes, {})
                    continue
                truth = r.leaf.tensor.dtype == torch.bool
                leaves[r.leaf] = _truths(shape, generator) if truth else x.requires_grad_()
    for leaf in {f for m in site.matches() for f in m.value.leaves() if f.held} - set(leaves):
        shape = sizes.shape(table.values[id(leaf.tensor)].axes)
        x = torch.rand(shape, generator=generator, dtype=torch.float64)
        leaves[leaf] = (-x if leaf.falling else x).requires_grad_()
    return leaves
