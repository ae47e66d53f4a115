"""The forms in which attention is written: masked scores, running sums of outer products, chunks, loops over steps or blocks.

Each writer finds q, k, v in the order of `work`, the gate's logarithm g [b, h, n], the heads' slopes [h], a state `start`
[b, h, d, e], and the number of positions n; it leaves o in the order of `work`, and `end` [b, h, d, e] where asked for.
"""

from __future__ import annotations

from collections.abc import Callable

from .writing import Writer, axes, scaled, scaled_by_positions

MASKS = {
    # {t} tril or triu, {d} the diagonal, {c} the comparison of i and {j}, {n} the sizes
    "tril": "s = s.{t}({d})",
    "function": "s = torch.{t}(s, diagonal={d})",
    "inplace": "s = s.{t}_({d})",
    "ones": "s = s * torch.ones({n}, dtype=s.dtype).{t}({d})",
    "ones_left": "s = torch.{t}(s.new_ones({n}), {d}) * s",
    "mul_": "s.mul_(torch.ones({n}, dtype=s.dtype).{t}({d}))",
    "bool": "s = s * torch.ones({n}, dtype=torch.bool).{t}({d})",
    "where": "s = torch.where(i[:, None] {c} {j}[None, :], s, 0.0)",
    "where_zeros": "s = torch.where(torch.ones_like(s).{t}({d}) > 0, s, torch.zeros_like(s))",
    "fill": "s = s.masked_fill(~torch.ones({n}, dtype=torch.bool).{t}({d}), 0)",
    "fill_": "s.masked_fill_(torch.ones({n}).{t}({d}) == 0, 0.0)",
    "fill_arange": "s = s.masked_fill((i[:, None] {c} {j}).logical_not(), 0.0)",
    "arange": "s = s * (i.unsqueeze(1) {c} {j}.unsqueeze(0)).to(s.dtype)",
    "view": "s = s * (i.view(-1, 1) {c} {j}.view(1, -1))",
}
BETWEEN = ("difference", "tril", "where", "segments")


def _triangle(t: Writer) -> str:
    return "triu" if t.spec.reverse else "tril"


def _ratio(numerator: str, z: str, t: Writer) -> str:
    # a strict sum has an empty row, whose quotient is 0 / eps
    eps = "1.0" if t.spec.strict else "1e-6"
    if t.spelling.scale_by == "inplace" and not t.spec.strict:
        return f"{numerator} / {z}"
    return f"{numerator} / ({z} + {eps})" if t.spelling.scale_by != "over" else f"{numerator} / {z}.clamp(min={eps})"


def _with_ones(t: Writer) -> None:
    t.add("v = torch.cat([v, torch.ones_like(v[..., :1])], -1)")


def _without_ones(t: Writer) -> None:
    t.add(f"o = {_ratio('o[..., :-1]', 'o[..., -1:]', t)}")


