"""Every exception kvstore raises on purpose.

Exceptions are for the caller's mistakes and for trouble the caller must act on. A chunk that cannot be served is not an
exception: it is a `kvstore.outcome.Miss` with a reason, so that an engine recomputes and goes on.

KVStoreError
├── ConfigError            a setting, flag or URL is wrong; names the field and the remedy (also a ValueError)
├── SpecError              a model geometry or tensor does not fit the KVSpec (also a ValueError)
├── ContainerError         bytes are not a servable KVC1 container; carries the miss reason (also a ValueError)
├── CodecError             a codec is unknown or cannot encode what it was given (also a ValueError)
├── TierError              a tier cannot start or go on (also an OSError)
│   ├── VolumeBusyError    another process owns the volume
│   └── VolumeFormatError  the files are not a kvstore volume, or of another version
├── ServiceError           the daemon refused or broke a request
│   └── ServiceUnavailableError   nobody answers at the address
└── UnsupportedModelError  the connector cannot serve this model exactly; names what and why (also a ValueError)
"""

from __future__ import annotations

from kvstore.outcome import Reason


class KVStoreError(Exception):
    """Base of every exception kvstore raises on purpose."""


class ConfigError(KVStoreError, ValueError):
    """A setting, flag or URL is wrong. The message names the field and the remedy."""


class SpecError(KVStoreError, ValueError):
    """A model geometry or a tensor does not fit the KVSpec."""


class ContainerError(KVStoreError, ValueError):
    """Bytes are not a servable container. `reason` is what the miss will be called."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class CodecError(KVStoreError, ValueError):
    """A codec is unknown or cannot encode what it was given."""


class TierError(KVStoreError, OSError):
    """A tier cannot start or cannot go on."""


class VolumeBusyError(TierError):
    """Another process holds the volume's lock."""


class VolumeFormatError(TierError):
    """The files are not a kvstore volume, or one of another format version."""


class ServiceError(KVStoreError):
    """The daemon refused a request or broke the protocol."""


class ServiceUnavailableError(ServiceError):
    """Nobody answers at the daemon's address."""


class UnsupportedModelError(KVStoreError, ValueError):
    """The connector cannot serve this model exactly. The message names what is unsupported and why."""
