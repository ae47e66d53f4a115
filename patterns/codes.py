"""The table of codes: why a candidate is not rewritten. `docs/codes.md` is generated from here (`python -m
lightning_compile.patterns.codes`)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import sympy

# The laws that a candidate has to pass, in the order in which they are tried. The first digit of a code is the number of
# those that hold; LC9xx stands outside of the order.
LAWS = (
    "products of tensors are summed over positions",
    "the sum is that of causal linear attention",
    "its decay is one number a head and step",
    "nothing else changes or sees what is between",
    "the operator takes such operands",
    "the checks agree",
    "it pays at these sizes",
)
MASKS = ("tril", "triu", "where", "masked_fill", "masked_fill_", "cumsum", "ge", "gt", "le", "lt")
POWERS = ("exp", "pow", "exp2", "cumprod")


@dataclass(frozen=True)
class Code:
    """One reason. `reason` may have fields in braces; `wrong` and `right` are lines of user code, `right` empty where no
    rewriting of the user's code helps. `blames` are the operations that are to blame, where what was seen names none;
    `edit` is a pattern and its replacement that mend a user's line, where that is so simple."""

    code: str
    title: str
    reason: str
    hint: str
    wrong: str = ""
    right: str = ""
    blames: tuple[str, ...] = ()
    edit: tuple[str, str] = ("", "")

    @property
    def passed(self) -> int:
        """How many of LAWS hold."""
        n = int(self.code[2])
        return n if n < len(LAWS) else 0

    @property
    def stays_slow(self) -> bool:
        """Whether the candidate is linear attention all the same, which a change of the program would make fast."""
        return self.passed in (3, 4, 5) or self.code in ("LC114", "LC204")

    def edited(self, line: str) -> tuple[str, ...]:
        """A suggested edit: of the user's line where that is simple, else as the table has it; lines that begin with - and +."""
        pattern, replacement = self.edit
        if pattern and (mended := re.sub(pattern, replacement, line)) != line:
            return f"- {line}", f"+ {mended}"
        return (f"- {self.wrong}", f"+ {self.right}") if self.right else ()


