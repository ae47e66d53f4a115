"""The tile kernels: one sweep over a sequence, and the scan that joins segments. Import needs Triton.

Within a chunk the masked quadratic form, between chunks a state in registers (Lightning Attention-2, arXiv 2401.04658,
algorithm 1). The forward and all three gradients are this one sweep with exchanged operands (`spec.differentiate`).

Weights are powers of two of differences of log-decays within a chunk, later step minus earlier; no cumulative sum of
the whole sequence is ever exponentiated. Row offsets are 64-bit, offsets inside a tile 32-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# How the normaliser's column takes part in a sweep.
NO_COLUMN = tl.constexpr(0)
ON_VALUE = tl.constexpr(1)  # value has a column of ones; its output is the normaliser
ON_LEFT = tl.constexpr(2)  # left has the column x, right ones
ON_RIGHT = tl.constexpr(3)  # right has the column x, left ones
ON_STATE = tl.constexpr(4)  # states only: value has the column x
ONES = tl.constexpr(5)  # value is a column of ones and is not read

# What a sweep of the backward sums for the log-decay's gradient.
OF_QUERIES = tl.constexpr(1)  # with grad_q: q.grad_q less k.grad_k of pairs in a chunk, q.grad_q of what came before it
OF_KEYS = tl.constexpr(2)  # with grad_k: k.grad_k of what lies behind the chunk


@triton.jit
def _load_tile(pointer, offset, stride_row, stride_col, rows, valid, cols, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a tile, zero outside the sequence and beyond the operand's features. WIDTH 0: columns need no mask."""
    mask = valid[:, None]
    if WIDTH != 0:
        mask = mask & (cols < WIDTH)[None, :]
    return tl.load(pointer + offset + rows[:, None] * stride_row + cols[None, :] * stride_col, mask=mask, other=0.0)


