"""The operator's errors: each class holds a code, what was seen and what to do."""

from __future__ import annotations

from typing import Any, ClassVar


class Coded(Exception):
    """An error with a code. `seen` and `advice` may have fields in braces, which the constructor fills."""

    code: ClassVar[str] = ""
    seen: ClassVar[str] = ""
    advice: ClassVar[str] = ""

    def __init__(self, text: str = "", **values: Any) -> None:
        if not text:
            seen, advice = self.seen.format(**values), self.advice.format(**values)
            text = f"{self.code}: {sentence(seen)} {sentence(advice, True)}"
        super().__init__(text)


def sentence(text: str, begins: bool = False) -> str:
    """With a full stop where there is no other (and no report follows), and with a capital letter if it `begins`."""
    ends = text if text.endswith((".", "?", "!")) or "\n" in text else text + "."
    return ends[:1].upper() + ends[1:] if begins else ends


class OperatorError(Coded):
    """Base of the operator's errors."""


class WrongRank(OperatorError, ValueError):
    code = "LK101"
    seen = "linear_attention: {name} must have 4 axes [batch, heads, length, features], got shape {shape}"
    advice = "view or unsqueeze it"


class WrongDtype(OperatorError, TypeError):
    code = "LK102"
    seen = "linear_attention: {name} is {dtype}"
    advice = "use {allowed}"


class MixedDtypes(OperatorError, TypeError):
    code = "LK103"
    seen = "linear_attention: q, k and v must share one dtype, got {q}, {k} and {v}"
    advice = "cast them, or call under torch.autocast"


class MixedDevices(OperatorError, ValueError):
    code = "LK104"
    seen = "linear_attention: all operands must be on one device, got {devices}"
    advice = "move them"


class ShapesDisagree(OperatorError, ValueError):
    code = "LK105"
    seen = "linear_attention: batch and length must agree, got {shapes}"
    advice = ("the axes are [batch, heads, length, features] (transpose a [batch, length, heads, features] tensor, no copy is "
              "made)")


class FeaturesDisagree(OperatorError, ValueError):
    code = "LK106"
    seen = "linear_attention: q and k must have equally many features, got {shapes}"
    advice = "the last axis of q and k is the one that is summed over; v's may differ"


class Empty(OperatorError, ValueError):
    code = "LK107"
    seen = "linear_attention: heads, length and features must not be empty, got {shapes}"
    advice = "leave the call out where there is nothing to attend to"


class HeadsDoNotDivide(OperatorError, ValueError):
    code = "LK108"
    seen = "linear_attention: {name} has {own} heads, which do not divide the {heads} heads of the output ({shapes})"
    advice = "grouped heads must come in equal groups"


class DecayShape(OperatorError, ValueError):
    code = "LK109"
    seen = "linear_attention: log_decay must be [heads] = ({heads},) or [batch, heads, length] = {full}, got {shape}"
    advice = "expand it"


class StateShape(OperatorError, ValueError):
    code = "LK110"
    seen = "linear_attention: initial_state must be [batch, heads, features of k, features of v] = {expected}, got {shape}"
    advice = "expand it to every batch and head"


class NormaliserWithState(OperatorError, ValueError):
    code = "LK111"
    seen = "linear_attention: normalizer=True does not go with an initial or final state, which holds no sum for it"
    advice = ("append a column of ones to v (and the normaliser's state as the last column of the state) instead")


class NoDerivative(OperatorError, RuntimeError):
    code = "LK112"
    seen = "lightning::linear_attention_backward has no derivative of its own"
    advice = ("call lightning::linear_attention and differentiate twice with create_graph=True, or wrap this call in "
              "torch.no_grad()")


class NoTensor(OperatorError, TypeError):
    code = "LK113"
    seen = "linear_attention: {name} is of type {kind}"
    advice = "use a tensor; one number for all heads is torch.full((heads,), number)"


class NothingMeasured(OperatorError, RuntimeError):
    """Of `kernels.offline` only, which calls NVIDIA's disassembler."""

    code = "LK114"
    seen = "cuobjdump printed no registers: {said}"
    advice = "TRITON_CUOBJDUMP_PATH names another cuobjdump, which should be as new as the assembler"


class WrongKernel(OperatorError, RuntimeError):
    """Of `kernels.trial`: it never reaches a user, for the chunked form runs instead."""

    code = "LK115"
    seen = ("a compiled kernel is wrong on this device: on a small problem the relative error of {name} is {error}, where at "
            "most {allowed} is right")
    advice = ("TRITON_PTXAS_PATH names another assembler: ptxas before 13.3 makes wrong kernels on Hopper (`lightning-compile "
              "doctor` shows its version)")


OPERATOR_ERRORS = (WrongRank, WrongDtype, MixedDtypes, MixedDevices, ShapesDisagree, FeaturesDisagree, Empty, HeadsDoNotDivide,
                   DecayShape, StateShape, NormaliserWithState, NoDerivative, NoTensor, NothingMeasured, WrongKernel)
