"""Cuts a failing plan down: leaves out lives, clients and calls as long as it still fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from kvstore.testing.simulation_plan import LifePlan, Plan

RUNS_MAX = 400


def minimise(plan: Plan, fails: Callable[[Plan], bool]) -> Plan:
    """A plan of the same seed that fails and from which nothing can be left out, or the best within RUNS_MAX runs.

    Every schedule is new, since what is left out changes the order of steps: so what is found may fail in another way.
    """
    runs = 0
    found = True
    while found:
        found = False
        for smaller in _smaller(plan):
            runs += 1
            if runs > RUNS_MAX:
                return plan
            if fails(smaller):
                plan, found = smaller, True
                break
    return plan


def _smaller(plan: Plan) -> Iterator[Plan]:
    """The plans with one thing less, large things first."""
    lives = plan.lives
    for at in range(len(lives)):
        if len(lives) > 1:
            yield msgspec.structs.replace(plan, lives=lives[:at] + lives[at + 1 :])
    for at, life in enumerate(lives):
        for less in _smaller_lives(life):
            yield msgspec.structs.replace(plan, lives=(*lives[:at], less, *lives[at + 1 :]))


def _smaller_lives(life: LifePlan) -> Iterator[LifePlan]:
    clients = life.clients
    for at in range(len(clients)):
        yield msgspec.structs.replace(life, clients=clients[:at] + clients[at + 1 :])
    if life.rates:
        yield msgspec.structs.replace(life, rates={})
    for at, ops in enumerate(clients):
        for left_out in range(len(ops)):
            less = ops[:left_out] + ops[left_out + 1 :]
            yield msgspec.structs.replace(life, clients=(*clients[:at], less, *clients[at + 1 :]))
