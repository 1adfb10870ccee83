"""One task at a time, in an order that follows from a seed, in virtual time.

A task is a thread that holds the baton or waits for it. It gives the baton up only in `pause`, `sleep` and `wait`,
which the primitives of `simulation_threads` and `simulation_futures` call; who gets it next is drawn from the seed. The
clock stands still while any task can run, and jumps to the next timer when none can. If there is no timer either,
everybody waits for ever: `DeadlockError`.

Two ways to draw, as the seed has it: any ready task, with a preference for the running one; or the ready task of the
highest priority, with a few priorities lowered on the way (Burckhardt et al., "A randomized scheduler with
probabilistic guarantees of finding bugs", ASPLOS 2010), which finds bugs that need one task to be held up for long.
"""

from __future__ import annotations

import _thread
import heapq
import random
import sys
import traceback
from collections.abc import Callable
from typing import Any, ClassVar

STEPS_MAX = 200_000
"""A schedule that takes more is going round in circles."""

CARRIERS_MAX = 64
"""Idle threads that are kept for the tasks of later schedules; to start one takes longer than a short schedule."""


class Killed(BaseException):
    """Raised in a task whose world has ended. Not an Exception: nothing may take it for a failure of its own."""


class DeadlockError(AssertionError):
    """Every task waits, and nothing will wake any."""


class Task:
    """One thread of the simulated process."""

    __slots__ = ("baton", "daemon", "ended", "finished", "joiners", "killed", "name", "number", "priority", "thread",
                 "timed_out", "timer", "unwinding", "waiters", "what")  # fmt: skip

    def __init__(self, number: int, name: str, priority: float) -> None:
        self.number = number
        self.name = name
        self.priority = priority
        self.baton = _thread.allocate_lock()
        self.baton.acquire()
        self.ended = _thread.allocate_lock()
        self.ended.acquire()
        self.thread = 0
        self.finished = self.killed = self.unwinding = self.timed_out = self.daemon = False
        self.timer = 0
        self.waiters: list[Task] | None = None
        self.joiners: list[Task] = []
        self.what = ""


class _Carrier:
    """An operating-system thread that carries one task after another."""

    idle: ClassVar[list[_Carrier]] = []

    def __init__(self) -> None:
        self._job = _thread.allocate_lock()
        self._job.acquire()
        self._work: Callable[[], Callable[[], None]] | None = None
        _thread.start_new_thread(self._run, ())

    def start(self, work: Callable[[], Callable[[], None]]) -> None:
        """Run `work`; what it answers is called when this thread is free for the next."""
        self._work = work
        self._job.release()

    def _run(self) -> None:
        while True:
            self._job.acquire()
            assert self._work is not None
            leave = self._work()
            self._work = None
            stays = len(_Carrier.idle) < CARRIERS_MAX
            if stays:
                _Carrier.idle.append(self)
            leave()
            del leave
            if not stays:
                return


