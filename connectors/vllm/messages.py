"""What the scheduler's side of the connector and the workers' tell each other at every step of the engine."""

from __future__ import annotations

import math

import msgspec

from kvstore.outcome import Reason


class LoadJob(msgspec.Struct, frozen=True, kw_only=True):
    """KV of tokens `start`..`stop` of a request, to be brought into `block_ids`, which hold exactly these tokens.

    `keys` are the chunks that cover them, the first of which is chunk `first_chunk` of the request; `tiers` and
    `nbytes` are where the lookup has found them, and how large. With `wait` the step's forward pass needs them;
    otherwise the request stands still until the load is reported as finished. `savings_ms` is what each chunk saves
    the engine, None if that is not known or not asked for; the load takes `deadline_ms` at most.
    """

    request_id: str
    keys: list[bytes]
    first_chunk: int
    start: int
    stop: int
    block_ids: list[int]
    wait: bool
    tiers: list[str]
    nbytes: list[int]
    savings_ms: list[float] | None = None
    deadline_ms: float = math.inf


class SaveJob(msgspec.Struct, frozen=True, kw_only=True):
    """Chunks `first_chunk`.. of `chain`, complete after this step, to be stored.

    `block_ids` hold the request's tokens from `start`, a multiple of the block size, on. With `replace`, what the store
    has under these keys has been found bad.
    """

    job_id: int
    request_id: str
    chain: list[bytes]
    first_chunk: int
    start: int
    block_ids: list[int]
    replace: bool = False


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Scheduler to workers: what to do at one step.

    `abandoned` are preempted requests: what has not been read of their blocks by now may not be read any more. `held`
    are finished requests whose blocks are kept until every worker reports them as saved. `fingerprint` names the model.
    `epoch` grows with every failed load that the scheduler has been told of.
    """

    fingerprint: bytes = b""
    epoch: int = 0
    loads: list[LoadJob] = []
    saves: list[SaveJob] = []
    abandoned: list[str] = []
    held: list[str] = []

    def named(self, fingerprint: bytes) -> StepPlan:
        """The same with the model's name, if the workers need it to do something."""
        return msgspec.structs.replace(self, fingerprint=fingerprint) if self.loads or self.saves else self


class FailedLoad(msgspec.Struct, frozen=True):
    """A load stopped at a chunk: its position in the request, and the reason."""

    chunk: int
    reason: Reason


class Observation(msgspec.Struct, frozen=True):
    """What something took: so many container bytes from a tier, or with `codec` decoding one chunk of so many."""

    tier: str
    nbytes: int
    ms: float
    codec: str = ""


class StepReport(msgspec.Struct):
    """Workers to scheduler: save jobs that have ended, by number of workers, loads that have failed, by request, and
    what loads and decoding took.
    """

    ended: dict[int, int] = {}
    failed: dict[str, FailedLoad] = {}
    observations: list[Observation] = []

    def merge(self, other: StepReport) -> StepReport:
        """Both workers' reports; of two failed loads of one request the one that stopped first."""
        ended = dict(self.ended)
        for job_id, workers in other.ended.items():
            ended[job_id] = ended.get(job_id, 0) + workers
        failed = dict(self.failed)
        for request_id, failure in other.failed.items():
            known = failed.get(request_id)
            failed[request_id] = failure if known is None or failure.chunk < known.chunk else known
        return StepReport(ended=ended, failed=failed, observations=self.observations + other.observations)
