"""Thousands of random graphs on every core; a line for each kind, and every failure.

python -m tests.fuzz_offline 10000 --jobs 16 --seconds 450 --save fuzz.txt

Case n of a kind is the same in every run: `1 --kinds mutants --first n` checks it alone.
"""

from __future__ import annotations

import argparse
import os
import platform
import traceback
from collections import Counter
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random
from time import monotonic, process_time

import torch
import triton

from tests.fuzz import KINDS, SECONDS, Tally, Wrong, limited

Case = tuple[str, int]  # kind and number
Outcome = tuple[Tally, str]  # and a failure in words
SPAWN = get_context("spawn")  # torch has threads, and they do not survive a fork


def check(case: Case) -> Outcome:
    kind, number = case
    tally, failure, start = Tally(), "", process_time()
    drawn = KINDS[kind].draw(Random(f"{kind} {number}").choice)
    try:
        with limited(SECONDS):
            KINDS[kind].check(drawn, tally)
    except Exception as exception:
        how = {Wrong: "wrong", TimeoutError: "hung"}.get(type(exception), "crashed")
        tally.failed[how] += 1
        trace = traceback.format_exc() if how == "crashed" else f"{exception}\n"
        failure = f"{how}: {kind} {number}: {trace}    {drawn}"
    tally.seconds = process_time() - start
    return tally, failure


def work(pipe: Connection) -> None:
    torch.set_num_threads(1)
    for case in iter(pipe.recv, None):
        pipe.send(check(case))


class Worker:
    """A process that checks one case at a time."""

    def __init__(self) -> None:
        self.pipe, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.case: Case | None = None

    def give(self, case: Case) -> None:
        self.case, self.since = case, monotonic()
        self.pipe.send(case)

    def end(self) -> None:
        if self.case:
            self.process.kill()
        else:
            self.pipe.send(None)
        self.process.join()

    def outcome(self) -> Outcome | None:
        """Of its case, if that is over: done, or taken down with the process."""
        how = "hung" if monotonic() - self.since > 2 * SECONDS else ""
        if self.pipe.poll():
            try:
                done: Outcome = self.pipe.recv()
                return done
            except (EOFError, ConnectionResetError):
                how = "crashed"
        if not how:
            return None
        self.end()
        lost = Tally(failed=Counter([how]), seconds=monotonic() - self.since)
        return lost, f"{how}: {self.case}: the process ended with {self.process.exitcode}"


def cases(kinds: list[str], graphs: int, first: int) -> Iterator[Case]:
    """All kinds in turn, so that a part of a run has them all."""
    shares = sum(KINDS[kind].share for kind in kinds)
    numbered = []
    for kind in kinds:
        n = -(-graphs * KINDS[kind].share // shares // KINDS[kind].graphs)
        numbered += [((i + 0.5) / n, kind, first + i) for i in range(n)]
    return iter([(kind, number) for _, kind, number in sorted(numbered)])


def fuzz(todo: Iterator[Case], jobs: int, seconds: float) -> Iterator[tuple[Case, Outcome]]:
    """Each case as it is done; what is not done after `seconds` is dropped."""
    end = monotonic() + seconds
    workers = [Worker() for _ in range(jobs)]
    while monotonic() < end:
        for worker in workers:
            if worker.case is None and (case := next(todo, None)):
                worker.give(case)
        busy = [worker for worker in workers if worker.case]
        if not busy:
            break
        wait([worker.pipe for worker in busy], timeout=max(0, min(1, end - monotonic())))
        for worker in busy:
            if outcome := worker.outcome():
                assert worker.case
                yield worker.case, outcome
                worker.case = None
                if not worker.process.is_alive():
                    workers[workers.index(worker)] = Worker()
    for worker in workers:
        worker.end()


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the pass with random graphs.")
    parser.add_argument("graphs", type=int, nargs="?", default=10_000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--first", type=int, default=0, help="number of the first case of a kind")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--save", type=Path, help="keep the report in this file, from the start")
    options = parser.parse_args()

    tallies = {kind: Tally() for kind in options.kinds}
    failures: list[str] = []
    start = saved = monotonic()

    def report() -> str:
        run = [
            f"{options.graphs} graphs asked for, from case {options.first}; {options.jobs} jobs,"
            f" {monotonic() - start:.0f} s; torch {torch.__version__}, triton {triton.__version__},"
            f" Python {platform.python_version()}"
        ]
        kinds = [f"{kind}: {tally}" for kind, tally in tallies.items()]
        text = "\n".join([*run, *kinds, *failures]) + "\n"
        if options.save:
            options.save.write_text(text)
        return text

    todo = cases(options.kinds, options.graphs, options.first)
    for (kind, _), (tally, failure) in fuzz(todo, options.jobs, options.seconds):
        tallies[kind] += tally
        if failure:
            failures.append(failure)
            print(failure, flush=True)
        if failure or monotonic() - saved > 10:
            saved = monotonic()
            report()
    print(report(), end="")
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
