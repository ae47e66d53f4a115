"""Laws of axes: views, broadcasts, slices, pads and flips only rename, split or shift index variables."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .conditions import always, never
from .index import Affine, Index, Size, Unknown, divide, mixed_radix, product, same, var
from .normal_form import Axes, Term, Value, rename
from .sizes import at_most


def refine(xs: Sequence[Index], ys: Sequence[Index]) -> tuple[list[list[Index]], list[list[Index]]]:
    """Common refinement of two row-major lists of variables that cover ranges of the same length: for each variable of
    either list the finer variables that make it up. No floor and no modulo: sizes must divide."""
    gx: list[list[Index]] = [[] for _ in xs]
    gy: list[list[Index]] = [[] for _ in ys]
    i, j = len(xs) - 1, len(ys) - 1
    a: Size = xs[i].size if xs else 1
    b: Size = ys[j].size if ys else 1
    while i >= 0 and j >= 0:
        if same(a, b):
            new, a, b = Index(a), 1, 1
        elif (q := divide(a, b)) is not None:
            new, a, b = Index(b), q, 1
        elif (q := divide(b, a)) is not None:
            new, a, b = Index(a), 1, q
        else:
            raise Unknown(f"axes of sizes {a} and {b} have no common split")
        gx[i].insert(0, new)
        gy[j].insert(0, new)
        if same(a, 1):
            i -= 1
            a = xs[i].size if i >= 0 else 1
        if same(b, 1):
            j -= 1
            b = ys[j].size if j >= 0 else 1
    if i >= 0 or j >= 0:
        raise Unknown("axes cover ranges of different lengths")
    for olds, groups in ((xs, gx), (ys, gy)):
        for x, group in zip(olds, groups):
            x.split(group)
    return gx, gy


def regroup(v: Value, xs: Sequence[Index], groups: Sequence[Sequence[Index]]) -> Value:
    """v with each variable of xs replaced by its group of finer ones."""
    finer = dict(zip(xs, groups))
    axes = tuple(tuple(n for x in axis for n in finer.get(x, (x,))) for axis in v.axes)
    return v.substitute({x: mixed_radix(g) for x, g in finer.items()}, axes)


def grouped(xs: Sequence[Index], sizes: Sequence[Size]) -> list[tuple[Size, ...]]:
    """Sizes in as many groups as there are variables, each of which multiplies to the size of its own, or empty."""
    found: list[tuple[Size, ...]] = []
    left = list(sizes)
    for x in reversed(xs):
        group: list[Size] = []
        while left and not (group and same(product(group), x.size)):
            group.insert(0, left.pop())
        found.insert(0, tuple(group))
    return found if not left and all(same(product(g), x.size) for g, x in zip(found, xs)) else []


def align(*values: Value) -> tuple[Axes, list[Value]]:
    """Broadcasts: the values over one set of axes. Variables are renamed first, since a value may meet itself."""
    rank = max(len(v.axes) for v in values)
    vs = []
    for v in values:
        new = {x: rename(x) for axis in v.axes for x in axis}
        axes = ((),) * (rank - len(v.axes)) + tuple(tuple(new[x] for x in axis) for axis in v.axes)
        vs.append(v.substitute({x: var(n) for x, n in new.items()}, axes))
    for p in range(rank):
        ref: int | None = None
        for k in range(len(vs)):
            if not vs[k].axes[p]:
                continue
            if ref is None:
                ref = k
                continue
            xs, ys = vs[ref].axes[p], vs[k].axes[p]
            if len(xs) == len(ys) == 1 and same(xs[0].size, ys[0].size):
                ys[0].split(xs)
                vs[k] = vs[k].substitute({ys[0]: var(xs[0])}, vs[k].axes[:p] + (xs,) + vs[k].axes[p + 1:])
                continue
            gx, gy = refine(xs, ys)
            vs[k] = regroup(vs[k], ys, gy)
            for m in range(k):
                if vs[m].axes[p]:
                    vs[m] = regroup(vs[m], xs, gx)
    axes = tuple(next((v.axes[p] for v in vs if v.axes[p]), ()) for p in range(rank))
    return axes, [replace(v, axes=axes) for v in vs]


def tie_axes(axes: Sequence[tuple[Index, ...]], others: Sequence[tuple[Index, ...]]) -> None:
    """Axes that run over the same elements have the same size, whatever it is."""
    for xs, ys in zip(axes, others):
        if len(xs) == 1 and ys and same(xs[0].size, product(y.size for y in ys)):
            xs[0].split(ys)


def reshape(v: Value, sizes: Sequence[Size]) -> Value:
    wanted = [() if same(s, 1) else (Index(s),) for s in sizes]
    target = [x for axis in wanted for x in axis]
    source = [x for axis in v.axes for x in axis]
    ends = [product(x.size for x in digits[-2:]) for digits in (source, target)]
    if len(target) > 1 and same(*ends) and (found := _skewed(v, source, *target[-2:])) is not None:
        v, source = found, [x for axis in found.axes for x in axis]
    gx, gy = refine(source, target)
    w = regroup(v, source, gx)
    groups = iter(gy)
    return replace(w, axes=tuple(tuple(next(groups)) if axis else () for axis in wanted))


def _skewed(v: Value, digits: Sequence[Index], i: Index, c: Index) -> Value | None:
    """v with its last two digits (a, b) replaced by (i, c), all along one axis, where rows are one place shorter or longer than
    they were: element i (P - 1) + c of rows of P is c - i of row i, or c - i + P of the row before. So a row that is repeated
    becomes a table by distances (Toeplitz). None where sizes are no such, or a tensor is read along these rows."""
    if len(digits) < 2 or same(i.size, 1) or same(c.size, 1):
        return None
    (a, b), inner = digits[-2:], digits[-1].size
    shorter = next((n for n in (1, -1) if same(inner - c.size, n)), 0)
    if not shorter or not at_most(i.size, inner) or not at_most(i.size * c.size, a.size * inner) or v.masked is not None or \
            any({a, b} & r.variables() for t in v.terms for u in (t, *t.exponent) for r in u.reads()):
        return None
    c.slice_of(b, 0, 1) if shorter > 0 else rename(b).slice_of(c, 0, 1)
    if same(i.size, a.size):
        i.split((a,))
    else:
        rename(a).pad_to(i, 0) if at_most(a.size, i.size) else i.slice_of(a, 0, 1)
    here = Affine(0, {c: 1, i: -shorter})
    outside = -here if shorter > 0 else here.shift(1 - inner)
    axes = tuple(tuple(x for x in axis if x not in (a, b)) + ((i, c) if b in axis else ()) for axis in v.axes)
    terms: list[Term] = []
    for other in (0, shorter):
        w = v.substitute({a: var(i).shift(-other), b: here.shift(other * inner)}, axes)
        holds = outside if other == 0 else Affine(1) - outside
        terms += [replace(t, indicators=t.indicators | {holds}) for t in w.terms]
    return _inside(Value(axes, tuple(terms)), {i, c})


def permute(v: Value, order: Sequence[int]) -> Value:
    return replace(v, axes=tuple(v.axes[d] for d in order))


def insert(v: Value, dim: int) -> Value:
    return replace(v, axes=v.axes[:dim] + ((),) + v.axes[dim:])


def remove(v: Value, dim: int) -> Value:
    return replace(v, axes=v.axes[:dim] + v.axes[dim + 1:])


def expand(v: Value, sizes: Sequence[Size]) -> Value:
    axes = ((),) * (len(sizes) - len(v.axes)) + v.axes
    return replace(v, axes=tuple(x if x or same(s, 1) else (Index(s),) for x, s in zip(axes, sizes)))


def window(v: Value, dim: int, start: Size, step: int, length: Size) -> Value:
    """The slice start, start + step, ... of `length` elements along `dim`."""
    axis = v.axes[dim]
    if not axis:
        return v
    if same(product(x.size for x in axis), length) and step == 1:
        return v
    if len(axis) > 1:
        return _outer_window(v, dim, start, step, length)
    old, new = axis[0], Index(length)
    single = same(length, 1)
    new.slice_of(old, start, step)
    at = Affine(start) if single else Affine(start, {new: step})
    return _inside(v.substitute({old: at}, v.axes[:dim] + (() if single else (new,),) + v.axes[dim + 1:]), {new})


def _inside(v: Value, new: set[Index]) -> Value:
    """Without terms that a window leaves out, as those of others that were put beside it, and without conditions that only say
    where it lies."""
    return replace(v, terms=tuple(
        replace(t, indicators=frozenset(e for e in t.indicators if not (set(e.coef) <= new and always(e))))
        for t in v.terms if not any(map(never, t.indicators))))


def _outer_window(v: Value, dim: int, start: Size, step: int, length: Size) -> Value:
    """A slice of a merged axis that keeps whole blocks of the inner variables is a slice of the outermost one."""
    outer, *inner = v.axes[dim]
    block = product(x.size for x in inner)
    begin, count = divide(start, block), divide(length, block)
    if step == 1 and start == 0 and count is None and len(inner) == 1:
        for width in (block - 1, block + 1):
            rows = divide(length, width)
            if rows is not None and (found := _skewed(v, v.axes[dim], Index(rows), Index(width))) is not None:
                return found
    if step != 1 or begin is None or count is None:
        raise Unknown("a slice cuts through a merged axis")
    new = Index(count)
    new.slice_of(outer, begin, 1)
    single = same(count, 1)
    axis = tuple(inner) if single else (new, *inner)
    at = Affine(begin) if single else Affine(begin, {new: 1})
    return v.substitute({outer: at}, v.axes[:dim] + (axis,) + v.axes[dim + 1:])


def diagonal(v: Value, first: int, second: int) -> Value:
    """What stands at the same place of two axes, along the first of them."""
    (x,), (y,) = v.axes[first], v.axes[second]
    return _inside(v.substitute({y: var(x)}, v.axes[:second] + v.axes[second + 1:]), {x})


def unfold(v: Value, dim: int, size: int, step: int, count: Size) -> Value:
    """Windows along `dim`: element c of window n is element step * n + c; c becomes the last axis."""
    axis = v.axes[dim]
    if len(axis) != 1:
        raise Unknown("unfold of a merged axis")
    n, c = Index(count), Index(size)
    axis[0].split((n, c)) if same(axis[0].size, count * size) and size == step else None
    if step == 1:
        for x in (n, c):
            rename(x).slice_of(axis[0], 0, 1)
    parts = [() if same(x.size, 1) else (x,) for x in (n, c)]
    at = Affine(0, {x: k for part, k in zip(parts, (step, 1)) for x in part})
    return v.substitute({axis[0]: at}, v.axes[:dim] + (parts[0],) + v.axes[dim + 1:] + (parts[1],))


def repeat(v: Value, counts: Sequence[Size]) -> Value:
    """Tiling: the axis (r, x), whose outer variable no term uses."""
    axes = ((),) * (len(counts) - len(v.axes)) + v.axes
    return replace(v, axes=tuple(a if same(c, 1) else (Index(c), *a) for a, c in zip(axes, counts)))


def flip(v: Value, dims: Sequence[int]) -> Value:
    """Axes backwards: each variable x becomes size - 1 - x."""
    for d in dims:
        mapping = {x: Affine(x.size - 1, {x: -1}) for x in v.axes[d]}
        v = v.substitute(mapping, v.axes)
    return v


def pad(v: Value, spec: Sequence[Size]) -> Value:
    """Zeros around: the old value where the shifted index lies inside the old range."""
    v.finite()
    for k in range(0, len(spec), 2):
        low, high = spec[k], spec[k + 1]
        dim = len(v.axes) - 1 - k // 2
        if low == 0 and high == 0:
            continue
        axis = v.axes[dim]
        if len(axis) > 1:
            raise Unknown("padding of a merged axis")
        length: Size = axis[0].size if axis else 1
        new = Index(length + low + high)
        mapping = {}
        if axis:
            rename(axis[0]).pad_to(new, low)                # one that is padded elsewhere, too, keeps that
            mapping = {axis[0]: Affine(-low, {new: 1})}
        w = v.substitute(mapping, v.axes[:dim] + ((new,),) + v.axes[dim + 1:])
        inside = frozenset(([Affine(low, {new: -1})] if low != 0 else [])
                           + ([Affine(1 - length - low, {new: 1})] if high != 0 else []))
        v = replace(w, terms=tuple(replace(t, indicators=t.indicators | inside) for t in w.terms))
    return v