# ---------------------------------------------------------------------------------------------------------------- scores
def scores(t: Writer) -> None:
    s, w, x = t.spec, t.spelling, axes(t)
    if w.product == "einsum":
        t.add(f"s = torch.einsum('{x['k']},{x['q']}->{x['s']}', k, q)" if w.swap else
              f"s = torch.einsum('{x['q']},{x['k']}->{x['s']}', q, k)")
    else:
        t.add({"matmul": "s = q @ k.mT", "transpose": "s = torch.matmul(q, k.transpose(-2, -1))",
               "flipped": "s = (k @ q.mT).mT"}[w.product])
    t.at("scores")
    if s.scale is not None and s.scale_at == "scores":
        t.add(scaled("s", s.scale, w.scale_by))
    j, p = ("j", s.prefix) if s.prefix else ("i", 0)
    t.add(*[f"i, j = torch.arange({p}, n + {p}), torch.arange(n + {p})"] if p else ["i = torch.arange(n)"])
    signs = {(False, False): (0, ">="), (False, True): (-1, ">"), (True, False): (0, "<="), (True, True): (1, "<")}
    diagonal, comparison = signs[s.reverse, s.strict]
    diagonal += p
    if s.numbers != "none":
        t.add(scaled_by_positions("s", "i[:, None]" if s.numbers == "q" else j, w.scale_by))
    if s.decay == "head":
        _head_weights(t, diagonal)
    elif s.decay == "step":
        _step_weights(t, "g", "n")
        t.add("s = s * w")
    t.at("before_mask")
    t.add(MASKS[w.mask].format(t=_triangle(t), d=diagonal, c=comparison, j=j, n=f"n, n + {p}" if p else "n, n"))
    t.at("masked")
    if s.normaliser:
        t.add("z = s @ torch.ones_like(s[..., :1])" if w.denominator == "matmul" and not p else "z = s.sum(-1, keepdim=True)")
        if w.divide_first:
            t.add(f"s = {_ratio('s', 'z', t)}")
    t.add("o = s @ v" if w.last == "matmul" else f"o = torch.einsum('{x['s']},{x['v']}->{x['o']}', s, v)")
    if s.normaliser and not w.divide_first:
        if w.work not in ("bhnd", "xnd"):                   # scores are [b, h, i, j] always
            order = ["bhi".index({"n": "i"}.get(a, a)) for a in w.work[:3]]
            t.add(f"z = z.squeeze(-1).permute({', '.join(map(str, order))}).unsqueeze(-1)")
        t.add(f"o = {_ratio('o', 'z', t)}")
    if s.initial:
        reached = {"none": "", "head": " * torch.exp(-slopes[:, None, None] * (i + 1)[:, None])",
                   "step": " * g.cumsum(-1).exp()[..., None]"}[s.decay]
        t.add(f"o = o + (q{reached}) @ start" if reached else "o = o + q @ start")
    if s.final:
        _end_of_scores(t)


def _head_weights(t: Writer, diagonal: int) -> None:
    """exp(-slope of the head * distance), in the direction of the sum."""
    j, n = ("j", f"n, n + {t.spec.prefix}") if t.spec.prefix else ("i", "n, n")
    far = f"({j}[None, :] - i[:, None])" if t.spec.reverse else f"(i[:, None] - {j}[None, :])"
    slopes = "slopes[:, None, None]"
    t.add(*{
        "exp": [f"s = s * torch.exp(-{slopes} * {far})"],
        "power": [f"s = s * torch.exp(-{slopes}) ** {far}"],
        "minus_inf": [f"later = ~torch.ones({n}, dtype=torch.bool).{_triangle(t)}({diagonal})",
                      f"s = s * (-{slopes} * {far}).masked_fill(later, float('-inf')).exp()"],
    }[t.spelling.decay])


def _step_weights(t: Writer, g: str, n: str) -> None:
    """w [..., n, n]: the exponential of the sum of g [..., n] from j (without) to i (with); reversed the other way."""
    tri, ones = _triangle(t), f"torch.ones({n}, {n}, dtype=torch.bool)"
    if t.spelling.between == "segments" and not t.spec.reverse:
        t.add(f"w = {g}[..., None].expand(*{g}.shape, {n}).masked_fill(~{ones}.tril(-1), 0).cumsum(-2)",
              f"w = w.masked_fill(~{ones}.tril(), float('-inf')).exp()")
        return
    i, j = ("None, :", ":, None") if t.spec.reverse else (":, None", "None, :")
    t.add(f"c = {g}.cumsum(-1)", f"w = c[..., {i}] - c[..., {j}]")
    t.add({
        "tril": f"w = w.{tri}().exp().{tri}()",
        "where": f"w = torch.where(torch.arange({n})[:, None] {'<=' if t.spec.reverse else '>='} torch.arange({n}), w, "
                 "float('-inf')).exp()",
    }.get(t.spelling.between, f"w = w.masked_fill(~{ones}.{tri}(), float('-inf')).exp()"))


