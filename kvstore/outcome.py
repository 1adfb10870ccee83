"""What happened to one chunk: a value, never an exception.

Every verb answers per chunk. A chunk that was not served carries a `Miss` with a `Reason` from one closed list, which
is also the label of the counters, the word in the HTTP answers and what `explain` prints.
"""

from __future__ import annotations

import enum

import msgspec


class Reason(enum.StrEnum):
    """Why a chunk was not served, or not stored. Stable names: they are metric labels and wire values."""

    ABSENT = "absent"  # no tier holds the key
    EXPIRED = "expired"  # it was there, and has not been used for as long as its tier keeps such
    PARENT_ABSENT = "parent_absent"  # the chunk may be there, but the prefix before it has a hole
    CORRUPT = "corrupt"  # a checksum failed
    TRUNCATED = "truncated"  # fewer bytes than the header promises
    MALFORMED = "malformed"  # not a container, or its header contradicts itself
    UNKNOWN_VERSION = "unknown_version"  # written by a newer format
    UNKNOWN_CODEC = "unknown_codec"  # no such codec in this build
    UNKNOWN_PROFILE = "unknown_profile"  # the codec's calibrated tables are not here
    UNGATED = "ungated"  # lossy, and its quality has no recorded pass for this model
    LOW_QUALITY = "low_quality"  # stored, but only below the quality asked for
    WRONG_FINGERPRINT = "wrong_fingerprint"  # bytes of another model, revision, dtype or rope
    WRONG_KEY = "wrong_key"  # bytes of another chunk
    DEADLINE = "deadline"  # it would have come too late
    NOT_WORTH_IT = "not_worth_it"  # computing it again is quicker than loading it
    IO_ERROR = "io_error"  # the device or file system failed
    UNAVAILABLE = "unavailable"  # the daemon or tier does not answer
    BUSY = "busy"  # a bounded queue is full; try again later
    FULL = "full"  # no room: everything evictable is leased or pinned
    OVER_QUOTA = "over_quota"  # the tenant's quota is used up, by chunks that have to stay
    TOO_LARGE = "too_large"  # larger than the tier, or than the configured limit
    READ_ONLY = "read_only"  # the tier accepts no writes
    NOT_ADMITTED = "not_admitted"  # the tier's admission policy did not think it worth its place


class Miss(msgspec.Struct, frozen=True):
    """A chunk that was not served: the reason, and one line for a person."""

    reason: Reason
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else str(self.reason)


class PutStatus(msgspec.Struct, frozen=True):
    """What became of one put: stored or not, already durable or not, and why not.

    `stored` means a get from now on finds the chunk (until it is evicted). `durable` means it also survives `kill -9`
    and a restart. `existed` means the same key was there before, and nothing was written.
    """

    stored: bool
    durable: bool = False
    existed: bool = False
    reason: Reason | None = None
    detail: str = ""


class Lookup(msgspec.Struct, frozen=True):
    """The longest usable prefix of a list of chunk keys, and where each of its chunks lies.

    `tiers[i]` names the fastest tier that holds chunk i, for the `len(tiers)` leading chunks that are all there, and
    `nbytes[i]` its container bytes there; a store that does not know them leaves `nbytes` empty. `stop` says why the
    prefix ends where it does; it is None when every key was found.
    """

    tiers: tuple[str, ...]
    stop: Miss | None = None
    nbytes: tuple[int, ...] = ()

    @property
    def chunks(self) -> int:
        """Number of leading chunks that can be fetched now."""
        return len(self.tiers)
