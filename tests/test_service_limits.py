"""The daemon's worker threads: what a request that has ended leaves behind is given back."""

from __future__ import annotations

import asyncio
import threading
import time

from kvstore.service.limits import Workers


def test_a_result_that_nobody_waits_for_any_more_is_given_back() -> None:
    gate = threading.Event()
    given_back: list[str] = []

    def reserve() -> str:
        return "place" if gate.wait(30) else "late"

    async def leave_while_it_runs() -> None:
        workers = Workers(1)
        waiting = asyncio.ensure_future(workers.acquire(time.monotonic() + 30, given_back.append, reserve))
        while not workers.jobs:
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        assert waiting.cancelled()
        assert given_back == []
        gate.set()
        async with asyncio.timeout(30):
            while workers.jobs or not given_back:
                await asyncio.sleep(0.01)
        workers.close(wait=True)

    asyncio.run(leave_while_it_runs())
    assert given_back == ["place"]
