"""The deterministic simulation of the store: thousands of schedules, and that a seed plays the same way every time."""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec
import pytest

from kvstore.parallel import available_cores
from kvstore.testing.simulation import main, simulate
from kvstore.testing.simulation_futures import SimpleQueue, ThreadPoolExecutor
from kvstore.testing.simulation_minimise import minimise
from kvstore.testing.simulation_patch import product_modules, simulated_process
from kvstore.testing.simulation_plan import Plan, draw
from kvstore.testing.simulation_scheduler import DeadlockError, Scheduler, running
from kvstore.testing.simulation_threads import Condition, Event, Lock

SCHEDULES = 2000


def run_program(*arguments: str, hash_seed: str = "random") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-m", "kvstore.testing.simulation", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment)


@pytest.mark.slow
def test_no_schedule_breaks_an_invariant() -> None:
    done = run_program("--count", str(SCHEDULES), "--jobs", str(max(1, available_cores())))
    assert done.returncode == 0, done.stdout + done.stderr


def test_interruptions_between_lines_break_no_invariant() -> None:
    done = run_program("--first", "900000", "--count", "40", "--preemption", "0.02")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_seed_is_played_the_same_way_in_every_process() -> None:
    shown = [run_program("--seed", "7", hash_seed=hash_seed).stdout for hash_seed in ("1", "2")]
    assert shown[0] == shown[1]
    assert "all invariants held" in shown[0]
    assert shown[0].count("\n") > 100


def test_schedules_differ_and_are_counted() -> None:
    outcomes = [simulate(draw(seed)) for seed in range(12)]
    assert len({outcome.digest for outcome in outcomes}) == 12
    assert not [outcome.error for outcome in outcomes if outcome.error]
    assert sum(sum(outcome.faults.values()) for outcome in outcomes), "no device failed"
    again = simulate(draw(3))
    assert (again.digest, again.steps) == (outcomes[3].digest, outcomes[3].steps)


def test_nothing_of_the_simulation_stays_behind() -> None:
    before = {(module.__name__, name): value for module in product_modules() for name, value in vars(module).items()}
    simulate(draw(1))
    changed = [
        name
        for module in product_modules()
        for name, value in vars(module).items()
        if before.get((module.__name__, name), value) is not value
    ]
    assert changed == []


def test_the_program_says_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--count", "3", "--first", "5"]) == 0
    assert "3 schedules, 0 failed" in capsys.readouterr().out


def test_a_failing_plan_is_cut_down() -> None:
    def fails(plan: Plan) -> bool:
        return any(op.verb == "pin" for life in plan.lives for ops in life.clients for op in ops)

    plan = next(plan for plan in map(draw, range(100)) if fails(plan) and len(plan.lives) > 1)
    small = minimise(plan, fails)
    assert [op.verb for life in small.lives for ops in life.clients for op in ops] == ["pin"]
    assert msgspec.json.decode(msgspec.json.encode(small), type=Plan) == small


def test_two_tasks_that_wait_for_each_other_are_a_deadlock() -> None:
    with simulated_process(), running(Scheduler(1)) as scheduler:
        one, other = Lock(), Lock()
        met = [Event(), Event()]

        def take(first: Lock, second: Lock, mine: Event, theirs: Event) -> None:
            with first:
                mine.set()
                theirs.wait()
                second.acquire()

        tasks = [
            scheduler.spawn(lambda: take(one, other, *met), "a"),
            scheduler.spawn(lambda: take(other, one, *met[::-1]), "b"),
        ]
        with pytest.raises(DeadlockError, match=r"(?s)a#2: lock.*b#3: lock"):
            [scheduler.join(task) for task in tasks]
        scheduler.kill()


def test_time_jumps_to_the_next_timer_and_a_wait_in_vain_is_noted() -> None:
    with running(Scheduler(2)) as scheduler:
        begun = scheduler.now
        assert not Event().wait(3600.0)
        assert scheduler.now == begun + 3600.0
        assert [(seconds, what) for seconds, _, what in scheduler.timeouts] == [(3600.0, "event")]
        scheduler.kill()


@pytest.mark.parametrize("seed", range(20))
def test_a_bounded_buffer_of_simulated_threads_loses_nothing(seed: int) -> None:
    with running(Scheduler(seed)) as scheduler:
        items: list[int] = []
        taken: list[int] = []
        changed = Condition()
        answers = SimpleQueue()

        def produce() -> None:
            for number in range(20):
                with changed:
                    changed.wait_for(lambda: len(items) < 2)
                    items.append(number)
                    changed.notify_all()

        def consume() -> None:
            for _ in range(20):
                with changed:
                    changed.wait_for(lambda: items)
                    taken.append(items.pop(0))
                    changed.notify_all()
            answers.put("done")

        with ThreadPoolExecutor(3) as pool:
            futures = [pool.submit(work) for work in (produce, consume, lambda: 1 // 0)]
            assert answers.get(timeout=10.0) == "done"
            assert isinstance(futures[2].exception(), ZeroDivisionError)
        assert taken == list(range(20))
        scheduler.kill()
