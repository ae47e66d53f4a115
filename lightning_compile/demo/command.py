"""Trains a small causal linear-attention model, plain PyTorch, on Python's own reference text: in eager mode, under
Inductor and under this backend, with the same seeds and batches. Prints one table and writes one picture."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from dataclasses import asdict
from pathlib import Path

from lightning_compile.demo.progress import Progress, progress
from lightning_compile.demo.settings import WAYS, Outcome, Settings, settings_for
from lightning_compile.errors import WrongWord, on_this_machine, writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lightning-compile demo`."""
    parser.add_argument("--steps", type=int, default=30, help="training steps of each way")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="default: the GPU, if there is one")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help="which ways to run")
    parser.add_argument("--out", type=Path, default=Path("lightning_demo.png"), help="where the picture goes")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--no-sweep", action="store_true", help="leave out the timing against sequence length")


def run_way(way: str, settings: Settings, shown: Progress) -> Outcome:
    """Runs one way in a fresh process and shows how far it is."""
    from lightning_compile.demo import worker

    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=worker.main, args=(way, settings, sender))
    shown.begin(way, settings.steps + len(settings.lengths))
    process.start()
    sender.close()  # or a worker that dies would leave this end waiting
    outcome = Outcome(way, failed="the process died")
    try:
        while True:
            kind, value = receiver.recv()
            if kind == "done":
                outcome = value
                break
            shown.advance(f"loss {value:.3f}" if kind == "step" else f"one layer at {value} tokens")
    except EOFError:
        pass
    process.join()
    shown.end(outcome.failed)
    return outcome


def run(args: argparse.Namespace) -> int:
    """The command; exit status 1 if a way failed or the backend rewrote nothing."""
    import torch

    from lightning_compile.demo.show import describe, picture, table

    if args.steps < 2:
        raise WrongWord(word=f"--steps {args.steps}", why="the first step compiles and is not measured", remedy="give 2 or more")
    on_this_machine(args.device)
    writable(args.out.parent)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = settings_for(device, args.steps)
    if args.no_sweep:
        settings = Settings(**{**vars(settings), "lengths": ()})
    began = time.perf_counter()
    say = (lambda *words: None) if args.json else print
    say(describe(settings))
    with progress() as shown:
        outcomes = [run_way(way, settings, shown) for way in args.ways]
    say()
    say(table(outcomes, settings))
    drawn = picture(outcomes, settings, args.out)
    say(f"\n{drawn}   ({time.perf_counter() - began:.0f} s in all)")
    if args.json:
        print(json.dumps({"settings": asdict(settings), "outcomes": list(map(asdict, outcomes))}, indent=1))
    failed = [o for o in outcomes if o.failed or (o.way == "lightning" and o.rewritten == 0)]
    for outcome in failed:
        print(f"{outcome.way}: {outcome.failed or 'no site was rewritten'}", file=sys.stderr)
    return 1 if failed else 0
