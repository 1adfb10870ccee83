"""The kill matrix: what happens, what a client sees, what is lost, and the test that shows it.

    python tests/chaos/matrix.py > docs/kill_matrix.md

`tests/test_kill_matrix.py` compares the page with this file, and this file with the tests.
"""

from __future__ import annotations

from typing import NamedTuple

HEAD = """# Kill matrix

What can happen to a daemon, its clients and its disks; what a client sees then; what is lost. "A miss" is a value with
a reason, never an exception: the engine recomputes. In none of these tests was a byte served that was not
put under its key. Every row is a test; `make chaos` runs the long versions. This page is written by
`python tests/chaos/matrix.py`, and a test compares the two.

| event | what the client sees | what is lost | test |
|---|---|---|---|
"""


class Row(NamedTuple):
    """One event. `test` is FILE::FUNCTION under tests/."""

    event: str
    sees: str
    lost: str
    test: str


ROWS = (
    Row(
        "`kill -9` of the daemon, under load",
        "misses (`unavailable`) until the next daemon is up, then everything durable again",
        "what was only in memory; no chunk that was acknowledged as durable",
        "test_daemon_kill.py::test_what_a_killed_daemon_acknowledged_is_served_after_restart",
    ),
    Row(
        "`kill -9` of a process in the middle of writes, deletions and evictions of the nvme tier",
        "after restart each chunk whole, or a miss (`absent`)",
        "no acknowledged chunk; no space (fsck finds no leak)",
        "test_nvme_kill.py::test_nothing_acknowledged_is_lost_and_nothing_leaks",
    ),
    Row(
        "loss of power at any instant, any part of what was not flushed on the disk",
        "after restart each chunk whole, or a miss",
        "no acknowledged chunk",
        "test_nvme_power.py::test_any_crash_keeps_what_was_acknowledged_and_nothing_wrong",
    ),
    Row(
        "`kill -9`, then loss of power before the system has written its memory back",
        "as above: recovery flushes before it believes",
        "no acknowledged chunk",
        "test_simulation.py::test_no_schedule_breaks_an_invariant",
    ),
    Row(
        "`kill -9` of the daemon during a fetch",
        "the rest of the fetch misses (`unavailable`)",
        "nothing durable",
        "test_client_remote.py::test_a_daemon_killed_during_a_fetch_is_a_miss",
    ),
    Row(
        "the daemon is stopped (SIGSTOP) and continued",
        "`deadline` at the deadline of each call; afterwards as if nothing had happened",
        "nothing",
        "test_chaos_events.py::test_a_stopped_daemon_costs_deadlines_and_nothing_else",
    ),
    Row(
        "a client is killed while it holds leases",
        "others: nothing; its leases end with its connection",
        "nothing",
        "test_service_session.py::test_a_client_killed_while_it_holds_leases_releases_them_all",
    ),
    Row(
        "a client is stopped while it holds a lease, and continued after the lease has ended",
        "others: nothing; itself: the part is past its `expires_at` and counts as a miss",
        "nothing",
        "test_chaos_events.py::test_a_stopped_client_loses_its_leases_and_nobody_waits_for_it",
    ),
    Row(
        "the disk is full at the start",
        "the daemon does not start; one line says how much is free",
        "nothing",
        "test_chaos_events.py::test_a_full_disk_at_the_start_is_one_clear_line",
    ),
    Row(
        "the disk fills up under a running daemon",
        "puts go on, for their room was allocated before; else they are refused (`io_error`)",
        "nothing durable",
        "test_chaos_events.py::test_a_disk_that_fills_up_costs_no_byte",
    ),
    Row(
        "the volume file is deleted under a running daemon",
        "nothing until it stops; the next start says that the volume is missing and what to do",
        "everything on that disk, at the restart",
        "test_chaos_events.py::test_a_deleted_volume_file_is_read_to_the_end_and_missed_at_the_start",
    ),
    Row(
        "the volume file is cut short under a running tier",
        "`io_error` for chunks behind the cut, which are dropped; the rest is served",
        "the chunks behind the cut",
        "test_nvme_faults.py::test_a_volume_cut_under_a_running_tier_is_an_io_error",
    ),
    Row(
        "the volume's directory becomes inaccessible (`chmod 000`)",
        "nothing until it stops; the next start says that it is not writable",
        "nothing",
        "test_chaos_events.py::test_a_directory_that_becomes_inaccessible_matters_at_the_next_start",
    ),
    Row(
        "the directory is read-only at the start",
        "the daemon does not start; one line says so",
        "nothing",
        "test_nvme_open.py::test_a_read_only_directory",
    ),
    Row(
        "a second daemon on the same volume",
        "the second does not start and names the first; the first goes on",
        "nothing",
        "test_daemon.py::test_a_second_daemon_on_the_same_volume_is_refused",
    ),
    Row(
        "the n-th system call fails (EIO, ENOSPC, short, torn), for every n",
        "`io_error`, or the put is refused; the next call works, or the tier is read-only until it is reopened",
        "at most the chunk that was being written or read",
        "test_nvme_faults.py::test_every_call_may_fail",
    ),
    Row(
        "a flush fails",
        "puts are refused (`io_error`) until the tier is reopened; reads go on",
        "nothing that was acknowledged",
        "test_nvme_faults.py::test_a_failed_commit_makes_the_tier_read_only",
    ),
    Row(
        "bits rot on the disk",
        "a miss (`corrupt`), and the chunk is removed",
        "that chunk",
        "test_store.py::test_a_chunk_gone_bad_on_disk_is_a_miss_and_is_quarantined",
    ),
    Row(
        "the disk stalls",
        "`deadline` at the deadline; nothing leaks when it comes back",
        "nothing",
        "test_store.py::test_a_stalled_disk_is_a_miss_at_the_deadline_and_leaks_nothing",
    ),
    Row(
        "the disk dies",
        "misses (`io_error`); memory goes on",
        "what was only on that disk",
        "test_store.py::test_a_dead_disk_costs_misses_not_exceptions",
    ),
    Row(
        "every limit is reached at once",
        "`busy` or `full`, with Retry-After over HTTP; never a deadlock",
        "nothing",
        "test_limits_reached.py::TestLimits",
    ),
    Row(
        "the clock on the wall is set",
        "nothing: every deadline, lease and pin goes by the monotonic clock; how long a volume was closed does not",
        "nothing; of a volume closed meanwhile, chunks with a `ttl` that count as older than they are",
        "test_chaos_events.py::test_no_wait_and_no_expiry_looks_at_the_clock_on_the_wall",
    ),
)


def page() -> str:
    """The whole page."""
    return HEAD + "".join(f"| {row.event} | {row.sees} | {row.lost} | `tests/{row.test}` |\n" for row in ROWS)


if __name__ == "__main__":
    print(page(), end="")