def _end_of_scores(t: Writer) -> None:
    until = {"none": "k", "head": "(k * torch.exp(-slopes[:, None, None] * (n - 1 - i)[:, None]))",
             "step": "(k * (g.sum(-1, keepdim=True) - g.cumsum(-1)).exp()[..., None])"}[t.spec.decay]
    t.add(f"end = {until}.mT @ v")
    if t.spec.initial:
        passed = {"none": "start", "head": "start * torch.exp(-slopes * n)[:, None, None]",
                  "step": "start * g.sum(-1).exp()[..., None, None]"}[t.spec.decay]
        t.add(f"end = end + {passed}")


# ----------------------------------------------------------------------------------------------------------------- state
def state(t: Writer) -> None:
    s, w, x = t.spec, t.spelling, axes(t)
    value_last = w.state == "de"
    whole = x["z"] + x[w.state]
    k, v = ("k.unsqueeze(-1)", "v.unsqueeze(-2)") if value_last else ("k.unsqueeze(-2)", "v.unsqueeze(-1)")
    if w.outer == "einsum":
        t.add(f"kv = torch.einsum('{x['k_i']},{x['v_i']}->{whole}', k, v)" if not w.swap else
              f"kv = torch.einsum('{x['v_i']},{x['k_i']}->{whole}', v, k)")
    elif w.outer == "matmul":
        t.add(f"kv = {k} @ {v}" if value_last else f"kv = {v} @ {k}")
    else:
        t.add(f"kv = {v} * {k}" if w.swap else f"kv = {k} * {v}")
    t.at("outer")
    _reached(t)
    _running(t, "S", "kv", 2)
    t.at("state")
    if s.initial:
        start = ("start" if value_last else "start.mT") + f".unsqueeze({t.n})"
        t.add(f"S = S + {start}" + ("" if s.decay == "none" else " * c[..., None, None].exp()"))
    if w.readout == "einsum":
        t.add(f"o = torch.einsum('{x['q']},{whole}->{x['o']}', q, S)")
    elif w.readout == "matmul":
        t.add("o = (q.unsqueeze(-2) @ S).squeeze(-2)" if value_last else "o = (S @ q.unsqueeze(-1)).squeeze(-1)")
    else:
        t.add("o = (q.unsqueeze(-1) * S).sum(-2)" if value_last else "o = (S * q.unsqueeze(-2)).sum(dim=-1)")
    if s.normaliser:
        _running(t, "sums", "k", 1)
        t.add(f"z = torch.einsum('{x['q']},{x['q']}->{x['z']}', q, sums).unsqueeze(-1)" if w.swap else
              "z = (q * sums).sum(-1, keepdim=True)")
        t.add(f"o = {_ratio('o', 'z', t)}")
    if s.final:
        t.add(f"end = S.select({t.n}, -1)" + ("" if value_last else ".mT"))


def _reached(t: Writer) -> None:
    """c, the sum of the log-decays up to each position, with axes that broadcast against those of `work`."""
    lead = t.spelling.work[:2] if t.merged else t.spelling.work[:3]
    if t.spec.decay == "head":
        t.add("c = -slopes[:, None] * torch.arange(1, n + 1)")
        if lead == "bnh":
            t.add("c = c.mT")
        elif lead == "nbh":
            t.add("c = c.mT.unsqueeze(1)")
    elif t.spec.decay == "step":
        t.add("c = g.cumsum(-1)")
        if lead not in ("bhn", "xn"):
            t.add(f"c = c.permute({', '.join(str('bhn'.index(a)) for a in lead)})")


def _running(t: Writer, out: str, x: str, features: int) -> None:
    """Sums of x over the positions up to each."""
    s, n = t.spec, t.n
    weight = "c" + "[..., None]" * (features == 1) + "[..., None, None]" * (features == 2)
    own, decayed = x, s.decay != "none"
    sign, back = ("", "-") if s.reverse else ("-", "")
    if decayed:
        t.add(f"weighed = {x} * torch.exp({sign}{weight})")
        own = "weighed"
    total = f"{own}.flip({n}).cumsum({n}).flip({n})" if s.reverse else f"{own}.cumsum({n})"
    after = f" * torch.exp({back}{weight})" if decayed else ""
    if not s.strict:
        t.add(f"{out} = {total}{after}")
    elif t.spelling.exclude == "minus":
        t.add(f"{out} = {total}{after} - {x}")
    else:
        none = f"torch.zeros_like({own}.narrow({n}, 0, 1))"
        shifted = f"torch.cat([{total}, {none}], {n}).narrow({n}, 1, n)" if s.reverse else \
            f"torch.cat([{none}, {total}], {n}).narrow({n}, 0, n)"
        t.add(f"{out} = {shifted}{after}")


