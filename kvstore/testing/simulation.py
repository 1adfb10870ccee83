"""A deterministic simulation of the store: the real code, in an order of steps that a seed decides.

    python -m kvstore.testing.simulation --seed 42            one schedule, printed step by step
    python -m kvstore.testing.simulation --seed 42 --minimise the same with every call left out that is not needed
    python -m kvstore.testing.simulation --count 100000       seeds 0 to 99999; each that fails is named

What is real: Store with everything that it calls, DramTier, NvmeTier with its journal and LMDB catalog, fsck. What is
simulated: threads, locks, queues, futures and time (`simulation_threads`, `simulation_futures`), and the disk, with
faults and crashes (`simulation_disk`, `faults`). An LMDB commit is one atomic, durable step: LMDB promises that, and
its own tests are the place to doubt it; its file lies in memory and survives every crash as the last commit left it.

A seed draws a plan (`simulation_plan`): sizes, clients and their calls, what the device does wrong, how each life ends.
`simulation_oracle` and `simulation_store` say what must hold. A seed that fails does so every time.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from kvstore.testing.faults import Fault
from kvstore.testing.simulation_disk import SimulatedDisk
from kvstore.testing.simulation_minimise import minimise
from kvstore.testing.simulation_oracle import Oracle
from kvstore.testing.simulation_patch import simulated_process
from kvstore.testing.simulation_plan import Plan, draw
from kvstore.testing.simulation_scheduler import Scheduler, running
from kvstore.testing.simulation_store import Crash, Life, check_files

COLLECT_EVERY = 50
"""Schedules between two runs of the garbage collector."""


class Outcome(msgspec.Struct, frozen=True):
    """What became of a schedule: `error` is empty if all held. `digest` names the order of its steps."""

    seed: int
    steps: int
    digest: int
    error: str = ""
    trace: tuple[str, ...] = ()
    faults: dict[str, int] = {}


def simulate(plan: Plan, *, trace: bool = False, preemption: float = 0.0) -> Outcome:
    """Play all lives of a plan, on files in memory that are removed afterwards."""
    oracle = Oracle()
    steps = digest = 0
    lines: list[str] = []
    faults: dict[str, int] = {}
    error = ""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    home = Path(tempfile.mkdtemp(prefix="kvstore-sim-", dir=memory))
    before: tuple[SimulatedDisk, Path] | None = None
    try:
        with simulated_process():
            for number, life in enumerate(plan.lives):
                directory = home / f"life{number}"
                scheduler = Scheduler(plan.seed * 10 + number, impatient=life.impatient, preemption=preemption)
                scheduler.trace = oracle.trace = lines if trace else None
                disk = SimulatedDisk(scheduler, random.Random(plan.seed * 10 + number))
                if before is not None:
                    disk.inherit(before[0], before[1], directory)
                try:
                    with running(scheduler):
                        before = _live(plan, number, scheduler, disk, home, oracle, faults)
                except BaseException as raised:
                    error = f"life {number}: {type(raised).__name__}: {raised}"
                    if not isinstance(raised, Exception):
                        raise
                    lines.append(_where(raised))
                steps += scheduler.steps
                digest = hash((digest, scheduler.digest))
                if error:
                    break
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return Outcome(plan.seed, steps, digest, error, tuple(lines), faults)


def _live(
    plan: Plan,
    number: int,
    scheduler: Scheduler,
    disk: SimulatedDisk,
    home: Path,
    oracle: Oracle,
    faults: dict[str, int],
) -> tuple[SimulatedDisk, Path] | None:
    """One life and the making of the files that the next one finds; answers the disk if it keeps its memory."""
    here, following = home / f"life{number}", home / f"life{number + 1}"
    planned = plan.lives[number]
    life = Life(plan, number, scheduler, disk, here, oracle)
    scheduler.interrupt_at, scheduler.interruption = planned.crash_step, Crash()
    killed = False
    try:
        life.run()
    except Crash:
        killed = planned.ending == "kill"
        power_lost = planned.ending == "power"
        disk.crash_image(here, following, random.Random(plan.seed), power_lost=power_lost)
    finally:
        scheduler.kill()
        life.bury()
    if life.faulty is not None:
        for fault, count in life.faulty.seen.items():
            faults[fault] = faults.get(fault, 0) + count
        oracle.rotten |= Fault.ROT in life.faulty.seen
    if not following.exists():
        here.rename(following)
        killed = True
    check_files(following, oracle)
    # A deletion that is not durable within a minute is answered all the same.
    oracle.reopened(sure=not (oracle.device_fails or planned.impatient or Fault.STALL in planned.rates))
    return (disk, here) if killed else None


def _where(error: BaseException) -> str:
    """The lines of code that an error passed, innermost last."""
    lines = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        lines.append(f"    {code.co_filename}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return "\n".join(lines)


def run_seeds(seeds: Sequence[int], *, preemption: float = 0.0, failures_max: int = 10) -> list[Outcome]:
    """Play many seeds; answers the outcomes that failed, at most so many."""
    failed = []
    gc.collect()
    for count, seed in enumerate(seeds):
        outcome = simulate(draw(seed), preemption=preemption)
        if outcome.error:
            failed.append(outcome)
            if len(failed) >= failures_max:
                break
        if count % COLLECT_EVERY == COLLECT_EVERY - 1:
            gc.collect()
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; exit code 1 if a schedule failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seed", type=int, help="play this one and print it")
    parser.add_argument("--minimise", action="store_true", help="with --seed: cut a failing plan down first")
    parser.add_argument("--count", type=int, default=2000, help="how many seeds")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the seeds")
    parser.add_argument("--preemption", type=float, default=0.0, help="interrupt between lines, with this probability")
    arguments = parser.parse_args(argv)
    if arguments.seed is not None:
        return _show(arguments.seed, arguments.preemption, minimised=arguments.minimise)
    begun = time.monotonic()
    if arguments.jobs > 1:
        return _share(arguments)
    seeds = range(arguments.first, arguments.first + arguments.count)
    failed = run_seeds(seeds, preemption=arguments.preemption)
    for outcome in failed:
        print(f"seed {outcome.seed}: {outcome.error}")
    print(f"{arguments.count} schedules, {len(failed)} failed, {time.monotonic() - begun:.1f} s")
    return int(bool(failed))


def _show(seed: int, preemption: float, *, minimised: bool) -> int:
    """Play one seed and print everything about it."""
    plan = draw(seed)
    if minimised:
        plan = minimise(plan, lambda cut: bool(simulate(cut, preemption=preemption).error))
    print(msgspec.json.format(msgspec.json.encode(plan)).decode())
    outcome = simulate(plan, trace=True, preemption=preemption)
    print("\n".join(outcome.trace))
    print(outcome.error or "all invariants held")
    return int(bool(outcome.error))


def _share(arguments: argparse.Namespace) -> int:
    """Have other processes play a share of the seeds each."""
    share = -(-arguments.count // arguments.jobs)
    processes = []
    for first in range(arguments.first, arguments.first + arguments.count, share):
        count = min(share, arguments.first + arguments.count - first)
        command = [sys.executable, "-m", "kvstore.testing.simulation", "--first", str(first), "--count", str(count)]
        processes.append(subprocess.Popen([*command, "--preemption", str(arguments.preemption)]))
    return max(process.wait() for process in processes)


if __name__ == "__main__":
    sys.exit(main())
