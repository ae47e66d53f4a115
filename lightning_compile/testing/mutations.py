"""Mutations: one line that makes a program something else, or writes to a tensor, or looks at one twice.

A mutated program may be rewritten or not, as long as its results stay what they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from .program import LOOPS, Spec, Spelling


@dataclass(frozen=True)
class Mutation:
    """`line` is put at `place` in programs of these forms. `gradients`: whether autograd can follow (it refuses some writes)."""

    forms: tuple[str, ...]
    place: str
    line: str
    gradients: bool = True
    argument: bool = False           # whether it reads another argument, m [n, n]
    rows: bool = False               # whether it needs positions beside features

    def fits(self, spec: Spec, spelling: Spelling) -> bool:
        if spelling.form not in self.forms or self.rows and spelling.work not in ("bhnd", "xnd"):
            return False
        if self.place == "masked" and self.rows and (spec.final or spec.normaliser and spelling.denominator == "matmul"):
            return False                                    # what comes behind reads as many keys as there were
        if self.place == "before" and spelling.left.startswith("read"):
            return False
        return self.place != "collected" or spelling.collect in ("stack", "cat")


SCORES, STATE, CHUNKS, STEPS = ("scores",), ("state",), ("chunks",), ("steps",)
ANY = ("scores", "state", "chunks", "steps", "blocks")

MUTATIONS: dict[str, Mutation] = {
    # ----------------------------------------------------------------------------------------- a function of the scores
    "relu of scores": Mutation(SCORES, "before_mask", "s = s.relu()"),
    "relu of masked scores": Mutation(SCORES, "masked", "s = torch.relu(s)"),
    "square": Mutation(SCORES, "masked", "s = s * s"),
    "tanh": Mutation(SCORES, "before_mask", "s = s.tanh()"),
    "softmax": Mutation(SCORES, "masked", "s = s.softmax(-1)"),
    "softmax of other axis": Mutation(SCORES, "masked", "s = s.softmax(-2)"),
    "abs in place": Mutation(SCORES, "masked", "s = s.clone().abs_()"),
    "dropout": Mutation(SCORES, "masked", "s = F.dropout(s, 0.3)"),
    "dropout before": Mutation(SCORES, "before_mask", "s = F.dropout(s, 0.3)"),
    "constant added": Mutation(SCORES, "masked", "s = s + 0.25"),
    "scores added": Mutation(SCORES, "masked", "s = s + 0.5 * s.triu()"),
    "added in place": Mutation(SCORES, "masked", "s += 1"),
    # ------------------------------------------------------------------------------------------------------ another mask
    "transposed mask": Mutation(SCORES, "masked", "s = s.mT"),
    "mask of the transpose": Mutation(SCORES, "before_mask", "s = s.mT.tril().mT"),
    "strict": Mutation(SCORES, "before_mask", "s = s.tril(-1)"),
    "one too many": Mutation(SCORES, "before_mask", "s = s.tril(1)"),
    "two too few": Mutation(SCORES, "masked", "s = s.tril(-2)"),
    "window": Mutation(SCORES, "masked", "s = s.triu(-2)"),
    "window of later ones": Mutation(SCORES, "masked", "s = s.tril(2)"),
    "one cell of the scores": Mutation(SCORES, "masked", "s = s.clone(); s[..., -1, 0] = 0"),
    "a column of the scores": Mutation(SCORES, "masked", "s = s.clone(); s[..., 0].zero_()"),
    "an alias is masked": Mutation(SCORES, "masked", "t = s.transpose(-1, -2); t.triu_()"),
    "rolled": Mutation(SCORES, "masked", "s = s.roll(1, -1)"),
    "rows rolled": Mutation(SCORES, "masked", "s = s.roll(-1, -2)"),
    "flipped": Mutation(SCORES, "masked", "s = s.flip(-1)"),
    "flipped both": Mutation(SCORES, "masked", "s = s.flip(-1, -2)"),
    "mask over heads": Mutation(SCORES, "before_mask", "s = s.transpose(0, -1).tril().transpose(0, -1)"),
    "every second": Mutation(SCORES, "masked", "s = s * ((i[:, None] - i) % 2 == 0)"),
    "prefix": Mutation(SCORES, "masked", "s = torch.where(i < 2, 1.0, s)"),
    "argument mask": Mutation(SCORES, "before_mask", "s = s * m", argument=True),
    "argument mask filled": Mutation(SCORES, "before_mask", "s = s.masked_fill(m > 0, 0.0)", argument=True),
    "argument mask chosen": Mutation(SCORES, "masked", "s = torch.where(m > 0, s, s.mT)", argument=True),
    "last key left out": Mutation(SCORES, "masked", "s, v = s[..., :-1], v[..., :-1, :]", rows=True),
    "first key left out": Mutation(SCORES, "masked", "s, v = s[..., 1:], v[..., 1:, :]", rows=True),
    "first keys alone": Mutation(SCORES, "masked", "s, v = s[..., : n - n // 2], v[..., : n - n // 2, :]", rows=True),
    "own position twice": Mutation(SCORES, "masked", "s = s * (1 + torch.eye(n, dtype=s.dtype))"),
    "own position of other weights": Mutation(SCORES, "masked", "s = s + torch.diag_embed((q * k * 0.5).sum(-1))", rows=True),
    "other scores": Mutation(SCORES, "before_mask", "s = s + 0.3 * (q.flip(-1) @ (k * k).mT)", rows=True),
    "other scores less": Mutation(SCORES, "masked", "s = s - 0.5 * (q.flip(-1) @ k.mT).tril()", rows=True),
    "other scores, not masked": Mutation(SCORES, "masked", "s = s + 0.5 * (q.flip(-1) @ k.mT)", rows=True),
    # ----------------------------------------------------------------------------------------------------- another decay
    "position weights": Mutation(SCORES, "masked", "s = s * (i + 1)"),
    "distances": Mutation(SCORES, "masked", "s = s * (i[:, None] - i)"),
    "decay of sums": Mutation(SCORES, "masked", "s = s * torch.exp(-0.1 * (i[:, None] + i).to(s.dtype))"),
    "decay of squares": Mutation(SCORES, "masked", "s = s * torch.exp(-0.01 * (i[:, None] - i).to(s.dtype) ** 2)"),
    "decay to both sides": Mutation(SCORES, "before_mask", "s = s * torch.exp(-0.1 * (i[:, None] - i).abs().to(s.dtype))"),
    "growth": Mutation(SCORES, "masked", "s = s * torch.exp(0.05 * (i[:, None] - i).to(s.dtype))"),
    "decay of the wrong sign": Mutation(SCORES, "masked", "s = s * torch.exp(-0.05 * (i[None, :] - i[:, None]).to(s.dtype))"),
    "argument decay": Mutation(SCORES, "masked", "s = s * torch.exp(-m)", argument=True),
    "argument decay summed": Mutation(SCORES, "masked", "s = s * torch.exp(-m[0].cumsum(0)[:, None] + m[0].cumsum(0)[None, :])",
                                      argument=True),
    "argument decay misplaced": Mutation(SCORES, "masked", "s = s * torch.exp(-m[0].cumsum(0)[:, None] + m[1].cumsum(0))",
                                         argument=True),
    "decay that changes": Mutation(SCORES, "masked", "w = torch.where(i >= 6, -0.5, -0.125).to(s.dtype).cumsum(0); "
                                   "s = s * (w[:, None] - w).exp()"),
    "decay of one step": Mutation(SCORES, "masked", "w = (-0.1 - 0.3 * (i == n - 2)).to(s.dtype).cumsum(0); "
                                  "s = s * (w[:, None] - w).exp()"),
    "decay by a logarithm": Mutation(SCORES, "masked", "w = (i - 5).clamp(min=1).to(s.dtype).log(); "
                                     "s = s * (w[:, None] - w).exp()"),
    "weight of one row": Mutation(SCORES, "masked", "s = s * torch.where(i == n - 2, 2.0, 1.0).to(s.dtype)[:, None]"),
    "weight by a polynomial": Mutation(SCORES, "masked", "w = i.to(s.dtype); "
                                       "s = s * (-1e-3 * w * (w - 1) * (w - 2) * (w - 3) * (w - 4)).exp()[:, None]"),
    "cumulative scores": Mutation(SCORES, "masked", "s = s.cumsum(-1)"),
    "cumulative rows": Mutation(SCORES, "masked", "s = s.cumsum(-2)"),
    # ------------------------------------------------------------------------------------------------------------ writes
    "key written to": Mutation(SCORES, "scores", "k.mul_(2.0)", False),
    "key written through a view": Mutation(SCORES, "scores", "k.transpose(0, 1).mul_(2.0)", False),
    "value written to": Mutation(SCORES, "before_mask", "v.mul_(2.0)", False),
    "value position zeroed": Mutation(SCORES, "before_mask", "v[..., 0, :].zero_()", False),
    "query replaced": Mutation(SCORES, "scores", "q.copy_(torch.zeros_like(q))", False),
    "query written to": Mutation(STATE, "state", "q.mul_(2.0)", False),
    "state key written to": Mutation(STATE, "outer", "k.add_(1.0)", False),
    "outer zeroed later": Mutation(STATE, "state", "kv.zero_(); S = S + kv", False),
    "chunk values written to": Mutation(CHUNKS, "states", "v.mul_(2.0)", False),
    "chunk states written to": Mutation(CHUNKS, "before", "states.zero_()", False),
    "step writes to keys": Mutation(LOOPS, "step", "k.mul_(0.5)", False),
    "output written to": Mutation(ANY, "output", "o.mul_(0.5)"),
    "output written through a view": Mutation(ANY, "output", "o[..., :1].zero_()"),
    "operands written to behind it": Mutation(ANY, "output", "v.mul_(2.0); k.zero_()", False),
    # ----------------------------------------------------------------------------------------------------- another state
    "wrong axis of the sum": Mutation(STATE, "state", "S = kv.cumsum(-2)"),
    "other wrong axis": Mutation(STATE, "state", "S = kv.cumsum(-1)"),
    "heads for positions": Mutation(STATE, "state", "S = kv.cumsum(0)"),
    "sum of sums": Mutation(STATE, "state", "S = S + kv.cumsum(-1)"),
    "twice": Mutation(STATE, "state", "S = S.cumsum(-1)"),
    "state squared": Mutation(STATE, "state", "S = S * S"),
    "state tanh": Mutation(STATE, "state", "S = torch.tanh(S)"),
    "state dropout": Mutation(STATE, "state", "S = F.dropout(S, 0.3)"),
    "state doubled in part": Mutation(STATE, "state", "S = S + 2 * kv"),
    "state rolled": Mutation(STATE, "state", "S = S.roll(1, 0)"),
    "state flipped": Mutation(STATE, "state", "S = S.flip(1)"),
    "state masked": Mutation(STATE, "state", "S = S.tril()"),
    "state written in place": Mutation(STATE, "state", "S = S.clone(); S[..., 0, :] = 1"),
    "outer relu": Mutation(STATE, "outer", "kv = kv.relu()"),
    "state mean": Mutation(STATE, "state", "S = S / (torch.arange(1, S.shape[0] + 1).view(-1, *[1] * (S.dim() - 1)))"),
    # ------------------------------------------------------------------------------------------------------------ chunks
    "chunks that see no diagonal": Mutation(CHUNKS, "inside", "inside = inside.tril(-1)"),
    "chunks that see too little": Mutation(CHUNKS, "inside", "inside = inside.triu(-1)"),
    "one row of each chunk": Mutation(CHUNKS, "inside", "w = torch.arange(inside.shape[-1]) == 1; "
                                      "inside = inside * torch.where(w, 0.5, 1.0).to(inside.dtype)[:, None]"),
    "chunks halved inside": Mutation(CHUNKS, "inside", "inside = inside * 0.5"),
    "chunks of nonlinear scores": Mutation(CHUNKS, "inside", "inside = inside.relu()"),
    "own chunk counted twice": Mutation(CHUNKS, "before", "before = before + states"),
    "states of the next chunk": Mutation(CHUNKS, "before", "before = before.roll(-1, -3)"),
    "states in the other order": Mutation(CHUNKS, "states", "states = states.flip(-3)"),
    "first chunk's state lost": Mutation(CHUNKS, "before", "before = torch.cat([before[..., :1, :, :] * 0, before[..., 1:, :, :] "
                                         "- states[..., :1, :, :]], -3)"),
    "states normalised": Mutation(CHUNKS, "states", "states = F.normalize(states, dim=-1)"),
    # ------------------------------------------------------------------------------------------------------------- loops
    "one step forgets": Mutation(STEPS, "step", "S = S * (0.0 if t == 1 else 1.0)"),
    "one step doubles": Mutation(STEPS, "step", "S = S * (2.0 if t == n - 2 else 1.0)"),
    "one step differs": Mutation(STEPS, "step", "y = y * (0.5 if t == 2 else 1.0)"),
    "own step added": Mutation(STEPS, "step", "y = y + 0.5 * (qt * kt).sum(-1, keepdim=True) * vt"),
    "own step of some added": Mutation(STEPS, "step", "y = y + (t % 2) * (qt * kt).sum(-1, keepdim=True) * vt"),
    "state squashed": Mutation(LOOPS, "step", "S = torch.tanh(S)"),
    "state clamped": Mutation(LOOPS, "step", "S = S.clamp(-1, 1)"),
    "state depends on output": Mutation(LOOPS, "step", "S = S + 0.1 * y.mean()"),
    "steps exchanged": Mutation(LOOPS, "collected", "out[0], out[-1] = out[-1], out[0]"),
    "steps in the other order": Mutation(LOOPS, "collected", "out = out[::-1]"),
    "first output repeated": Mutation(LOOPS, "collected", "out[-1] = out[0] if out[0].shape == out[-1].shape else out[-1]"),
    # ------------------------------------------------------------------------------------------- further readers, aliases
    "scores are looked at": Mutation(SCORES, "output", "o = o + s.sum()"),
    "states are looked at": Mutation(STATE, "output", "o = o + S.mean()"),
    "chunk states are looked at": Mutation(CHUNKS, "output", "o = o * (1 + states.abs().mean())"),
    "last state is looked at": Mutation(LOOPS, "output", "o = o + S.sum()"),
    "operands are looked at": Mutation(ANY, "output", "o = o + (q.sum() + k.amax() + v[..., 0].mean())"),
    "detached": Mutation(ANY, "operands", "k = k.detach() + 0.5 * k"),
    "keys rolled": Mutation(ANY, "operands", "k = k.roll(1, 0)"),
    "positions backwards": Mutation(ANY, "operands", "q, k, v = q.flip(-2), k.flip(-2), v.flip(-2)", rows=True),
    "values of the step before": Mutation(ANY, "operands", "v = F.pad(v, (0, 0, 1, -1))", rows=True),
    "keys mixed with others": Mutation(ANY, "operands", "k = 0.7 * k + 0.3 * k.roll(1, -2)", rows=True),
    "keys summed so far": Mutation(ANY, "operands", "k = k.cumsum(-2)", rows=True),
    "one tensor for all": Mutation(ANY, "operands", "k = q"),
    "no gradient inside": Mutation(ANY, "operands", "v = v.detach()"),
    "dropout on the output": Mutation(ANY, "output", "o = F.dropout(o, 0.5)"),
}