# ---------------------------------------------------------------------------------------------------------------- chunks
def chunks(t: Writer) -> None:
    """All chunks at once. q, k, v are [..., n, features] inside; the length is a multiple of the chunk."""
    s, c = t.spec, t.spelling.block
    if s.normaliser:
        _with_ones(t)
    t.add(f"q, k, v = (x.unflatten(-2, (-1, {c})) for x in (q, k, v))", f"l, m = torch.arange({c}), torch.arange(q.shape[-3])")
    kept = since = until = ""
    if s.decay == "head":
        slopes = "slopes[:, None, None, None]"
        kept = f" * torch.exp(-{slopes} * (l[:, None] - l)).tril()"
        since, until = f" * torch.exp(-{slopes} * (l + 1)[:, None])", f" * torch.exp(-{slopes} * ({c - 1} - l)[:, None])"
    elif s.decay == "step":
        t.add(f"a = g.unflatten(-1, (-1, {c}))")
        _step_weights(t, "a", str(c))
        t.add("a = a.cumsum(-1)")
        kept, since, until = " * w", " * a.exp()[..., None]", " * (a[..., -1:] - a).exp()[..., None]"
    t.add(f"inside = (q @ k.mT{kept}).tril({-1 if s.strict else 0})")
    t.at("inside")
    t.add(f"states = (k{until}).mT @ v" if until else "states = k.mT @ v")
    t.at("states")
    if t.spelling.left.startswith("read"):
        _states_read(t, since)
    else:
        _states_before(t)
        t.at("before")
        t.add(f"o = inside @ v + (q{since}) @ before" if since else "o = inside @ v + q @ before")
    t.add("o = o.flatten(-3, -2)")
    if s.normaliser:
        _without_ones(t)
    if s.final:
        t.add("end = states.sum(-3)" + (" + start" if s.initial else ""))


def _states_before(t: Writer) -> None:
    """The state before each chunk, from what each chunk adds."""
    s, c, batch = t.spec, t.spelling.block, "x" if t.merged else "bh"
    if t.spelling.left != "all":
        _states_left(t)
        return
    if s.decay == "none":
        t.add("before = states.cumsum(-3) - states" if t.spelling.exclude == "minus" else
              "before = F.pad(states.cumsum(-3), (0, 0, 0, 0, 1, 0))[..., :-1, :, :]")
        started = "start[..., None, :, :]"
    elif s.decay == "head":
        t.add(f"gap = (m[:, None] - m - 1) * {c}",
              "between = torch.exp(-slopes[:, None, None] * gap).tril(-1)",
              f"before = torch.einsum('{'x' if t.merged else 'h'}zm,{batch}mde->{batch}zde', between, states)")
        started = f"start[..., None, :, :] * torch.exp(-slopes[:, None] * m * {c})[..., None, None]"
    else:
        t.add("reached = a[..., -1].cumsum(-1)", "entered = reached - a[..., -1]",
              "between = (entered[..., :, None] - reached[..., None, :]).masked_fill(m[:, None] <= m, float('-inf')).exp()",
              f"before = torch.einsum('{batch}zm,{batch}mde->{batch}zde', between, states)")
        started = "start[..., None, :, :] * entered.exp()[..., None, None]"
    if s.initial:
        t.add(f"before = before + {started}")


