"""The small kernels beside the sweep: sums of log-decays, the scan over segments, the log-decay's gradient.

WAITS: see `sweep`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .arithmetic import LOG2E, i64

# What is known of the running sum at an end of the sequence.
UNKNOWN = tl.constexpr(0)
NOTHING = tl.constexpr(1)
GIVEN = tl.constexpr(2)


@triton.jit(do_not_specialize=["n", "heads", "g_b", "g_h"])
def chunk_sums(
    G, OUT, n, heads, g_b: i64, g_h: i64, g_n,
    C: tl.constexpr, ROWS: tl.constexpr, LOWEST: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """OUT [B*H, chunks * C]: sums of the log-decay G [B, H, N] from the start of each chunk of C steps, in powers of two."""
    if WAITS:
        gdc_wait()
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
    HAS_LAST: tl.constexpr, ACC: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """S [B*H, segments, size], in place: what each segment adds becomes the state that enters it.

    FIRST, LAST [B*H, size]: the states that enter and leave the whole sequence.
    """
    if WAITS:
        gdc_wait()
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


@triton.jit
def sums_at(ROWS, t, bh, n, parts, SPLIT: tl.constexpr, PAIRS: tl.constexpr):
    """What a sweep has summed at the positions t: of states, and of pairs inside of its chunks. A block of it has SPLIT parts of
    the first; with PAIRS as many and one more of the second."""
    PER_BLOCK: tl.constexpr = 2 * SPLIT + 1 if PAIRS else SPLIT
    of_states, of_pairs = tl.zeros(t.shape, tl.float64), tl.zeros(t.shape, tl.float64)
    for i in range(0, parts):
        x = tl.load(ROWS + (i * tl.num_programs(0) + bh) * n + t, mask=t < n, other=0.0).to(tl.float64)
        of_state = i % PER_BLOCK < SPLIT
        of_states += tl.where(of_state, x, 0.0)
        of_pairs += tl.where(of_state, 0.0, x)
    return of_states, of_pairs


@triton.jit(do_not_specialize=["n", "borders"])
def join_sums(
    QUERIES, KEYS, PASSING, START, END, OUT, n, borders, query_parts, key_parts, passing_parts,
    BETWEEN: tl.constexpr, REVERSE: tl.constexpr, AT_START: tl.constexpr, AT_END: tl.constexpr,
    SPLIT_QUERIES: tl.constexpr, SPLIT_KEYS: tl.constexpr, PAIRS_OF_QUERIES: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """OUT [B*H, N], the gradient of each step's log-decay, from what the sweeps summed.

    It is a running sum of QUERIES - KEYS, and at borders also known as such: PASSING, and START and END [B*H] at the ends of the
    sequence, where AT_START and AT_END are GIVEN. The sum goes from each border to the one before it, where it misses what is
    known by the rounding of its terms. That is taken off each by its share: errors are taken to be independent, and as large as
    what was read from states, which are rounded; pairs are not, and neither is the key (reversed: the query) beside the end where
    the sum begins: what is given there was multiplied as it is read, and nothing decays between. fp64: the terms of the sum
    cancel. Behind START [B*H] lies the same as it is, and not as products read it.
    """
    if WAITS:
        gdc_wait()
    bh, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    # back to front, for the sum runs that way
    t = block * BETWEEN + (BETWEEN - 1 - tl.arange(0, BETWEEN))
    queries, query_pairs = sums_at(QUERIES, t, bh, n, query_parts, SPLIT_QUERIES, PAIRS_OF_QUERIES)
    keys, key_pairs = sums_at(KEYS, t, bh, n, key_parts, SPLIT_KEYS, not PAIRS_OF_QUERIES)
    sums = queries + query_pairs - keys - key_pairs
    if REVERSE:
        sums = -sums
    from_border, to_border, known = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64), AT_START != UNKNOWN
    if block < borders:
        for i in range(0, passing_parts):
            from_border += tl.load(PASSING + (i * tl.num_programs(0) + bh) * borders + block).to(tl.float64)
    elif AT_END == GIVEN:
        from_border += tl.load(END + bh).to(tl.float64)
    if block > 0:
        known = True
        for i in range(0, passing_parts):
            to_border += tl.load(PASSING + (i * tl.num_programs(0) + bh) * borders + block - 1).to(tl.float64)
    elif AT_START == GIVEN:
        to_border += tl.load(START + bh).to(tl.float64)
    gradient = from_border + tl.cumsum(sums, 0)
    missed = to_border - (from_border + tl.sum(sums, 0))
    squares = queries * queries + keys * keys
    if AT_END == GIVEN:
        squares = tl.where(t == n - 1, queries * queries if not REVERSE else keys * keys, squares)
    so_far, all_squares = tl.cumsum(squares, 0), tl.sum(squares, 0)
    share = tl.where((all_squares > 0.0) & (all_squares < float("inf")) & known, so_far / all_squares, 0.0)
    gradient += tl.where(share > 0.0, missed * share, 0.0)
    if not REVERSE and AT_START == GIVEN:  # no sum is needed for step 1: all that passes it is known
        gradient = tl.where(t == 0, tl.load(START + tl.num_programs(0) + bh).to(tl.float64), gradient)
    if REVERSE:  # only differences of running sums matter, and none of them holds step 1
        gradient = tl.where(t == 0, 0.0, gradient)
    tl.store(OUT + bh * n + t, gradient.to(OUT.dtype.element_ty), mask=t < n)


@triton.jit(do_not_specialize=["n", "chunks"])
def join_chunks(
    QUERIES, KEYS, PASSING, OUT, n, chunks, query_parts, key_parts, passing_parts,
    C: tl.constexpr, SPLIT_QUERIES: tl.constexpr, SPLIT_KEYS: tl.constexpr, REVERSE: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """OUT [B*H, N], the gradient of each step's log-decay, from sums at each chunk: nothing that is large is taken off again.

    A step is passed by what passes all of its chunk (PASSING), by what reaches a query at or behind it from before the chunk, by
    what goes from a key before it to behind the chunk (reversed: the other way round), and by pairs inside of the chunk, summed
    with KEYS. Sums are in fp64: a pair behind the step is in that of its row and in that of its column.
    """
    if WAITS:
        gdc_wait()
    bh, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t = chunk * C + (C - 1 - tl.arange(0, C))  # back to front, as the sums run
    passing = tl.full([], 0.0, tl.float64)
    for i in range(0, passing_parts):
        passing += tl.load(PASSING + (i * tl.num_programs(0) + bh) * chunks + chunk).to(tl.float64)
    queries, _ = sums_at(QUERIES, t, bh, n, query_parts, SPLIT_QUERIES, False)
    keys, pairs = sums_at(KEYS, t, bh, n, key_parts, SPLIT_KEYS, True)
    if REVERSE:
        behind, before = keys + pairs, queries
    else:
        behind, before = queries - pairs, keys
    gradient = passing + tl.cumsum(behind, 0) + (tl.sum(before, 0) - tl.cumsum(before, 0))
    if REVERSE:  # nothing passes step 1
        gradient = tl.where(t == 0, 0.0, gradient)
    tl.store(OUT + bh * n + t, gradient.to(OUT.dtype.element_ty), mask=t < n)