@triton.jit
def _operand(x, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """A tile as a dot takes it. Tensor cores cut fp32 to TF32; half a unit more makes that rounding, as cuBLAS does."""
    x = x.to(DOT)
    if PRECISION == "tf32" and x.dtype == tl.float32:
        x = (x.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _meet(
    S_BORDER, X_BORDER, PASSING, state, column, border, result, at, cc, oc,
    CONTRACT: tl.constexpr, OUT: tl.constexpr, SUM: tl.constexpr, COLUMN: tl.constexpr,
):  # fmt: skip
    """At a border of two blocks of steps: leave the state for the other sweep, or multiply with what it left."""
    held = S_BORDER + border * CONTRACT * OUT + at
    mask = (cc < CONTRACT)[:, None] & (oc < OUT)[None, :]
    if SUM == OF_QUERIES:
        tl.store(held, state.to(S_BORDER.dtype.element_ty), mask=mask)
        if COLUMN == ON_LEFT:
            tl.store(X_BORDER + border * OUT + oc, column, mask=oc < OUT)
    else:
        product = tl.sum(tl.sum(state * tl.load(held, mask=mask, other=0.0).to(state.dtype), 1), 0)
        if COLUMN == ON_RIGHT:
            product += tl.sum(column * tl.load(X_BORDER + border * OUT + oc, mask=oc < OUT, other=0.0), 0)
        tl.store(PASSING + result, product)


# What changes with the batch and the length is not specialised on: a new length must not compile anything. ALIGN says
# of which power of two (in elements, at most 16) all head and batch strides are multiples, so that loads stay wide.
@triton.jit(
    do_not_specialize=[
        "n", "per_segment", "segments", "borders", "heads", "scale_state", "scale_out",
        "a_b", "a_h", "b_b", "b_h", "v_b", "v_h", "o_b", "o_h", "w_b", "w_h", "g_b", "g_h",
    ]
)  # fmt: skip
def sweep(
    A, B, V, O, W, X, G, Z, SUMS, S_BORDER, X_BORDER, PASSING, S_IN, X_IN, S_OUT, X_OUT, TOTAL,
    a_b, a_h, a_n, a_d, b_b, b_h, b_n, b_d, v_b, v_h, v_n, v_d, o_b, o_h, o_n, o_d, w_b, w_h, w_n, w_d, g_b, g_h, g_n,
    n, per_segment, segments, borders, heads, a_group, b_group, v_group, w_group, scale_state, scale_out,
    CONTRACT: tl.constexpr, OUT: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, STRICT: tl.constexpr, DECAY: tl.constexpr, COLUMN: tl.constexpr, TRANSPOSED: tl.constexpr,
    OUTPUT: tl.constexpr, SUM: tl.constexpr, BETWEEN: tl.constexpr, HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr,
    HAS_TOTAL: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, LOWEST: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """O = scale_out * LA(A, B, scale_state * V) for one segment of one head and one block of O's features.

    A, B [.., N, CONTRACT], V, O, W [.., N, OUT]. S_IN, S_OUT [B*H, segments, CONTRACT, OUT] (TRANSPOSED: the last two
    exchanged), X_* their normaliser part. TOTAL [B*H, segments], in powers of two. DECAY 0: none, 1: G[heads], 2:
    G[B, H, N]. OUTPUT False: states only.

    SUM: row sums of O * W for the log-decay's gradient, SUMS [blocks, B*H, N], own positions left out. S_BORDER
    [B*H, borders, CONTRACT, OUT] holds a state of each sweep that meets at every BETWEEN positions: OF_QUERIES writes
    it, OF_KEYS multiplies it with its own, PASSING [blocks, B*H, borders].
    """
    program = tl.program_id(0)
    bh, segment = program // segments, program % segments
    batch, head = (bh // heads).to(tl.int64), bh % heads
    bh, block = bh.to(tl.int64), tl.program_id(1)
    rows, cc, oc = tl.arange(0, C), tl.arange(0, BC), block * BO + tl.arange(0, BO)
    C_MASK: tl.constexpr = 0 if BC == CONTRACT else CONTRACT
    O_MASK: tl.constexpr = 0 if OUT % BO == 0 else OUT

    a_base = tl.multiple_of(batch * a_b + (head // a_group).to(tl.int64) * a_h, ALIGN)
    b_base = tl.multiple_of(batch * b_b + (head // b_group).to(tl.int64) * b_h, ALIGN)
    v_base = tl.multiple_of(batch * v_b + (head // v_group).to(tl.int64) * v_h, ALIGN)
    o_base = tl.multiple_of(batch * o_b + head.to(tl.int64) * o_h, ALIGN)
    w_base = tl.multiple_of(batch * w_b + (head // w_group).to(tl.int64) * w_h, ALIGN)
    g_base = batch * g_b + head.to(tl.int64) * g_h

    SUMMED: tl.constexpr = tl.float64 if V.dtype.element_ty == tl.float32 else ACC  # of decays within a chunk
    # query minus key position, in the direction of the sweep
    gap = rows[None, :] - rows[:, None] if REVERSE else rows[:, None] - rows[None, :]
    allowed = gap > 0 if STRICT else gap >= 0
    into_state, out_of_sweep = tl.full([], scale_state, ACC), tl.full([], scale_out, ACC)
    scale = into_state * out_of_sweep
    inside = tl.where(allowed, scale, 0.0)
    if DECAY == 1:
        g = tl.maximum(tl.load(G + g_base).to(ACC) * LOG2E, LOWEST)
        inside = tl.where(allowed, tl.exp2(g * tl.where(allowed, gap, 0).to(ACC)) * scale, 0.0)
        since = tl.exp2(g * (rows + 1).to(ACC))

    if TRANSPOSED:
        state_at = oc[None, :] * CONTRACT + cc[:, None]
    else:
        state_at = cc[:, None] * OUT + oc[None, :]
    state_at_border = cc[:, None] * OUT + oc[None, :]
    in_state = (cc < CONTRACT)[:, None] & (oc < OUT)[None, :]
    state_base = (bh * segments + segment) * CONTRACT * OUT
    column_base = (bh * segments + segment) * (OUT if COLUMN == ON_LEFT or COLUMN == ON_RIGHT else CONTRACT)
    state = tl.zeros([BC, BO], ACC)
    # The column's state is a vector, updated and read by sums: a dot with 16 columns of which one is used gives wrong
    # results on Hopper (Triton 3.6).
    column = tl.zeros([BO if COLUMN == ON_LEFT or COLUMN == ON_RIGHT else BC], ACC)
    if HAS_IN:
        state = tl.load(S_IN + state_base + state_at, mask=in_state, other=0.0)
        if COLUMN == ON_VALUE:
            column = tl.load(X_IN + column_base + cc, mask=cc < CONTRACT, other=0.0)
        elif COLUMN == ON_LEFT or COLUMN == ON_RIGHT:
            column = tl.load(X_IN + column_base + oc, mask=oc < OUT, other=0.0)
    passed = tl.full([], 0.0, ACC)

    first = segment * per_segment
    count = tl.minimum(per_segment, (n + C - 1) // C - first)
    sum_row = (block.to(tl.int64) * (tl.num_programs(0) // segments) + bh)
    for step in range(0, count):
        t = (first + (count - 1 - step if REVERSE else step)) * C
        t64 = t.to(tl.int64)
        filled = tl.minimum(n - t, C)
        valid = rows < filled
        b = _load_tile(B, b_base + t64 * b_n, b_n, b_d, rows, valid, cc, C_MASK, BC)
        if COLUMN == ONES:
            v = tl.where(valid[:, None] & (oc == 0)[None, :], 1.0, 0.0).to(V.dtype.element_ty)
        else:
            v = _load_tile(V, v_base + t64 * v_n, v_n, v_d, rows, valid, oc, O_MASK, BO)
        at_border = (t % BETWEEN == 0) & (t > 0)
        if SUM != 0 and not REVERSE:
            if at_border:
                _meet(S_BORDER, X_BORDER, PASSING, state, column, bh * borders + t // BETWEEN - 1,
                      sum_row * borders + t // BETWEEN - 1, state_at_border, cc, oc, CONTRACT, OUT, SUM, COLUMN)
        if COLUMN == ON_LEFT or COLUMN == ON_RIGHT or COLUMN == ON_STATE:
            x = tl.load(X + bh * n + t64 + rows, mask=valid, other=0.0)

        # since: decay from the chunk's start up to a row; until: from a row to the chunk's end; across: all of it
        if DECAY == 1:
            until = tl.exp2(g * tl.maximum(filled - 1 - rows, 0).to(ACC))
            log_across = g * filled.to(ACC)
        elif DECAY == 2:
            g = tl.load(G + g_base + (t64 + rows) * g_n, mask=valid, other=0.0).to(SUMMED) * LOG2E
            g = tl.maximum(g, LOWEST)
            exact = tl.cumsum(g, 0)
            total = tl.sum(g, 0)
            reached = exact.to(ACC)
            since = tl.exp2(reached)
            until = tl.exp2((total - exact).to(ACC))
            log_across = total.to(ACC)
        if DECAY != 0:
            across = tl.exp2(log_across)
            if HAS_TOTAL:
                passed += log_across

        if OUTPUT:
            a = _load_tile(A, a_base + t64 * a_n, a_n, a_d, rows, valid, cc, C_MASK, BC)
            left = _operand(a, DOT, PRECISION)
            scores = tl.dot(left, tl.trans(_operand(b, DOT, PRECISION)), input_precision=PRECISION, out_dtype=ACC)
            o = tl.dot(left, _operand(state, DOT, PRECISION), input_precision=PRECISION, out_dtype=ACC)
            if COLUMN == ON_LEFT:
                scores += x[:, None]
                o += x[:, None] * column[None, :]
            elif COLUMN == ON_RIGHT:
                scores += x[None, :]
                o += column[None, :]
            if DECAY == 2:
                steps = reached[None, :] - reached[:, None] if REVERSE else reached[:, None] - reached[None, :]
                if SUMMED != ACC:  # what the sums lost when they were rounded, for their difference is far smaller
                    lost = (exact - reached.to(SUMMED)).to(ACC)
                    steps += lost[None, :] - lost[:, None] if REVERSE else lost[:, None] - lost[None, :]
                inside = tl.where(allowed, tl.exp2(tl.where(allowed, steps, 0.0)) * scale, 0.0)
            if DECAY == 0:
                weight = tl.full([C], 1.0, ACC) * out_of_sweep
            else:
                weight = (until if REVERSE else since) * out_of_sweep
            o *= weight[:, None]
            scores *= inside
            if SUM != 0:
                w = _load_tile(W, w_base + t64 * w_n, w_n, w_d, rows, valid, oc, O_MASK, BO)
                row_sums = tl.sum(o * w.to(ACC), 1)
                if SUM == OF_QUERIES:
                    # both sums of one product, so that their errors cancel as they do
                    keys = tl.trans(_operand(v, DOT, PRECISION))
                    w = _operand(w, DOT, PRECISION)
                    pairs = tl.dot(w, keys, input_precision=PRECISION, out_dtype=ACC)
                    pairs = tl.where(gap > 0, pairs * scores, 0.0)
                    row_sums += tl.sum(pairs, 1) - tl.sum(pairs, 0)
                tl.store(SUMS + sum_row * n + t64 + rows, row_sums, mask=valid)
            if COLUMN == ON_VALUE:
                z = tl.sum(scores, 1) + weight * tl.sum(a.to(ACC) * column[None, :], 1)
                if block == 0:
                    tl.store(Z + bh * n + t64 + rows, z, mask=valid)
            scores = _operand(scores, DOT, PRECISION)
            o += tl.dot(scores, _operand(v, DOT, PRECISION), input_precision=PRECISION, out_dtype=ACC)
            o_at = o_base + t64 * o_n + rows[:, None] * o_n + oc[None, :] * o_d
            o_mask = valid[:, None]
            if O_MASK != 0:
                o_mask = o_mask & (oc < OUT)[None, :]
            tl.store(O + o_at, o.to(O.dtype.element_ty), mask=o_mask)

        if DECAY == 0:
            added = v.to(ACC) * into_state
            kept = tl.full([C], 1.0, ACC) * into_state
        else:
            kept = (since if REVERSE else until) * into_state
            added = v.to(ACC) * kept[:, None]
            state *= across
            column *= across
        if COLUMN == ON_VALUE or COLUMN == ON_STATE:
            ones = kept * x if COLUMN == ON_STATE else kept
            column += tl.sum(b.to(ACC) * ones[:, None], 0)
        elif COLUMN == ON_LEFT:
            column += tl.sum(added, 0)
        elif COLUMN == ON_RIGHT:
            column += tl.sum(added * x[:, None], 0)
        right, added = tl.trans(_operand(b, DOT, PRECISION)), _operand(added, DOT, PRECISION)
        state += tl.dot(right, added, input_precision=PRECISION, out_dtype=ACC)
        if SUM != 0 and REVERSE:
            if at_border:
                _meet(S_BORDER, X_BORDER, PASSING, state, column, bh * borders + t // BETWEEN - 1,
                      sum_row * borders + t // BETWEEN - 1, state_at_border, cc, oc, CONTRACT, OUT, SUM, COLUMN)

    if HAS_OUT:
        tl.store(S_OUT + state_base + state_at, state, mask=in_state)
        if COLUMN == ON_VALUE or COLUMN == ON_STATE:
            if block == 0:
                tl.store(X_OUT + column_base + cc, column, mask=cc < CONTRACT)
    if HAS_TOTAL:
        if block == 0:
            tl.store(TOTAL + bh * segments + segment, passed)


@triton.jit(do_not_specialize=["segments", "size"])
def join_segments(
    S, TOTAL, FIRST, LAST, segments, size,
    BLOCK: tl.constexpr, REVERSE: tl.constexpr, HAS_TOTAL: tl.constexpr, HAS_FIRST: tl.constexpr,
    HAS_LAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """S [B*H, segments, size], in place: what each segment adds becomes the state that enters it.

    FIRST, LAST [B*H, size]: the states that enter and leave the whole sequence.
    """
    bh = tl.program_id(0).to(tl.int64)
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = x < size
    state = tl.zeros([BLOCK], ACC)
    if HAS_FIRST:
        state = tl.load(FIRST + bh * size + x, mask=inside, other=0.0)
    for step in range(0, segments):
        at = bh * segments + (segments - 1 - step if REVERSE else step)
        added = tl.load(S + at * size + x, mask=inside, other=0.0)
        tl.store(S + at * size + x, state, mask=inside)
        if HAS_TOTAL:
            state *= tl.exp2(tl.load(TOTAL + at))
        state += added
    if HAS_LAST:
        tl.store(LAST + bh * size + x, state, mask=inside)


@triton.jit(do_not_specialize=["n", "borders"])
def join_sums(
    QUERIES, KEYS, PASSING, END, OUT, n, borders, query_blocks, key_blocks,
    BETWEEN: tl.constexpr, REVERSE: tl.constexpr, HAS_END: tl.constexpr,
):  # fmt: skip
    """OUT [B*H, N], the gradient of each step's log-decay, from what the sweeps summed.

    It is a running sum of QUERIES - KEYS from the last step on, but starts anew from PASSING at each border, so that
    rounding does not walk along the sequence. fp64: the terms of the sum cancel.
    """
    bh, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    # back to front, for the sum runs that way
    t = block * BETWEEN + (BETWEEN - 1 - tl.arange(0, BETWEEN))
    sums = tl.zeros([BETWEEN], tl.float64)
    for i in range(0, query_blocks):
        sums += tl.load(QUERIES + (i * tl.num_programs(0) + bh) * n + t, mask=t < n, other=0.0).to(tl.float64)
    for i in range(0, key_blocks):
        sums -= tl.load(KEYS + (i * tl.num_programs(0) + bh) * n + t, mask=t < n, other=0.0).to(tl.float64)
    if REVERSE:
        sums = -sums
    gradient = tl.cumsum(sums, 0)
    if block < borders:
        for i in range(0, key_blocks):
            gradient += tl.load(PASSING + (i * tl.num_programs(0) + bh) * borders + block).to(tl.float64)
    elif HAS_END:
        gradient += tl.load(END + bh).to(tl.float64)
    if REVERSE:  # only differences of running sums matter, and none of them holds step 1
        gradient = tl.where(t == 0, 0.0, gradient)
    tl.store(OUT + bh * n + t, gradient.to(OUT.dtype.element_ty), mask=t < n)
