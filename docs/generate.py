"""Writes what is made from tables and from measurements: python docs/generate.py [--check] [--zoo RUN.json]

    codes.md, errors.md                the package's own tables
    models.md, README.md (a section)   models.json, and models_measured.json for speed and memory
    compatibility.md                   compatibility.json, which `pytest -m row tests --compatibility` writes

--zoo distils a run of the zoo into models.json first. --check writes nothing and fails where a page is out of date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from lightning_compile import errors
from lightning_compile.patterns import codes
from lightning_compile.zoo import models

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
MODELS = """# Models

Published code, unchanged, run through `torch.compile(backend="lightning")`; each outcome is compared with a run in float64. An
error of 1 is eager's own: the worst output or gradient of the program, as a multiple of what eager PyTorch is off there.

{table}

Speed-up and peak memory are those of forward and backward against Inductor, with this backend's default options, at the zoo's
widths and numbers of heads, which are small, and longer sequences: 16 of them on a GPU, two on a CPU. A GPU is so fast with them
that it waits for the host, one to three milliseconds a call whatever is computed; there, memory tells more. Models at their real
sizes on a GPU are in [measured](measured.md). Measured {runs}. "Takes longer": Inductor, on a loop that
`torch.compile` unrolls.

This page is generated. With the zoo in the folder `ZOO`:

    python ZOO/run_zoo.py --options '{{"when": "always"}}' --json run.json
    python benchmarks/zoo_speed.py ZOO --write                  # and on a GPU, with --device cuda
    python docs/generate.py --zoo run.json
"""
SECTION = re.compile(r"(<!-- models -->\n).*?(<!-- end of models -->)", re.DOTALL)


def models_page() -> str:
    rows, measured = (json.loads((HERE / name).read_text()) for name in ("models.json", "models_measured.json"))
    runs = ", ".join(f"on {models.KINDS[kind]}: {run['device']}, torch {run['torch']}, {run['date']}"
                     for kind, run in measured.items())
    return MODELS.format(table=models.table(rows, measured), runs=runs)


COMPATIBILITY = """# Compatibility

What else in PyTorch a compiled model is used with, and how it was tried: each row is a test of `tests/`, named by its marker
`row`. A row says *failed* where the test of that version fails, and *skipped* where what it needs is not
there. An empty cell: not run there yet.

{tables}
## How

- **Caches.** The keys of Inductor's caches hold this package's sources and options; a second start of the same program compiles
  nothing.
- **Function transforms.** Inside of compiled code `torch.vmap` is traced to the operations on whole batches that it comes down
  to, and these are rewritten. What runs inside `torch.func.grad` or `jvp`, or a vmap that draws random numbers, switches
  gradients or has dynamic sizes, is left as it is (LC304). The operator called by hand knows them all.
- **Export.** `lightning_compile.export(model, args)` is `torch.export.export` with the sites rewritten; see the
  [Python interface](api.md).
- **Trainer of transformers, accelerate.** They take the backends that accelerate lists. `lightning_compile.allow_in_accelerate()`
  makes `TrainingArguments(torch_compile_backend="lightning")` and `Accelerator(dynamo_backend="lightning")` work; or call
  `model.compile(backend="lightning", options=...)` and hand the model to the Trainer.
- **DTensor.** The operator has a sharding rule for batches and heads. Masks made of plain tensors, and `tril` of sharded
  scores, end DTensor's own graph capture before this backend sees them.

- **Hopper.** An H100; caches, export and training on an H200.
- **torch 2.11 and 2.12.** Their Dynamo ends at `einsum` of DTensors, so that compiled programs on them begin with 2.13.
- **AOTInductor.** Some installations of PyTorch (seen: 2.11.0+cu130) end with a signal when they load a package, even one of a
  single `Linear`. The test tries that, too, and is skipped there.

This page is generated: `pytest -m row tests --compatibility`, then `python docs/generate.py`.
"""


def compatibility_page() -> str:
    areas = json.loads((HERE / "compatibility.json").read_text())
    versions = sorted({v for rows in areas.values() for seen in rows.values() for v in seen})
    tables = ""
    for area, rows in areas.items():
        tables += f"## {area}\n\n| tried | {' | '.join(f'torch {v}' for v in versions)} |\n| --- |{' --- |' * len(versions)}\n"
        tables += "".join(f"| {what} | {' | '.join(seen.get(v, '') for v in versions)} |\n" for what, seen in rows.items()) + "\n"
    return COMPATIBILITY.format(tables=tables)


def readme() -> str:
    """The README with one line for each package."""
    rows, measured = (json.loads((HERE / name).read_text()) for name in ("models.json", "models_measured.json"))
    return SECTION.sub(lambda m: m[1] + models.packages(rows, measured) + "\n" + m[2], README.read_text())


def pages() -> dict[Path, str]:
    """Every generated file, as it should be."""
    return {HERE / "codes.md": codes.page(), HERE / "errors.md": errors.page(), HERE / "models.md": models_page(),
            HERE / "compatibility.md": compatibility_page(),
            README: readme()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a page is out of date")
    parser.add_argument("--zoo", type=Path, metavar="RUN.json", help="the JSON of a run of the zoo")
    args = parser.parse_args()
    if args.zoo:
        rows = models.distilled(json.loads(args.zoo.read_text()))
        (HERE / "models.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    stale = {path: text for path, text in pages().items() if not path.exists() or path.read_text() != text}
    for path, text in stale.items() if not args.check else ():
        path.write_text(text)
    print("\n".join(f"{'out of date' if args.check else 'written'}: {path.name}" for path in stale) or "all up to date")
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
