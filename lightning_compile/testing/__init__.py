"""Drawn programs for property tests: causal linear attention in all its spellings, and programs that only look like it.

    from hypothesis import given
    from lightning_compile.testing import Program, mutated, programs, same_results

    @given(programs())
    def test_my_backend_keeps_results(program: Program) -> None:
        same_results(program, program.spec.inputs(0), compile=my_compile)

`python -m lightning_compile.testing --help` runs a campaign of very many. Needs hypothesis, which `lightning-compile[test]`
installs; nothing else of lightning_compile does.
"""

from __future__ import annotations

from ..errors import MissingPackage

try:
    import hypothesis  # noqa: F401
except ModuleNotFoundError as e:
    if e.name != "hypothesis":
        raise
    raise MissingPackage(command="lightning_compile.testing", package="hypothesis") from e

from .law import WrongResult, rewritten, same_results
from .mutations import MUTATIONS, Mutation
from .program import FORMS, Program, Spec, Spelling
from .strategies import mutated, programs, specs, spellings

__all__ = ["FORMS", "MUTATIONS", "Mutation", "Program", "Spec", "Spelling", "WrongResult", "mutated", "programs", "rewritten",
           "same_results", "specs", "spellings"]