_TABLE = (
    # ------------------------------------------------------------------------ LC1xx: another function than the operator's
    Code("LC101", "not causal",
         "every position sums over all positions: no mask and no cumulative sum restricts j to j <= i",
         "add a causal mask if the model is meant to be causal; two-sided linear attention is already linear in the length "
         "when it is written as q @ (k.T @ v)",
         "(q @ k.mT) @ v", "(q @ k.mT).tril() @ v"),
    Code("LC102", "a nonlinear function of the scores",
         "{function} is applied to the scores of pairs (i, j), so the sum over j cannot be carried as a state",
         "only maps of q and of k separately (feature maps) keep attention linear; for softmax attention use "
         "scaled_dot_product_attention",
         "torch.relu((q @ k.mT).tril()) @ v", "(torch.relu(q) @ torch.relu(k).mT).tril() @ v"),
    Code("LC103", "sees later positions",
         "position i also sums over j up to i + {offset}", "check the diagonal of the mask: causal is tril(0)",
         "(q @ k.mT).tril(1) @ v", "(q @ k.mT).tril() @ v",
         blames=MASKS, edit=(r"(\btril\((?:.*\S(?=\s*,))?)\s*,?\s*(?:diagonal=)?[1-9]\d*\)", r"\1)")),
    Code("LC104", "a window", "position i sums over a window of positions, not over all j <= i",
         "a window is no running state; use a windowed kernel (flex_attention) for it",
         "((q @ k.mT) * ((i - j >= 0) & (i - j < w))) @ v",
         blames=MASKS),
    Code("LC105", "shifted", "position i sums over j <= i - {offset} only",
         "the operator includes or excludes the own position; shift k and v by a slice if the delay is meant",
         "(q @ k.mT).tril(-2) @ v", "(q @ k.mT).tril(-1) @ v",
         blames=MASKS),
    Code("LC106", "other weights",
         "the weights of the pairs (i, j) are none the operator has: {seen}",
         "write the deviating part (often the own position) as a separate sum with its own q and k",
         "(s.tril() + 2 * s.triu(1)) @ v", "s.tril() @ v",
         blames=MASKS),
    Code("LC107", "a cumulative sum over features",
         "the cumulative sum or mask runs along an axis that is no sequence of both keys and values",
         "check the dim of the cumulative sum",
         "(k[..., None] * v[..., None, :]).cumsum(-2)", "(k[..., None] * v[..., None, :]).cumsum(2)",
         blames=MASKS),
    Code("LC108", "lengths differ", "queries have {queries} positions, keys {keys}",
         "pass the earlier positions as a state (initial_state of lightning_compile.linear_attention) instead of longer "
         "keys; where dynamic lengths of an exported program are always equal, torch._check(q.shape[-2] == k.shape[-2]) says so",
         "(q[:, :, -1:] @ k.mT).tril() @ v"),
    Code("LC109", "a sum of different attentions",
         "the sum mixes terms that read different tensors, so it is no single attention",
         "assign each attention to a variable of its own and add the results",
         "((q @ k.mT).tril() + (x @ y.mT).tril(-1)) @ v", "(q @ k.mT).tril() @ v + (x @ y.mT).tril(-1) @ v"),
    Code("LC110", "a factor of pairs",
         "{leaf} multiplies the scores and depends on both positions i and j",
         "only factors that depend on i alone or on j alone, or a decay of i - j, can be carried in a state; a mask that "
         "is passed as an argument has unknown values: build it inside the model or register it as a buffer",
         "((q @ k.mT) * bias).tril() @ v", "((q @ k.mT) * torch.ones(n, n).tril()) @ v"),
    Code("LC111", "an extra contraction",
         "an index is summed that the operator does not sum: {seen}", "contract it before or after the attention",
         "torch.einsum('bhid,bhjd,bhje,bhif->bhe', ...)"),
    Code("LC112", "the state is not an outer product",
         "{leaf} enters the state with both feature axes, so keys and values cannot be told apart",
         "let k and v reach the sum as two tensors", "kv_projection(x).unflatten(-1, (d, e)).cumsum(1)"),
    Code("LC113", "a state from outside", "{leaf} enters the loop in another way than as the state that it starts from",
         "a state may enter once, before the first position", "state = state + given + k.mT @ v",
         "state = given  # before the loop"),
    Code("LC114", "a part of a loop",
         "{blocks} block(s) of a sequence attend to themselves, as this one does, but the loop as a whole, with the state that "
         "goes from block to block, is no attention that the operator computes; blocks alone would not be faster",
         "look at the update of the state: it must be state = decay * state + k.mT @ v, with one decay a head and step"),
    Code("LC115", "what is summed depends on the sum",
         "keys, queries or values are made from the state {leaf} that they are added to",
         "the delta rule and its relatives are another kernel: their state is no running sum of given keys and values",
         "state = state + k.mT @ (v - k @ state)", "state = state + k.mT @ v"),
    # ---------------------------------------------------------------------------------------------------- LC2xx: decay
    Code("LC201", "a decay that is no running product",
         "the exponent of the pair (i, j) is not a difference of sums up to i and j: {seen}",
         "a decay must be exp(G[i] - G[j]) with G a cumulative sum of log-decays, one number a head and step",
         "torch.exp(-0.1 * (i + j))", "torch.exp(-0.1 * (i - j))",
         blames=POWERS),
    Code("LC202", "a decay per feature", "the decay depends on the feature index",
         "the operator has one decay a head and step; per-feature decays (GLA, RWKV) are a different kernel",
         "k * torch.exp(-G[..., :])",
         blames=POWERS),
    Code("LC203", "weights by numbers of pairs", "the sum is weighted by numbers of pairs of positions",
         "multiply the output by numbers of i alone, k or v by numbers of j alone; a decay is a power, gamma ** (i - j)",
         "((q @ k.mT) * (i - j)).tril() @ v"),
    Code("LC204", "a decay of unknown sign", "{leaf} is a decay, and nothing says that it is positive",
         "make it, or what it is a power of, inside the model by exp or sigmoid, register it as a buffer, or pass its logarithm",
         "state = gate[:, t] * state + update", "state = torch.sigmoid(gate)[:, t] * state + update"),
    # ---------------------------------------------------------------------------------- LC3xx: what the program does else
    Code("LC301", "written to after it was read", "{leaf} is changed in place after the attention read it",
         "make a new tensor instead: k = k * 2", "s = q @ k.mT; k.mul_(2)", "s = q @ k.mT; k = k * 2"),
    Code("LC302", "a view of the output",
         "a view of {leaf}, or another name of it, was taken before a write, and is used after that",
         "take views of the output after the last write to it, or collect the pieces in a list and concatenate them"),
    Code("LC303", "dropout inside", "dropout is active on the scores or the state",
         "apply dropout to the output, or train with attention dropout 0",
         "F.dropout((q @ k.mT).tril(), 0.1) @ v", "F.dropout((q @ k.mT).tril() @ v, 0.1)"),
    Code("LC304", "under a function transform", "the attention runs inside torch.func (grad, jvp ..., or a vmap that draws "
         "random numbers, switches gradients, or has dynamic sizes) in the compiled code",
         "give the tensors their batch axis instead of vmap, or call lightning_compile.linear_attention there, which vmap and "
         "reverse mode know",
         "torch.func.vjp(lambda q: (q @ k.mT).tril() @ v, q)[0]", "(q @ k.mT).tril() @ v"),
    Code("LC305", "a gradient that is cut", "{leaf} stops the gradient of the state inside of the loop: the results are those of "
         "an attention, the gradients are not",
         "detach the state before the loop, or carry its gradient through the whole sequence",
         "state = state.detach() + k.mT @ v", "state = state + k.mT @ v"),
    # ----------------------------------------------------------------------------------------- LC4xx: operator's limits
    Code("LC401", "features too wide", "the feature size is {size}; up to 1024 are rewritten",
         "use more heads with fewer features", "q: [B, H, N, 2048]", "q: [B, 2 * H, N, 1024]"),
    Code("LC402", "dtype", "the sum runs in {dtype}; the operator takes float16, bfloat16, float32 and float64",
         "cast the operands to a floating-point type", "(q.long() @ k.long().mT).tril() @ v.long()"),
    Code("LC403", "a polynomial with too many features",
         "a polynomial of degree {degree} of the scores of {features} features is an attention over {size} features; up to "
         "1024 are rewritten",
         "use more heads with fewer features, or a polynomial of a lower degree",
         "(1 + s + s ** 2 / 2).tril() @ v"),
    Code("LC404", "no view", "an operand cannot be written as a view of {leaf}: {seen}",
         "make the tensor with the axes that the attention sums over"),
    # ------------------------------------------------------------------------------------------------ LC5xx: the checks
    Code("LC501", "check of the normal form failed",
         "at small sizes the operator differs from the normal form: {seen}",
         "this is a bug of lightning_compile; the original code runs. Please report it with the printed algebra"),
    Code("LC502", "replay of the graph failed",
         "at small sizes the operator differs from the recorded operations: {seen}",
         "this is a bug of lightning_compile; the original code runs. Please report it with the printed algebra"),
    Code("LC503", "not checkable", "the match could not be checked at compile time: {seen}",
         "options={'verify': 'off'} rewrites without the check, at your own risk"),
    # -------------------------------------------------------------------------------------------------- LC6xx: the cost
    Code("LC601", "not profitable",
         "at these sizes the original is estimated at {original} us, the operator at {operator} us",
         "options={'when': 'always'} rewrites it anyway"),
    # ---------------------------------------------------------------------------------------------------- LC9xx: errors
    Code("LC901", "error in the pass", "{seen}",
         "the model runs with plain Inductor. Please report it with the traceback (TORCH_LOGS='+lightning_compile')"),
    Code("LC902", "gave up", "the pass has taken {limit} s; what it had not decided by then is left as it is",
         "options={'time_limit': 60} allows it a minute for each graph"),
    Code("LC904", "no code for the rewritten graph", "Inductor failed on the rewritten graph, and compiled the original: {seen}",
         "the model runs with plain Inductor. Please report it with the traceback (TORCH_LOGS='+lightning_compile')"),
    Code("LC905", "a kernel that failed", "a kernel did not compile or run; the chunked form runs instead: {seen}",
         "results stay right, and are slower. This is said in a warning when it happens, and in no report: look for the "
         "device's memory, and for a Triton that knows the device"),
    Code("LC906", "no code for a backward", "Inductor failed on a backward graph, which it compiles at its first call where "
         "sizes are dynamic; its operations run one by one: {seen}",
         "results stay right, and are slower. This is said in a warning when it happens, and in no report. Please report it with "
         "the traceback (TORCH_LOGS='+lightning_compile')"),
)

