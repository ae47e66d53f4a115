"""The sweep: the one tile kernel, forward and backward. Import needs Triton.

Within a chunk the masked quadratic form, between chunks a state in registers (Lightning Attention-2, arXiv 2401.04658,
algorithm 1). The forward and all three gradients are this one sweep with exchanged operands (`spec.differentiate`).

Weights are powers of two of differences of log-decays within a chunk, later step minus earlier; no cumulative sum of
the whole sequence is ever exponentiated. Row offsets are 64-bit, offsets inside a tile 32-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .arithmetic import (
    LOG2E,
    as_operand,
    decayed,
    dot,
    dot_add,
    exp2_and,
    exp2_of,
    i64,
    leave_at_border,
    load_tile,
    place_at_border,
    place_in_state,
    product_of_states,
    store_tile,
    sums_of_columns,
    sums_of_rows,
    turned,
    turned_add,
)

# How the normaliser's column takes part in a sweep.
NO_COLUMN = tl.constexpr(0)
ON_VALUE = tl.constexpr(1)  # value has a column of ones; its output is the normaliser
ON_LEFT = tl.constexpr(2)  # left has the column x, right ones
ON_RIGHT = tl.constexpr(3)  # right has the column x, left ones
ON_STATE = tl.constexpr(4)  # value has the column x, for the state and for a companion; left has none

# What a sweep of the backward sums for the log-decay's gradient. One of the two also sums the pairs inside of its chunks.
OF_QUERIES = tl.constexpr(1)  # with grad_q: q.grad_q of what came before the chunk; leaves its state at borders
OF_KEYS = tl.constexpr(2)  # with grad_k: k.grad_k of what lies behind the chunk; multiplies its state with the one left


# What changes with the batch and the length is not specialised on: a new length must not compile anything. ALIGN says
# of which power of two (in elements, at most 16) all head and batch strides are multiples, so that loads stay wide.
@triton.jit(
    do_not_specialize=[
        "n", "per_segment", "segments", "borders", "heads", "scale", "scale_in", "scale_leave",
        "a_b", "a_h", "b_b", "b_h", "v_b", "v_h", "w_b", "w_h", "o_b", "o_h", "r_b", "r_h",
    ]
)  # fmt: skip
def sweep(
    A, B, V, W, O, R, X, G, Z, SUMS, S_BORDER, X_BORDER, PASSING, S_IN, X_IN, S_OUT, X_OUT, TOTAL,
    a_b: i64, a_h: i64, a_d, b_b: i64, b_h: i64, b_d, v_b: i64, v_h: i64, v_d, w_b: i64, w_h: i64, w_d,
    o_b: i64, o_h: i64, r_b: i64, r_h: i64,
    n, per_segment, segments, borders, heads, a_group, b_group, v_group, w_group, scale, scale_in, scale_leave,
    a_n: tl.constexpr, b_n: tl.constexpr, v_n: tl.constexpr, w_n: tl.constexpr, o_n: tl.constexpr, r_n: tl.constexpr,
    CONTRACT: tl.constexpr, OUT: tl.constexpr, BC: tl.constexpr, REST: tl.constexpr, BO: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, STRICT: tl.constexpr, DECAY: tl.constexpr, COLUMN: tl.constexpr, TRANSPOSED: tl.constexpr,
    OUTPUT: tl.constexpr, COMPANION: tl.constexpr, SUM: tl.constexpr, PAIRS: tl.constexpr, BETWEEN: tl.constexpr,
    AHEAD: tl.constexpr, BRANCH: tl.constexpr, HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, HAS_TOTAL: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, LOWEST: tl.constexpr, ALIGN: tl.constexpr,
    HOLD: tl.constexpr, STAGES: tl.constexpr, SKIP: tl.constexpr, ALIKE: tl.constexpr, SPLIT: tl.constexpr, TURNED: tl.constexpr,
    WAITS: tl.constexpr,
):  # fmt: skip
    """O = scale * LA(A, B, V) for one segment of one head and one block of O's features; states are sums of B^T V.

    A, B [.., N, CONTRACT], V, O [.., N, OUT]. COMPANION: R = scale * LA(W, V, B) as well, W [.., N, OUT], whose state is
    the transposed one; then a program holds all features. The contracted features are held in BC and, where they are not as many
    as a power of two, REST more.

    S_IN, S_OUT [B*H, segments, CONTRACT, OUT] (TRANSPOSED: the last two exchanged), X_* their normaliser part; a state
    is multiplied by scale_in when it enters and by scale_leave when it leaves. TOTAL [B*H, segments], in powers of two.
    HOLD: weights that are those of every chunk stay in registers. DECAY 0: none, 1: G[heads], 2: G[B*H, N], sums from
    each chunk's start in powers of two. OUTPUT False: states only.

    SUM: row sums of O * W for the log-decay's gradient, SUMS [parts, B*H, N], own positions left out: SPLIT parts for each block.
    PAIRS: of pairs inside of the chunk too, as many parts of sums of rows, and one of sums of columns, to be taken off.
    At every BETWEEN positions OF_QUERIES leaves its state, S_BORDER [B*H, borders, CONTRACT, OUT], and OF_KEYS writes the product
    of its own with that, PASSING [blocks, B*H, borders]. Where that is at each chunk the states are those that enter it, the
    product is of what passes all of it, and sums are in fp64.
    SKIP: what leaves the last segment is not asked for. ALIKE: all tiles lie alike.
    TURNED: products with the state, and those that are added to it, are made transposed: tensor cores read it where it is, in
    registers, and it never goes through shared memory. For an output alone, of two tiles of contracted features.
    WAITS: launched while the kernel before it runs; reads nothing until that has ended (programmatic dependent launch).
    """
    if WAITS:
        gdc_wait()
    ALONE: tl.constexpr = REST != 0 and OUTPUT and not COMPANION and COLUMN == NO_COLUMN and SUM == 0
    tl.static_assert(not TURNED or ALONE, "TURNED is for an output alone, of two tiles")
    # no register is left for what is added to the state while the output is made: it is read a second time
    AGAIN: tl.constexpr = TURNED and BC == REST
    BLOCKS: tl.constexpr = (OUT + BO - 1) // BO
    # the blocks of a head one after the other: what they share is read from memory once
    program, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    bh, segment = program // segments, program % segments
    batch, head = (bh // heads).to(tl.int64), bh % heads
    bh = bh.to(tl.int64)
    rows, cc, oc = tl.arange(0, C), tl.arange(0, BC), block * BO + tl.arange(0, BO)
    EACH: tl.constexpr = BETWEEN == C
    WIDE: tl.constexpr = DECAY == 2 and G.dtype.element_ty != ACC and PRECISION != "tf32"
    C_MASK: tl.constexpr = 0 if BC <= CONTRACT else CONTRACT
    REST_MASK: tl.constexpr = 0 if BC + REST == CONTRACT else CONTRACT
    O_MASK: tl.constexpr = 0 if OUT % BO == 0 else OUT

    a_base = tl.multiple_of(batch * a_b + (head // a_group).to(tl.int64) * a_h, ALIGN)
    b_base = tl.multiple_of(batch * b_b + (head // b_group).to(tl.int64) * b_h, ALIGN)
    v_base = tl.multiple_of(batch * v_b + (head // v_group).to(tl.int64) * v_h, ALIGN)
    w_base = tl.multiple_of(batch * w_b + (head // w_group).to(tl.int64) * w_h, ALIGN)
    o_base = tl.multiple_of(batch * o_b + head.to(tl.int64) * o_h, ALIGN)
    r_base = tl.multiple_of(batch * r_b + head.to(tl.int64) * r_h, ALIGN)
    if ALIKE:
        b_base, v_base, w_base, o_base, r_base = a_base, a_base, a_base, a_base, a_base

    # query minus key position, in the direction of the sweep
    gap = rows[None, :] - rows[:, None] if REVERSE else rows[:, None] - rows[None, :]
    # compared as they are: a difference for each pair would stay in registers
    if REVERSE:
        allowed = rows[None, :] > rows[:, None] if STRICT else rows[None, :] >= rows[:, None]
    else:
        allowed = rows[:, None] > rows[None, :] if STRICT else rows[:, None] >= rows[None, :]
    out_scale = tl.full([], scale, ACC)
    # fp16 overflows: there a scale below one multiplies what is rounded, and not only what comes of it
    SMALL: tl.constexpr = tl.float16 == DOT
    early = tl.minimum(out_scale, 1.0)
    late = tl.maximum(out_scale, 1.0)
    rounded = early if SMALL else out_scale  # what is multiplied before rounding
    inside = tl.where(allowed, rounded, 0.0)
    if DECAY == 1:
        g = tl.maximum(tl.load(G + head).to(ACC) * LOG2E, LOWEST)
        if HOLD:
            inside = tl.where(allowed, tl.exp2(g * tl.where(allowed, gap, 0).to(ACC)) * rounded, 0.0)

    ON_OUT: tl.constexpr = COLUMN == ON_LEFT or COLUMN == ON_RIGHT
    state_at, in_state = place_in_state(cc, oc, CONTRACT, OUT, TRANSPOSED)
    state_base = (bh * segments + segment) * CONTRACT * OUT
    LENGTH: tl.constexpr = OUT if ON_OUT else CONTRACT
    if ON_OUT:
        of_column, in_column = oc, oc < OUT
    else:
        of_column, in_column = cc, cc < CONTRACT
    column_base = (bh * segments + segment) * LENGTH
    state = tl.zeros([BC, BO], ACC)
    # The column's state is a vector, updated and read by sums: a dot with 16 columns of which one is used gives wrong
    # results on Hopper (Triton 3.6).
    column = tl.zeros([BO if ON_OUT else BC], ACC)
    if HAS_IN:
        state = tl.load(S_IN + state_base + state_at, mask=in_state, other=0.0) * tl.full([], scale_in, ACC)
        if COLUMN != NO_COLUMN:
            column = tl.load(X_IN + column_base + of_column, mask=in_column, other=0.0) * tl.full([], scale_in, ACC)
    if REST != 0:
        rc = BC + tl.arange(0, REST)
        rest_at, in_rest = place_in_state(rc, oc, CONTRACT, OUT, TRANSPOSED)
        rest, rest_column = tl.zeros([REST, BO], ACC), tl.zeros([REST], ACC)
        if HAS_IN:
            rest = tl.load(S_IN + state_base + rest_at, mask=in_rest, other=0.0) * tl.full([], scale_in, ACC)
            if COLUMN == ON_VALUE or COLUMN == ON_STATE:
                rest_column = tl.load(X_IN + column_base + rc, mask=rc < CONTRACT, other=0.0) * tl.full([], scale_in, ACC)
    passed = tl.full([], 0.0, ACC)

    first = segment * per_segment
    chunks = (n + C - 1) // C
    count, padded = tl.minimum(per_segment, chunks - first), chunks * C
    if SKIP and segment == (0 if REVERSE else segments - 1):
        count = 0
    all_heads = tl.num_programs(0) // (segments * BLOCKS)
    PARTS: tl.constexpr = SPLIT * 2 if PAIRS else SPLIT
    sum_row = block.to(tl.int64) * (PARTS + (1 if PAIRS else 0)) * all_heads + bh
    # with a number of its own, or Triton fetches ahead only what products read; what a chunk needs of addresses is cheaper made
    # again than held in registers
    for step in tl.range(0, count, num_stages=STAGES, disable_licm=True):
        t = (first + (count - 1 - step if REVERSE else step)) * C
        t64 = t.to(tl.int64)
        filled = tl.minimum(n - t, C)
        valid = rows < filled
        b = load_tile(B, b_base + t64 * b_n, b_n, b_d, rows, valid, cc, C_MASK)
        if REST != 0:
            b_rest = load_tile(B, b_base + t64 * b_n, b_n, b_d, rows, valid, rc, REST_MASK)
        v = load_tile(V, v_base + t64 * v_n, v_n, v_d, rows, valid, oc, O_MASK)
        if SUM != 0 and EACH:
            at_border = bh * borders + t // C
        elif SUM != 0:
            border = t if REVERSE else t + C  # that the state comes to
            borders_here = (border % BETWEEN == 0) & (border > 0) & (border < n)
            at_border = bh * borders + border // BETWEEN - 1
            if SUM == OF_KEYS and AHEAD:  # fetched ahead like the tiles, where there is room
                there, there_is = place_at_border(S_BORDER, at_border, cc, oc, CONTRACT, OUT)
                rows_there = tl.where(borders_here, CONTRACT, 0)
                met = tl.load(there, mask=there_is & (cc < rows_there)[:, None], other=0.0)
        if COLUMN == ON_LEFT or COLUMN == ON_RIGHT or COLUMN == ON_STATE:
            x = tl.load(X + bh * n + t64 + rows, mask=valid, other=0.0)

        # reached: sums from the chunk's start; since: decay up to a row; until: from a row to the chunk's end
        if DECAY == 1:
            reached = g * (tl.minimum(rows, filled - 1) + 1).to(ACC)
            until = tl.exp2(g * tl.maximum(filled - 1 - rows, 0).to(ACC))
            log_across = g * filled.to(ACC)
        elif DECAY == 2:
            total = tl.load(G + bh * padded + t64 + C - 1)
            exact = tl.load(G + bh * padded + t64 + rows)  # behind the end: as at the end
            reached = exact.to(ACC)
            until = exp2_of(total - exact, ACC)
            log_across = total.to(ACC)
        if DECAY == 0:
            kept = tl.full([C], 1.0, ACC)
            added = as_operand(v, DOT, PRECISION)
        else:
            since = exp2_of(exact, ACC) if DECAY == 2 else tl.exp2(reached)
            kept = since if REVERSE else until
            # sums and products with a tile's numbers come first, so that it need not stay in registers
            if not AGAIN:
                added = as_operand(v.to(ACC) * kept[:, None], DOT, PRECISION)
            if HAS_TOTAL:
                passed += log_across
        if COLUMN == ON_STATE:
            gained = tl.sum(b.to(ACC) * (kept * x)[:, None], 0)
            if REST != 0:
                rest_gained = tl.sum(b_rest.to(ACC) * (kept * x)[:, None], 0)
        elif COLUMN == ON_LEFT:
            gained = tl.sum(v.to(ACC) * kept[:, None], 0)
        elif COLUMN == ON_RIGHT:
            gained = tl.sum(v.to(ACC) * (kept * x)[:, None], 0)

        if OUTPUT:
            # Tiles are named where they are first read: what is read as numbers, and not by products alone, comes into
            # registers there.
            value = as_operand(v, DOT, PRECISION)
            if not TURNED:
                held = as_operand(state * early if SMALL else state, DOT, PRECISION)
            if DECAY == 0:
                weight = tl.full([C], 1.0, ACC)
            else:
                weight = until if REVERSE else since
            alone = weight * rounded
            if not SMALL:
                weight = alone
            if COMPANION or SUM != 0:
                w = load_tile(W, w_base + t64 * w_n, w_n, w_d, rows, valid, oc, O_MASK)
                other = as_operand(w, DOT, PRECISION)
            a = load_tile(A, a_base + t64 * a_n, a_n, a_d, rows, valid, cc, C_MASK)
            left, right = as_operand(a, DOT, PRECISION), as_operand(b, DOT, PRECISION)
            if REST != 0:
                a_rest = load_tile(A, a_base + t64 * a_n, a_n, a_d, rows, valid, rc, REST_MASK)
                left_rest, right_rest = as_operand(a_rest, DOT, PRECISION), as_operand(b_rest, DOT, PRECISION)
                if not TURNED:
                    held_rest = as_operand(rest * early if SMALL else rest, DOT, PRECISION)
                # a branch of their own: as below, for these products go into those there
                more = filled > 0 if BRANCH else True
                if more:
                    if not TURNED:
                        o_rest = dot(left_rest, held_rest, PRECISION, ACC)
                    scores_rest = dot(left_rest, tl.trans(right_rest), PRECISION, ACC)
                else:
                    if not TURNED:
                        o_rest = tl.zeros([C, BO], ACC)
                    scores_rest = tl.zeros([C, C], ACC)

            # Always so, which Triton does not know. On Hopper it gives all rows to each group of four warps where a product goes
            # into another one; it does not look out of a branch, so that here each group computes half of the columns.
            always = step < count if BRANCH else True
            if always:
                if COMPANION:  # left and right, value and state the other way round
                    r = dot(other, tl.trans(held), PRECISION, ACC)
                    r *= weight[:, None]
                    if COLUMN == ON_STATE:
                        r += alone[:, None] * column[None, :]
                    if SUM != 0:  # v.grad_v is k.grad_k, but for the normaliser
                        row_sums = sums_of_rows(r * a.to(ACC), SPLIT, EACH)
                        if COLUMN == ON_RIGHT:
                            row_sums += sums_of_rows(alone[:, None] * w.to(ACC) * column[None, :], SPLIT, EACH)
                elif not TURNED:
                    if REST != 0:
                        o = dot_add(left, held, o_rest, PRECISION, ACC)
                    else:
                        o = dot(left, held, PRECISION, ACC)
                    o *= weight[:, None]
                    if COLUMN == ON_LEFT:
                        o += (alone * x)[:, None] * column[None, :]
                    elif COLUMN == ON_RIGHT:
                        o += alone[:, None] * column[None, :]
                    if SUM != 0:
                        row_sums = sums_of_rows(o * w.to(ACC), SPLIT, EACH)
                if COMPANION or PAIRS:
                    others = dot(other, tl.trans(value), PRECISION, ACC)
                    if COLUMN == ON_STATE:
                        others += x[None, :]
                if REST != 0:
                    scores = dot_add(left, tl.trans(right), scores_rest, PRECISION, ACC)
                else:
                    scores = dot(left, tl.trans(right), PRECISION, ACC)
                if COLUMN == ON_LEFT:
                    scores += x[:, None]
                elif COLUMN == ON_RIGHT:
                    scores += x[None, :]
                if DECAY == 2 or (DECAY == 1 and not HOLD):
                    if DECAY == 2 and G.dtype.element_ty != ACC:
                        # Differences of the whole parts are exact, and what rounding takes from the sum with those of the rest
                        # is found.
                        whole = tl.floor(exact)
                        part, whole = (exact - whole).to(ACC), whole.to(ACC)
                        between = whole[None, :] - whole[:, None] if REVERSE else whole[:, None] - whole[None, :]
                        parts = part[None, :] - part[:, None] if REVERSE else part[:, None] - part[None, :]
                        steps = between + parts
                        weights = exp2_and(tl.where(allowed, steps, float("-inf")), parts - (steps - between)) * rounded
                    else:
                        steps = reached[None, :] - reached[:, None] if REVERSE else reached[:, None] - reached[None, :]
                        weights = tl.exp2(tl.where(allowed, steps, float("-inf"))) * rounded
                else:
                    weights = inside
                scores *= weights
                if PAIRS:  # both sums of one product, so that their errors cancel as they do
                    pairs = tl.where(rows[:, None] != rows[None, :], others * scores, 0.0)
                    of_rows, of_columns = sums_of_rows(pairs, SPLIT, EACH), -sums_of_columns(pairs, EACH)
                    if SMALL:
                        of_rows *= late
                        of_columns *= late
                    at = SUMS + (sum_row + (SPLIT + tl.arange(0, SPLIT)) * all_heads)[None, :] * n + (t64 + rows)[:, None]
                    tl.store(at, of_rows, mask=valid[:, None])
                    tl.store(SUMS + (sum_row + PARTS * all_heads) * n + t64 + rows, of_columns, mask=valid)
                if COMPANION:
                    others = as_operand(others * weights, DOT, PRECISION)
                if COLUMN == ON_VALUE:
                    of_scores = tl.sum(scores, 1)
                scores = as_operand(scores, DOT, PRECISION)
            else:
                scores = tl.zeros([C, C], DOT)
                if COMPANION:
                    r, others = tl.zeros([C, BC], ACC), tl.zeros([C, C], DOT)
                elif not TURNED:
                    o = tl.zeros([C, BO], ACC)
                if SUM != 0:
                    row_sums = tl.zeros([C, SPLIT], tl.float64 if EACH else ACC)
                if COLUMN == ON_VALUE:
                    of_scores = tl.zeros([C], ACC)

            if COLUMN == ON_VALUE:
                z = tl.sum(a.to(ACC) * column[None, :], 1)
                if REST != 0:
                    z += tl.sum(a_rest.to(ACC) * rest_column[None, :], 1)
                z = alone * z + of_scores
                if block == 0:
                    tl.store(Z + bh * n + t64 + rows, z * late if SMALL else z, mask=valid)
            if SUM != 0:
                at = SUMS + (sum_row + tl.arange(0, SPLIT) * all_heads)[None, :] * n + (t64 + rows)[:, None]
                tl.store(at, row_sums * late if SMALL else row_sums, mask=valid[:, None])
            if COMPANION:
                r = dot_add(others, right, r, PRECISION, ACC)
                store_tile(R, r_base + t64 * r_n, r_n, rows, valid, cc, r * late if SMALL else r, C_MASK)
                if always:
                    o = dot(left, held, PRECISION, ACC)
                    o *= weight[:, None]
                    if COLUMN == ON_RIGHT:
                        o += alone[:, None] * column[None, :]
                else:
                    o = tl.zeros([C, BO], ACC)
            if TURNED:
                # one tile of the state after the other, and weights, of which a thread has many here, made again behind both:
                # what was made above would stay in registers meanwhile
                o = turned(left, as_operand(state * early if SMALL else state, DOT, PRECISION), PRECISION, ACC)
                o = turned_add(left_rest, as_operand(rest * early if SMALL else rest, DOT, PRECISION), o, PRECISION, ACC)
                if DECAY == 1:
                    distance = tl.maximum(filled - 1 - rows, 0) if REVERSE else tl.minimum(rows, filled - 1) + 1
                    o *= tl.exp2(g * distance.to(ACC))[:, None]
                elif DECAY == 2:
                    o *= exp2_of(total - exact if REVERSE else exact, ACC)[:, None]
                if not SMALL:
                    o *= rounded
                o = turned_add(scores, value, o, PRECISION, ACC)
            else:
                o = dot_add(scores, value, o, PRECISION, ACC)
            store_tile(O, o_base + t64 * o_n, o_n, rows, valid, oc, o * late if SMALL else o, O_MASK)

        if DECAY != 0:
            if AGAIN:
                again = load_tile(V, v_base + t64 * v_n, v_n, v_d, rows, valid, oc, O_MASK)
                added = as_operand(again.to(ACC) * kept[:, None], DOT, PRECISION)
            if WIDE:  # what rounding takes from it would be missing from all of the state, and more in each chunk
                precise = tl.exp2(total)
                across = precise.to(ACC)
                lost = (precise - across).to(ACC)
            else:
                across = exp2_of(total, ACC) if DECAY == 2 else tl.exp2(log_across)
                lost = across * 0.0
            if SUM == OF_QUERIES and EACH:
                leave_at_border(state, column, S_BORDER, X_BORDER, at_border, cc, oc, CONTRACT, OUT, ON_OUT)
            elif SUM == OF_KEYS and EACH:
                there, there_is = place_at_border(S_BORDER, at_border, cc, oc, CONTRACT, OUT)
                met = tl.load(there, mask=there_is, other=0.0)
                passing = product_of_states(state, column, met, X_BORDER, at_border, oc, OUT, ON_OUT, EACH)
                tl.store(PASSING + block.to(tl.int64) * all_heads * borders + at_border, passing * (across * out_scale))
            state, column = decayed(state, across, lost, WIDE), decayed(column, across, lost, WIDE)
            if REST != 0:
                rest, rest_column = decayed(rest, across, lost, WIDE), decayed(rest_column, across, lost, WIDE)
        if COLUMN == ON_VALUE:  # here it needs fewer registers, measured
            column += tl.sum(b.to(ACC) * kept[:, None], 0)
            if REST != 0:
                rest_column += tl.sum(b_rest.to(ACC) * kept[:, None], 0)
        elif COLUMN != NO_COLUMN:
            column += gained
            if REST != 0 and COLUMN == ON_STATE:
                rest_column += rest_gained
        if TURNED:
            state = turned_add(tl.trans(as_operand(b, DOT, PRECISION)), added, state, PRECISION, ACC)
            rest = turned_add(tl.trans(as_operand(b_rest, DOT, PRECISION)), added, rest, PRECISION, ACC)
        else:
            state = dot_add(tl.trans(as_operand(b, DOT, PRECISION)), added, state, PRECISION, ACC)
            if REST != 0:
                rest = dot_add(tl.trans(as_operand(b_rest, DOT, PRECISION)), added, rest, PRECISION, ACC)
        if SUM == OF_QUERIES and not EACH:
            if borders_here:  # rounded as products read it
                leave_at_border(state, column, S_BORDER, X_BORDER, at_border, cc, oc, CONTRACT, OUT, ON_OUT)
                if REST != 0:
                    leave_at_border(rest, column, S_BORDER, X_BORDER, at_border, rc, oc, CONTRACT, OUT, False)
        elif SUM == OF_KEYS and not EACH:
            if borders_here:  # the product of the two: all that passes, from keys to queries
                if not AHEAD:
                    there, there_is = place_at_border(S_BORDER, at_border, cc, oc, CONTRACT, OUT)
                    met = tl.load(there, mask=there_is, other=0.0)
                passing = product_of_states(state, column, met, X_BORDER, at_border, oc, OUT, ON_OUT, EACH)
                if REST != 0:
                    there, there_is = place_at_border(S_BORDER, at_border, rc, oc, CONTRACT, OUT)
                    met = tl.load(there, mask=there_is, other=0.0)
                    passing += product_of_states(rest, column, met, X_BORDER, at_border, oc, OUT, False, EACH)
                tl.store(PASSING + block.to(tl.int64) * all_heads * borders + at_border, passing * out_scale)

    if HAS_OUT:
        tl.store(S_OUT + state_base + state_at, state * tl.full([], scale_leave, ACC), mask=in_state)
        if COLUMN == ON_VALUE or COLUMN == ON_STATE:
            if block == 0:
                tl.store(X_OUT + column_base + cc, column * tl.full([], scale_leave, ACC), mask=cc < CONTRACT)
        if REST != 0:
            tl.store(S_OUT + state_base + rest_at, rest * tl.full([], scale_leave, ACC), mask=in_rest)
            if COLUMN == ON_VALUE or COLUMN == ON_STATE:
                if block == 0:
                    tl.store(X_OUT + column_base + rc, rest_column * tl.full([], scale_leave, ACC), mask=rc < CONTRACT)
    if HAS_TOTAL:
        if block == 0:
            tl.store(TOTAL + bh * segments + segment, passed)
