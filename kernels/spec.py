"""What is computed: a specification of causal linear attention, and its derivative as four more of the same kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Decay = Literal["none", "head", "step"]
Operand = Literal["q", "k", "v", "grad_o"]
Output = Literal["o", "grad_q", "grad_k", "grad_v"]
Exact = frozenset[Output]  # outputs that are left in the accumulation dtype, for others are to be added
ROUNDED: Exact = frozenset()


@dataclass(frozen=True)
class Specification:
    """One member of the family `o_i = scale * sum_j (q_i . k_j) w_ij v_j`.

    `reverse` sums over `j >= i` instead of `j <= i`; `strict` leaves out `j = i`. `decay` is the form of the log-decay:
    none, one number a head, or one a head and step. `normalizer` asks for `z_i = scale * sum_j (q_i . k_j) w_ij`;
    `initial_state` and `final_state` say whether a state enters and leaves.
    """

    strict: bool = False
    reverse: bool = False
    decay: Decay = "none"
    normalizer: bool = False
    initial_state: bool = False
    final_state: bool = False


@dataclass(frozen=True)
class Role:
    """One sweep `out = LA(left, right, value)` over the sequence, with the state `sum_j w right_j^T value_j`.

    `transposed`: the state that enters is stored with its two axes the other way round (a role of the backward reads
    the state of q, k, v from the side of v). `partner` has the shape of the output; the row sums of `out * partner` are
    what the log-decay's gradient is made of. `scale_on_state`: the scale multiplies what is added to the state instead
    of the output, so that a state entering from outside is not scaled.
    """

    out: Output
    left: Operand
    right: Operand
    value: Operand
    partner: Operand | None
    reverse: bool
    strict: bool
    decay: Decay
    transposed: bool
    scale_on_state: bool


@dataclass(frozen=True)
class Roles:
    """A specification's own sweep and those of its derivative."""

    forward: Role
    grad_q: Role
    grad_k: Role
    grad_v: Role


def differentiate(spec: Specification) -> Roles:
    """The four sweeps that compute `spec` and its gradients.

    With `o = LA(q, k, v)`, the family is closed under differentiation (exchange the sums over i and j):

        grad_q = LA(grad_o, v, k)     grad_k = LA^R(v, grad_o, q)     grad_v = LA^R(k, q, grad_o)

    where `LA^R` runs the other way. A normaliser is a column of ones on `v`, and its gradient a last column of
    `grad_o`. The gradient of the initial state is the state with which `LA^R(k, q, grad_o)` ends.
    """

    def role(
        out: Output,
        operands: tuple[Operand, Operand, Operand],
        partner: Operand | None,
        backwards: bool,
        transposed: bool,
    ) -> Role:
        return Role(
            out,
            *operands,
            partner=partner,
            reverse=spec.reverse != backwards,
            strict=spec.strict,
            decay=spec.decay,
            transposed=transposed,
            scale_on_state=backwards,
        )

    return Roles(
        forward=role("o", ("q", "k", "v"), None, False, False),
        grad_q=role("grad_q", ("grad_o", "v", "k"), "q", False, True),
        grad_k=role("grad_k", ("v", "grad_o", "q"), "k", True, True),
        grad_v=role("grad_v", ("k", "q", "grad_o"), None, True, False),
    )
