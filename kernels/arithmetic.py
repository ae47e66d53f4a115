"""What a sweep does with tiles and states: reads, products in parts, powers of two, sums. Import needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl

i64 = tl.int64  # as an annotation, which Triton reads by its name
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(pointer, offset, stride_row, stride_col, rows, valid, cols, WIDTH: tl.constexpr):
    """Rows of a tile, zero outside the sequence and beyond the operand's features. WIDTH 0: columns need no mask."""
    mask = valid[:, None]
    if WIDTH != 0:
        mask = mask & (cols < WIDTH)[None, :]
    return tl.load(pointer + offset + rows[:, None] * stride_row + cols[None, :] * stride_col, mask=mask, other=0.0)


@triton.jit
def store_tile(pointer, offset, stride_row, rows, valid, cols, x, WIDTH: tl.constexpr):
    mask = valid[:, None]
    if WIDTH != 0:
        mask = mask & (cols < WIDTH)[None, :]
    tl.store(pointer + offset + rows[:, None] * stride_row + cols[None, :], x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def as_operand(x, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """A tile as a dot takes it. Tensor cores cut fp32 to TF32; half a unit more makes that rounding, as cuBLAS does."""
    x = x.to(DOT)
    if PRECISION == "tf32" and x.dtype == tl.float32:
        x = (x.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def parts_of(x):
    """fp32 as a sum of three numbers of bfloat16, exact but for what is below 2^-24 of it."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """a @ b. "bf16x6": fp32 in six products of bfloat16, the small ones first."""
    if PRECISION == "bf16x6":
        a_high, a_middle, a_low = parts_of(a)
        b_high, b_middle, b_low = parts_of(b)
        x = tl.dot(a_low, b_high, out_dtype=ACC)
        x = tl.dot(a_middle, b_middle, x, out_dtype=ACC)
        x = tl.dot(a_high, b_low, x, out_dtype=ACC)
        x = tl.dot(a_middle, b_high, x, out_dtype=ACC)
        x = tl.dot(a_high, b_middle, x, out_dtype=ACC)
        x = tl.dot(a_high, b_high, x, out_dtype=ACC)
    else:
        x = tl.dot(a, b, input_precision=PRECISION, out_dtype=ACC)
    return x


@triton.jit
def dot_add(a, b, c, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """a @ b + c, in fp32 rounded once: tensor cores cut what they add to."""
    if PRECISION == "bf16x6":
        x = c + dot(a, b, PRECISION, ACC)
    else:
        x = tl.dot(a, b, c, input_precision=PRECISION, out_dtype=ACC)
    return x


@triton.jit
def turned(a, b, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """a @ b as the transposed product of the transposed operands, of which tensor cores read the left one, b, from registers."""
    return tl.trans(tl.dot(tl.trans(b), tl.trans(a), input_precision=PRECISION, out_dtype=ACC))


@triton.jit
def turned_add(a, b, c, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """a @ b + c, likewise."""
    return tl.trans(tl.dot(tl.trans(b), tl.trans(a), tl.trans(c), input_precision=PRECISION, out_dtype=ACC))


@triton.jit
def exp2_and(x, lost):
    """2^(x + lost), where lost is what rounding has taken from x."""
    y = tl.exp2(x)
    return y + y * (lost * LN2)


@triton.jit
def exp2_of(x, ACC: tl.constexpr):
    """2^x in ACC, of a number that may be of a wider type: exponents of -30 in fp32 would make errors of 1e-6."""
    return tl.exp2(x).to(ACC)


@triton.jit
def decayed(x, across, lost, WIDE: tl.constexpr):
    """x * across. WIDE: and what rounding has taken from that."""
    if WIDE:
        x = x * across + x * lost
    else:
        x *= across
    return x


@triton.jit
def sums_of_rows(x, SPLIT: tl.constexpr, EXACT: tl.constexpr):
    """[C, SPLIT]: sums of each part of the columns. As many parts as groups of four warps share a row, and no sum waits for
    another group. EXACT: in fp64."""
    x = tl.reshape(x, [x.shape[0], SPLIT, x.shape[1] // SPLIT])
    if EXACT:
        x = x.to(tl.float64)
    return tl.sum(x, 2)


@triton.jit
def sums_of_columns(x, EXACT: tl.constexpr):
    if EXACT:
        x = x.to(tl.float64)
    return tl.sum(x, 0)


@triton.jit
def place_in_state(cc, oc, CONTRACT: tl.constexpr, OUT: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Where these features of a state lie, and which of them there are."""
    if TRANSPOSED:
        at = oc[None, :] * CONTRACT + cc[:, None]
    else:
        at = cc[:, None] * OUT + oc[None, :]
    return at, (cc < CONTRACT)[:, None] & (oc < OUT)[None, :]


@triton.jit
def place_at_border(S_BORDER, border, cc, oc, CONTRACT: tl.constexpr, OUT: tl.constexpr):
    """Where the state at a border of two blocks of steps lies, and what of it there is."""
    at = S_BORDER + border * CONTRACT * OUT + cc[:, None] * OUT + oc[None, :]
    return at, (cc < CONTRACT)[:, None] & (oc < OUT)[None, :]


@triton.jit
def leave_at_border(
    state, column, S_BORDER, X_BORDER, border, cc, oc, CONTRACT: tl.constexpr, OUT: tl.constexpr, COLUMN: tl.constexpr
):
    there, there_is = place_at_border(S_BORDER, border, cc, oc, CONTRACT, OUT)
    tl.store(there, state.to(S_BORDER.dtype.element_ty), mask=there_is)
    if COLUMN:
        tl.store(X_BORDER + border * OUT + oc, column, mask=oc < OUT)


@triton.jit
def product_of_states(
    state, column, met, X_BORDER, border, oc, OUT: tl.constexpr, COLUMN: tl.constexpr, EXACT: tl.constexpr
):
    """The product of two states, and of their columns. EXACT: in fp64."""
    if EXACT:
        passing = tl.sum(state.to(tl.float64) * met.to(tl.float64))
    else:
        passing = tl.sum(state * met.to(state.dtype))
    if COLUMN:
        passing += tl.sum(column * tl.load(X_BORDER + border * OUT + oc, mask=oc < OUT, other=0.0), 0)
    return passing
