"""The small kernels beside the sweep: sums of log-decays, the scan over segments, the log-decay's gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import LOG2E, i64

# What is known of the running sum at an end of the sequence.
UNKNOWN = tl.constexpr(0)
NOTHING = tl.constexpr(1)
GIVEN = tl.constexpr(2)


@triton.jit(do_not_specialize=["n", "heads", "g_b", "g_h"])
def chunk_sums(
    G, OUT, n, heads, g_b: i64, g_h: i64, g_n,
    C: tl.constexpr, ROWS: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """OUT [B*H, chunks * C]: sums of the log-decay G [B, H, N] from the start of each chunk of C steps, in powers of two."""
    bh = tl.program_id(0).to(tl.int64)
    t = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None] * C + tl.arange(0, C)[None, :]
    at = G + (bh // heads) * g_b + (bh % heads) * g_h + t.to(tl.int64) * g_n
    g = tl.load(at, mask=t < n, other=0.0).to(tl.float64) * LOG2E
    sums = tl.cumsum(tl.maximum(g, LOWEST), 1)
    padded = (n + C - 1) // C * C
    tl.store(OUT + bh * padded + t, sums.to(OUT.dtype.element_ty), mask=t < padded)


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
    at = bh * segments + (segments - 1 if REVERSE else 0)
    added = tl.load(S + at * size + x, mask=inside, other=0.0)
    kept = tl.full([], 1.0, ACC)
    if HAS_TOTAL:
        kept = tl.exp2(tl.load(TOTAL + at))
    for step in range(0, segments):
        # the next is read before this one is written to: the compiler cannot know that they lie apart
        following = bh * segments + (tl.maximum(segments - 2 - step, 0) if REVERSE else tl.minimum(step + 1, segments - 1))
        adds = tl.load(S + following * size + x, mask=inside, other=0.0)
        keeps = kept
        if HAS_TOTAL:
            keeps = tl.exp2(tl.load(TOTAL + following))
        tl.store(S + at * size + x, state, mask=inside)
        state = state * kept + added
        at, added, kept = following, adds, keeps
    if HAS_LAST:
        tl.store(LAST + bh * size + x, state, mask=inside)


@triton.jit(do_not_specialize=["n", "borders"])
def join_sums(
    QUERIES, KEYS, PASSING, START, END, OUT, n, borders, query_blocks, key_blocks, passing_blocks,
    BETWEEN: tl.constexpr, REVERSE: tl.constexpr, AT_START: tl.constexpr, AT_END: tl.constexpr,
):  # fmt: skip
    """OUT [B*H, N], the gradient of each step's log-decay, from what the sweeps summed.

    It is a running sum of QUERIES - KEYS, and at borders also known as such: PASSING, and START and END [B*H] at the ends of the
    sequence, where AT_START and AT_END are GIVEN. The sum goes from each border to the one before it, where it misses what is
    known by the rounding of its terms. That is taken off each by its share: errors are taken to be independent, and as large as
    the terms are. fp64: the terms of the sum cancel.
    """
    bh, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    # back to front, for the sum runs that way
    t = block * BETWEEN + (BETWEEN - 1 - tl.arange(0, BETWEEN))
    queries, keys = tl.zeros([BETWEEN], tl.float64), tl.zeros([BETWEEN], tl.float64)
    for i in range(0, query_blocks):
        queries += tl.load(QUERIES + (i * tl.num_programs(0) + bh) * n + t, mask=t < n, other=0.0).to(tl.float64)
    for i in range(0, key_blocks):
        keys += tl.load(KEYS + (i * tl.num_programs(0) + bh) * n + t, mask=t < n, other=0.0).to(tl.float64)
    sums = keys - queries if REVERSE else queries - keys
    from_border, to_border, known = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64), AT_START != UNKNOWN
    if block < borders:
        for i in range(0, passing_blocks):
            from_border += tl.load(PASSING + (i * tl.num_programs(0) + bh) * borders + block).to(tl.float64)
    elif AT_END == GIVEN:
        from_border += tl.load(END + bh).to(tl.float64)
    if block > 0:
        known = True
        for i in range(0, passing_blocks):
            to_border += tl.load(PASSING + (i * tl.num_programs(0) + bh) * borders + block - 1).to(tl.float64)
    elif AT_START == GIVEN:
        to_border += tl.load(START + bh).to(tl.float64)
    gradient = from_border + tl.cumsum(sums, 0)
    missed = to_border - (from_border + tl.sum(sums, 0))
    squares = queries * queries + keys * keys
    so_far = from_border * from_border + tl.cumsum(squares, 0)
    all_squares = from_border * from_border + tl.sum(squares, 0) + to_border * to_border
    share = tl.where((all_squares > 0.0) & (all_squares < float("inf")) & known, so_far / all_squares, 0.0)
    gradient += tl.where(share > 0.0, missed * share, 0.0)
    if REVERSE:  # only differences of running sums matter, and none of them holds step 1
        gradient = tl.where(t == 0, 0.0, gradient)
    tl.store(OUT + bh * n + t, gradient.to(OUT.dtype.element_ty), mask=t < n)


@triton.jit(do_not_specialize=["n", "chunks"])
def join_chunks(
    QUERIES, KEYS, PASSING, OUT, n, chunks, query_parts, key_parts, passing_parts,
    C: tl.constexpr, SPLIT: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """OUT [B*H, N], the gradient of each step's log-decay, from sums at each chunk: nothing that is large is taken off again.

    A step is passed by what passes all of its chunk (PASSING), by what reaches a query at or behind it from before the chunk, by
    what goes from a key before it to behind the chunk (reversed: the other way round), and by pairs inside of the chunk. KEYS has
    SPLIT parts of sums, as many and one more of pairs, for each block.
    """
    bh, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t = chunk * C + (C - 1 - tl.arange(0, C))  # back to front, as the sums run
    queries, keys, pairs = tl.zeros([C], tl.float64), tl.zeros([C], tl.float64), tl.zeros([C], tl.float64)
    passing = tl.full([], 0.0, tl.float64)
    for i in range(0, passing_parts):
        passing += tl.load(PASSING + (i * tl.num_programs(0) + bh) * chunks + chunk).to(tl.float64)
    for i in range(0, query_parts):
        queries += tl.load(QUERIES + (i * tl.num_programs(0) + bh) * n + t, mask=t < n, other=0.0).to(tl.float64)
    for i in range(0, key_parts):
        x = tl.load(KEYS + (i * tl.num_programs(0) + bh) * n + t, mask=t < n, other=0.0).to(tl.float64)
        of_state = i % (2 * SPLIT + 1) < SPLIT
        keys += tl.where(of_state, x, 0.0)
        pairs += tl.where(of_state, 0.0, x)
    if REVERSE:
        behind, before = keys + pairs, queries
    else:
        behind, before = queries - pairs, keys
    gradient = passing + tl.cumsum(behind, 0) + (tl.sum(before, 0) - tl.cumsum(before, 0))
    if REVERSE:  # nothing passes step 1
        gradient = tl.where(t == 0, 0.0, gradient)
    tl.store(OUT + bh * n + t, gradient.to(OUT.dtype.element_ty), mask=t < n)
