"""The bounds of a store's movements, as its configuration sets them."""

from __future__ import annotations

import msgspec

from kvstore import gate
from kvstore.errors import ConfigError
from kvstore.promotion_gate import PROMOTIONS
from kvstore.sizes import parse_bytes

_NOT_SIZES = ("lossy_limits", "promotion", "pinned_share_max")


class StoreSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds of a store's movements; sizes in bytes or as "64MiB". None: a quarter of the memory tier, at least 64 MiB.

    `lossy_limits` names the limits of the quality gate (`kvstore.gate.PURPOSES`) that a model must pass before a tier
    stores its chunks in a lossy codec. `promotion` says what memory keeps of what is read from below
    (`kvstore.promotion_gate`). `pinned_share_max` is what may be pinned of each tier's capacity.

    Raises:
        ConfigError: a size cannot be read or is not positive, or another value is not one of those there are.
    """

    write_behind_bytes_max: int | str | None = None
    write_behind_batch_bytes: int | str = "64MiB"
    fetch_window_bytes: int | str | None = None
    transient_bytes_max: int | str = "512MiB"
    promotion: str = "always"
    prefetch_chunks_max: int = 1024
    prefetch_batch_bytes: int | str = "64MiB"
    prefetch_threads: int = 2
    mover_threads: int = 4
    lossy_limits: str = "standard"
    pinned_share_max: float = 1.0

    def __post_init__(self) -> None:
        if self.lossy_limits not in gate.PURPOSES:
            raise ConfigError(f"store.lossy_limits is {self.lossy_limits!r}; use one of {', '.join(gate.PURPOSES)}")
        if self.promotion not in PROMOTIONS:
            raise ConfigError(f"store.promotion is {self.promotion!r}; use one of {', '.join(PROMOTIONS)}")
        if not 0 <= self.pinned_share_max <= 1:
            raise ConfigError(f"store.pinned_share_max is {self.pinned_share_max}; it must be in 0..1")
        for field in self.__struct_fields__:
            value = getattr(self, field) if field not in _NOT_SIZES else None
            if value is not None and parse_bytes(value, f"store.{field}") <= 0:
                raise ConfigError(f"store.{field} is {value!r}; it must be positive")

    def nbytes(self, field: str, default: int) -> int:
        """A size in bytes."""
        value = getattr(self, field)
        return default if value is None else parse_bytes(value, f"store.{field}")