def _states_left(t: Writer) -> None:
    """The same by a loop, which may divide each state by its size, by which all are multiplied afterwards."""
    divided = t.spelling.left == "divided"
    t.add("one = torch.zeros_like(states[..., 0, :, :])", "every = []")
    if divided:
        t.add("size, sizes = torch.ones_like(one[..., :1, :1]), []")
    t.add("for p in range(states.shape[-3]):")
    if divided:
        t.add("    every.append(one / size)", "    sizes.append(size)")
    else:
        t.add("    every.append(one)")
    t.add(f"    one = one{_through(t)} + states[..., p, :, :]")
    if divided:
        t.add("    size = one.detach().abs().sum(-2, keepdim=True).amax(-1, keepdim=True).clamp(min=1)")
    t.add("before = torch.stack(every, -3)" + (" * torch.stack(sizes, -3)" if divided else ""))


def _through(t: Writer) -> str:
    """What chunk p leaves of the state before it."""
    return {"none": "", "head": f" * torch.exp(-slopes[:, None, None] * {t.spelling.block})",
            "step": " * a[..., p, -1].exp()[..., None, None]"}[t.spec.decay]


def _states_read(t: Writer, since: str) -> None:
    """The outputs: what a loop reads of the states is added to what chunks see of themselves, all at once or one by one."""
    into = t.spelling.left == "read_into"
    t.add("one = " + ("start" if t.spec.initial else "torch.zeros_like(states[..., 0, :, :])"), f"seen = q{since}",
          "o = inside @ v" if into else "every = []")
    t.add("for p in range(states.shape[-3]):")
    t.add("    o[..., p, :, :] += seen[..., p, :, :] @ one" if into else "    every.append(seen[..., p, :, :] @ one)")
    t.add(f"    one = one{_through(t)} + states[..., p, :, :]")
    if not into:
        t.add("o = inside @ v + torch.stack(every, -3)" if not t.spelling.swap else "o = torch.stack(every, -3) + inside @ v")


# ----------------------------------------------------------------------------------------------------------------- loops
BUFFERS = ("write", "positions", "scatter")


def _new_state(t: Writer, order: str, e: int) -> str:
    d, at = t.spec.d, t.n
    if t.spec.initial:
        return "S = start" if order == "de" else "S = start.mT"
    sizes = f"{d}, {e}" if order == "de" else f"{e}, {d}"
    return f"S = q.new_zeros(*q.select({at}, 0).shape[:-1], {sizes})"


def steps(t: Writer) -> None:
    """One step after the other."""
    s, w, n = t.spec, t.spelling, t.n
    column = s.normaliser and w.denominator == "column"
    sums = s.normaliser and not column
    if column:
        _with_ones(t)
    value_last = w.state == "de"
    t.add(_new_state(t, w.state, s.e + column))
    if sums:
        t.add(f"Z = torch.zeros_like(k.select({n}, 0))")
    if s.decay == "head":
        t.add("rate = torch.exp(-slopes)[:, None]")
    t.add("o = torch.zeros_like(v)" if w.collect in BUFFERS else "out = []")
    t.loop("for t in reversed(range(n)):" if s.reverse else "for t in range(n):")
    at = ", ".join([":"] * n + ["t"])
    t.add(f"qt, kt, vt = q[{at}], k[{at}], v[{at}]")
    if s.numbers != "none":
        t.add(scaled_by_positions(f"{s.numbers}t", "t", w.scale_by))
    if s.decay == "step":
        t.add("rate = g[..., t].exp()[..., None]")
    if s.decay != "none":
        t.add("S = rate[..., None] * S" if not w.swap else "S = S * rate[..., None]", *(["Z = Z * rate"] if sums else []))
    k, v = ("kt.unsqueeze(-1)", "vt.unsqueeze(-2)") if value_last else ("kt.unsqueeze(-2)", "vt.unsqueeze(-1)")
    x = "x" if t.merged else "bh"
    update = ["S = S + " + {
        "einsum": f"torch.einsum('{x}d,{x}e->{x}{w.state}', kt, vt)",
        "matmul": f"{k} @ {v}" if value_last else f"{v} @ {k}",
        "broadcast": f"{v} * {k}" if w.swap else f"{k} * {v}"}[w.outer], *(["Z = Z + kt"] if sums else [])]
    read = ["y = " + {
        "einsum": f"torch.einsum('{x}d,{x}{w.state}->{x}e', qt, S)",
        "matmul": "(qt.unsqueeze(-2) @ S).squeeze(-2)" if value_last else "(S @ qt.unsqueeze(-1)).squeeze(-1)",
        "sum": "(qt.unsqueeze(-1) * S).sum(-2)" if value_last else "(S * qt.unsqueeze(-2)).sum(-1)"}[w.readout]]
    if sums:
        read.append("z = (qt * Z).sum(-1, keepdim=True)")
        read.append(f"y = {_ratio('y', 'z', t)}")
    t.add(*(read + update if s.strict else update + read))
    t.at("step")
    t.add({"write": f"o[{at}] = y", "cat": f"out.append(y.unsqueeze({n}))", "scatter": f"o = torch.select_scatter(o, y, {n}, t)",
           "positions": f"o.index_copy_({n}, torch.arange(t, t + 1), y.unsqueeze({n}))"}.get(w.collect, "out.append(y)"))
    t.end_loop()
    _collected(t, "cat" if w.collect == "cat" else "stack", n)
    if column:
        _without_ones(t)
    if s.final:
        t.add("end = S" + (f"[..., :{s.e}]" if column and value_last else "") + ("" if value_last else ".mT"))