CODES: dict[str, Code] = {c.code: c for c in _TABLE}


@dataclass(unsafe_hash=True)  # not frozen: an exception on its way is written to
class NearMiss(Exception):
    """A candidate that is not rewritten: a code and what was seen, as values for the fields of the reason."""

    code: str
    seen: tuple[tuple[str, str], ...] = ()
    nodes: tuple[Any, ...] = field(default=(), compare=False, repr=False)  # of the graph, that were seen
    sizes: tuple[Any, ...] = field(default=(), compare=False, repr=False)  # that were seen, and are dynamic

    @property
    def reason(self) -> str:
        return CODES[self.code].reason.format(**dict(self.seen))

    @property
    def hint(self) -> str:
        return CODES[self.code].hint

    def __str__(self) -> str:
        return f"{self.code}: {self.reason}"


def near_miss(code: str, **seen: object) -> NearMiss:
    """A near miss with values for the fields of its reason. A leaf among them names its node as one to blame."""
    nodes = (getattr(v, "node", None) for v in seen.values())
    sizes = tuple(v for v in seen.values() if isinstance(v, sympy.Basic))
    return NearMiss(code, tuple((k, str(v)) for k, v in sorted(seen.items())), tuple(n for n in nodes if n is not None), sizes)


def page() -> str:
    """docs/codes.md."""
    lines = ["# Codes", "",
             "Why a candidate was not rewritten. The original code then runs under Inductor, with the result it always "
             "had. This page is generated: `python -m lightning_compile.patterns.codes > docs/codes.md`.", ""]
    for c in _TABLE:
        lines += [f"## {c.code}: {c.title}", "", f"Reason: {c.reason}.", "", f"What to do: {c.hint}.", ""]
        if c.wrong:
            lines += ["```python", f"{c.wrong}  # {c.code}"] + ([f"{c.right}  # rewritten"] if c.right else [])
            lines += ["```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