class Scheduler:
    """The tasks of one world and its clock. The calling thread is the first task, the root.

    Args:
        seed: decides everything.
        impatient: now and then a timer fires although tasks could run, as on a machine that is busy elsewhere.
        preemption: how often a task is interrupted between two lines of product code, from 0 to 1. Slow: it traces.
    """

    def __init__(self, seed: int, *, impatient: bool = False, preemption: float = 0.0) -> None:
        self.rng = random.Random(seed)
        self.now = 1000.0
        self.steps = 0
        self.digest = 0
        self.interrupt_at = 0
        self.interruption: BaseException | None = None
        self.timeouts: list[tuple[float, str, str]] = []
        self.trace: list[str] | None = None
        self._impatient = impatient
        self._preemption = preemption
        self._stay = self.rng.choice((0.3, 0.7, 0.9, 0.97))
        self._by_priority = self.rng.random() < 0.4
        self._lowered_at = {int(self.rng.expovariate(1 / 400)) for _ in range(3)}
        self._lowest = 0.0
        self._timers: list[tuple[float, int, Task]] = []
        self._timer_count = 0
        self._raised: BaseException | None = None
        self._dead = False
        self._created = 0
        self.root = self.current = self._create("root")
        self.root.thread = _thread.get_ident()
        self._ready: list[Task] = []
        self.live: list[Task] = [self.root]

    # -- tasks -------------------------------------------------------------------------------------------------------

    def spawn(self, function: Callable[[], object], name: str) -> Task:
        """A new task that runs `function`; what it raises ends the world."""
        self.check()
        task = self._create(name)
        self.live.append(task)
        self._ready.append(task)
        carrier = _Carrier.idle.pop() if _Carrier.idle else _Carrier()
        carrier.start(lambda: self._carry(task, function))
        return task

    def join(self, task: Task, timeout: float | None = None) -> bool:
        """Wait for the end of a task; False if it has not come in time."""
        self.pause("join")
        return task.finished or self.wait(task.joiners, timeout, f"join {task.name}")

    def kill(self) -> None:
        """End every task but the root, which calls this, wherever they are. Afterwards only the clock can be asked."""
        self._dead = True
        for task in self.live:
            if task is not self.root:
                task.killed = True
                self.current = task
                task.baton.release()
                task.ended.acquire()
        self.current = self.root
        self.live = [self.root]
        self._ready.clear()
        self._timers.clear()

    def stop(self, error: BaseException) -> None:
        """Raise `error` in the root, at once, in whatever it waits for; unless another was raised before."""
        if self._dead:
            return
        if self._raised is None:
            self._raised = error
        if self.current is self.root:
            self._raise()
        self._forget_waiting(self.root)
        if self.root in self._ready:
            self._ready.remove(self.root)
        self._ready.append(self.current)
        self._switch(self.root)

    # -- giving the baton up -----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise Killed in a task that has been killed; once, for its `finally` blocks must get through."""
        if self.current.killed:
            self.current.unwinding = True
            raise Killed

    def pause(self, what: str) -> None:
        """Let others run, perhaps. Does nothing in a task that is being killed and knows it."""
        task = self.current
        if task.killed:
            if not task.unwinding:
                self.check()
            return
        if self._dead:
            return
        self.steps += 1
        if self.steps == self.interrupt_at and self.interruption is not None:
            self.stop(self.interruption)
        if self.steps > STEPS_MAX:
            self.stop(AssertionError(f"more than {STEPS_MAX} steps; task {task.name} is at {what}"))
        if self.trace is not None:
            self.trace.append(f"{self.steps:6} {self.now - 1000:10.4f} {task.name:28} {what}")
        if self._impatient and self._timers and self.rng.random() < 0.002:
            self._fire()
        if not self._ready:
            return
        if self._by_priority:
            if self.steps in self._lowered_at:
                self._lowest -= 1
                task.priority = self._lowest
            if max(other.priority for other in self._ready) < task.priority:
                return
        elif self.rng.random() < self._stay:
            return
        self._ready.append(task)
        self._switch(self._pick())

    def sleep(self, seconds: float, what: str = "") -> None:
        """Let `seconds` of virtual time pass."""
        if seconds > 0:
            self.wait([], seconds, f"sleep: {what}")
        else:
            self.pause(what or "sleep")

    def settle(self) -> None:
        """Let time pass until every other task waits for something that only another task can do."""
        self.sleep(1e-9, "settle")
        while self._ready or any(timer == task.timer for _, timer, task in self._timers):
            self.sleep(max([self.now, *(when for when, timer, task in self._timers if timer == task.timer)]) - self.now
                       + 1e-9, "settle")  # fmt: skip

    def wait(self, waiters: list[Task], timeout: float | None, what: str) -> bool:
        """Join `waiters` until `wake` takes this task out; False if that has not happened within `timeout` seconds."""
        task = self.current
        self.check()
        if timeout is not None and timeout <= 0:
            return False
        waiters.append(task)
        task.waiters = waiters
        task.what = what
        task.timed_out = False
        if timeout is not None:
            self._timer_count += 1
            task.timer = self._timer_count
            heapq.heappush(self._timers, (self.now + timeout, task.timer, task))
        self._switch(self._pick())
        if task.timed_out and not what.startswith("sleep"):
            self.timeouts.append((timeout or 0.0, task.name, what))
        return not task.timed_out

    def wake(self, waiters: list[Task], count: int | None = 1) -> None:
        """Make some of the tasks in `waiters` ready, None for all."""
        if self._dead:
            return
        for _ in range(len(waiters) if count is None else min(count, len(waiters))):
            task = waiters.pop(self.rng.randrange(len(waiters)) if len(waiters) > 1 else 0)
            task.waiters = None
            task.timer = 0
            self._ready.append(task)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _create(self, name: str) -> Task:
        self._created += 1
        return Task(self._created, f"{name}#{self._created}", self.rng.random())

    def _carry(self, task: Task, function: Callable[[], object]) -> Callable[[], None]:
        """What a carrier does with a task; answers how to hand the baton on."""
        task.baton.acquire()
        task.thread = _thread.get_ident()
        error: BaseException | None = None
        if not task.killed:
            if self._preemption:
                sys.settrace(self._trace_call)
            try:
                function()
            except Killed:
                pass
            except BaseException as raised:
                error = raised
            finally:
                sys.settrace(None)
        task.finished = True
        if task.killed:
            return task.ended.release
        self.live.remove(task)
        self.wake(task.joiners, None)
        if error is not None:
            self._raised = self._raised or error
            self._forget_waiting(self.root)
            following = self.root
            if following in self._ready:
                self._ready.remove(following)
        else:
            following = self._pick()
        self.current = following
        return following.baton.release

    def _pick(self) -> Task:
        """Take the next task out of the ready ones, letting time pass if there is none."""
        while not self._ready:
            if not self._timers:
                self._raised = self._raised or DeadlockError("everybody waits for ever:\n" + self.describe())
                self._forget_waiting(self.root)
                return self.root
            self._fire()
        if self._by_priority:
            at = max(range(len(self._ready)), key=lambda at: self._ready[at].priority)
        else:
            at = self.rng.randrange(len(self._ready)) if len(self._ready) > 1 else 0
        return self._ready.pop(at)

    def _fire(self) -> None:
        """Let the next timer end."""
        when, number, task = heapq.heappop(self._timers)
        if task.timer != number or task.finished:
            return
        self.now = max(self.now, when)
        task.timed_out = True
        self._forget_waiting(task)
        self._ready.append(task)

    def _forget_waiting(self, task: Task) -> None:
        if task.waiters is not None:
            task.waiters.remove(task)
        task.waiters = None
        task.timer = 0

    def _switch(self, following: Task) -> None:
        """Hand the baton over and wait for it."""
        task = self.current
        if following is not task:
            self.digest = hash((self.digest, following.number, self.steps))
            self.current = following
            following.baton.release()
            task.baton.acquire()
        if task.killed:
            self.check()
        if task is self.root and self._raised is not None:
            self._raise()

    def _raise(self) -> None:
        error, self._raised = self._raised, None
        assert error is not None
        raise error

    def _trace_call(self, frame: Any, event: str, argument: object) -> Any:
        name = frame.f_globals.get("__name__", "")
        return self._trace_line if name.startswith("kvstore.") and "testing" not in name else None

    def _trace_line(self, frame: Any, event: str, argument: object) -> Any:
        if event == "line" and self.rng.random() < self._preemption:
            self.pause("preempted")
        return self._trace_line

    def describe(self) -> str:
        """Where every task is, for a person."""
        frames = sys._current_frames()
        lines = []
        for task in self.live:
            lines.append(f"{task.name}: {task.what}")
            if task.thread in frames:
                stack = traceback.extract_stack(frames[task.thread])
                lines += [f"    {f.filename}:{f.lineno} {f.name}" for f in stack if "simulation_" not in f.filename]
        return "\n".join(lines)


_active: list[Scheduler] = []


def scheduler() -> Scheduler:
    """The scheduler of the world that is being simulated."""
    return _active[-1]


class running:  # noqa: N801
    """Makes a scheduler the one of the world that is being simulated, as a context manager."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def __enter__(self) -> Scheduler:
        _active.append(self._scheduler)
        return self._scheduler

    def __exit__(self, *exc: object) -> None:
        _active.pop()