def blocks(t: Writer) -> None:
    """One block after the other; the last may be short."""
    s, w, c = t.spec, t.spelling, t.spelling.block
    if s.normaliser:
        _with_ones(t)
    t.add(_new_state(t, "de", s.e + s.normaliser), "o = torch.empty_like(v)" if w.collect in BUFFERS else "out = []",
          f"l = torch.arange({c})")
    if s.decay == "head":
        t.add("slope = slopes[:, None, None]", "kept = torch.exp(-slope * (l[:, None] - l)).tril()")
    t.loop(f"for a in reversed(range(0, n, {c})):" if s.reverse else f"for a in range(0, n, {c}):")
    t.add(f"qi, ki, vi = (x[..., a:a + {c}, :] for x in (q, k, v))", "m = qi.shape[-2]")
    weight = since = until = through = ""
    if s.decay == "head":
        weight, through = " * kept[:, :m, :m]", " * torch.exp(-slope * m)"
        since, until = " * torch.exp(-slope * (l[:m, None] + 1))", " * torch.exp(-slope * (m - 1 - l[:m, None]))"
    elif s.decay == "step":
        t.add(f"gi = g[..., a:a + {c}]")
        _step_weights(t, "gi", "m")
        t.add("gi = gi.cumsum(-1)")
        weight, since, until = " * w", " * gi.exp()[..., None]", " * (gi[..., -1:] - gi).exp()[..., None]"
        through = " * gi[..., -1].exp()[..., None, None]"
    diagonal = int(s.strict) if s.reverse else -int(s.strict)
    own = f"(qi @ ki.mT{weight}).{_triangle(t)}({diagonal}) @ vi"
    before = f"(qi{since}) @ S" if since else "qi @ S"
    t.add(f"y = {before} + {own}" if w.swap else f"y = {own} + {before}")
    t.add(f"S = S{through} + " + (f"(ki{until}).mT @ vi" if until else "ki.mT @ vi"))
    t.at("step")
    t.add({"write": f"o[..., a:a + {c}, :] = y", "scatter": "o = torch.slice_scatter(o, y, -2, a, a + m)",
           "positions": "o[..., torch.arange(a, a + m), :] = y"}.get(w.collect, "out.append(y)"))
    t.end_loop()
    _collected(t, "cat", t.n)
    if s.normaliser:
        _without_ones(t)
    if s.final:
        t.add("end = S" + (f"[..., :{s.e}]" if s.normaliser else ""))


def _collected(t: Writer, how: str, n: int) -> None:
    t.at("collected")
    if t.spelling.collect not in BUFFERS:
        t.add(f"o = torch.{how}(out[::-1], {n})" if t.spec.reverse else f"o = torch.{how}(out, dim={n})")


WRITE: dict[str, Callable[[Writer], None]] = {
    "scores": scores, "state": state, "chunks": chunks, "steps": steps, "blocks": blocks}
