"""A bounded index of documents' pieces, which finds them in a prompt at any offset and compares every token.

The first `width` tokens of every document's first piece are hashed, with the largest of SCAN_WIDTHS that it has; a
document of fewer tokens than the least of them is not found by scanning. A prompt's windows of each width are hashed
in one pass and looked up all at once; where a first piece begins, its tokens are compared, then those of the pieces
that continue it, as far as the prompt agrees. So a piece is found only where all that it was computed behind stands
before it.

The least recently found pieces leave first, each with those that continue it, for these could not be found without it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterator

import msgspec
import numpy as np
import numpy.typing as npt

from kvstore.errors import ConfigError
from kvstore.rolling_hash import Hashes, WindowHasher, window_hash
from kvstore.sidecar import SideCar, sidecar_key

INDEX_BYTES_MAX_DEFAULT = 64 << 20
"""About 1.8 KiB for a piece of 256 tokens: 36,000 pieces."""

ENTRY_BYTES = 800
"""What an entry takes besides its token ids."""

SCAN_WIDTHS = (64, 32, 16, 8)

MATCHES_MAX = 4096
COMPARISONS_MAX = 65_536
"""Bounds on one scan: a prompt that repeats itself could match in more ways than are worth finding."""

_FILTER_BITS_MAX = 20


class Match(msgspec.Struct, frozen=True):
    """Tokens start..stop of a prompt are those of a piece; `origin` is where the piece's document begins there."""

    start: int
    stop: int
    origin: int
    piece: SideCar


class _Heads:
    """First pieces of one scope by the hash of their first tokens, for one width."""

    def __init__(self) -> None:
        self.by_hash: dict[int, list[bytes]] = {}
        self._sorted: Hashes | None = None
        self._filter = np.zeros(0, bool)
        self._shift = np.uint64(0)

    def add(self, number: int, key: bytes) -> None:
        if number not in self.by_hash:
            self._sorted = None
        self.by_hash.setdefault(number, []).append(key)

    def remove(self, number: int, key: bytes) -> None:
        keys = self.by_hash[number]
        keys.remove(key)
        if not keys:
            del self.by_hash[number]
            self._sorted = None

    def places(self, hashes: Hashes) -> npt.NDArray[np.intp]:
        """Where in `hashes` there is one that is known."""
        if self._sorted is None:
            self._sorted = np.sort(np.fromiter(self.by_hash, np.uint64, len(self.by_hash)))
            bits = min(_FILTER_BITS_MAX, len(self.by_hash).bit_length() + 4)
            self._shift = np.uint64(64 - bits)
            self._filter = np.zeros(1 << bits, bool)
            self._filter[(self._sorted >> self._shift).astype(np.intp)] = True
        # A table of the highest bits first: most windows are of no known document.
        (likely,) = np.nonzero(self._filter[(hashes >> self._shift).astype(np.intp)])
        found = np.searchsorted(self._sorted, hashes[likely])
        found[found == len(self._sorted)] = 0
        places: npt.NDArray[np.intp] = likely[self._sorted[found] == hashes[likely]]
        return places


class SpanIndex:
    """Pieces of documents, by what they say. Safe to use from many threads.

    Args:
        bytes_max: bound on what the entries take, token ids included.

    Raises:
        ConfigError: the bound is not positive.
    """

    def __init__(self, bytes_max: int = INDEX_BYTES_MAX_DEFAULT) -> None:
        if bytes_max <= 0:
            raise ConfigError(f"bytes_max is {bytes_max}; an index of spans needs a positive bound")
        self.bytes_max = bytes_max
        self._lock = threading.Lock()
        self._pieces: OrderedDict[bytes, SideCar] = OrderedDict()
        self._by_sidecar: dict[bytes, bytes] = {}
        self._children: defaultdict[bytes, list[bytes]] = defaultdict(list)
        self._heads: defaultdict[bytes, dict[int, _Heads]] = defaultdict(dict)
        self._used_bytes = 0
        self._counts = dict.fromkeys(("added", "refused", "evicted", "found", "scans", "scans_cut_short"), 0)

    def __contains__(self, key: bytes) -> bool:
        with self._lock:
            return key in self._pieces

    def __len__(self) -> int:
        return len(self._pieces)

    def add(self, piece: SideCar, *, evict: bool = True) -> bool:
        """Make a piece known, or more recent if it is; False if there is no room for it.

        Room is made for a piece, unless `evict` is False, by the least recently found ones; never by those before it,
        and never for one that could not be found because those before it are not known.
        """
        piece = msgspec.structs.replace(piece, sections={})
        nbytes = _nbytes(piece)
        with self._lock:
            if piece.key not in self._pieces:
                if not self._make_room(piece, nbytes, evict=evict):
                    self._counts["refused"] += 1
                    return False
                self._insert(piece, nbytes)
            self._touch(piece.key)
            return True

    def described_by(self, name: bytes) -> bytes | None:
        """The key of the known piece whose side-car has this key."""
        with self._lock:
            return self._by_sidecar.get(name)

    def refresh(self, name: bytes) -> bool:
        """Make the piece whose side-car has this key more recent; False if it is not known."""
        with self._lock:
            key = self._by_sidecar.get(name)
            if key is not None:
                self._touch(key)
            return key is not None

    def discard(self, key: bytes) -> bool:
        """Forget a piece and those that continue it; True if it was known."""
        with self._lock:
            known = key in self._pieces
            if known:
                self._remove(key, "")
            return known

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._pieces.clear()
            self._by_sidecar.clear()
            self._children.clear()
            self._heads.clear()
            self._used_bytes = 0

    def find(self, scope: bytes, ids: npt.NDArray[np.uint32]) -> list[Match]:
        """Every piece of `scope` whose document's beginning, up to the end of the piece, stands in a prompt.

        In order of the places where documents begin; at most MATCHES_MAX of them.
        """
        prompt = np.ascontiguousarray(ids, dtype="<u4").tobytes()
        matches: list[Match] = []
        with self._lock:
            self._counts["scans"] += 1
            heads = self._heads.get(scope)
            if not heads:
                return matches
            comparisons = COMPARISONS_MAX
            for origin, keys in self._beginnings(heads, ids):
                for key in keys:
                    comparisons = self._follow(key, origin, prompt, matches, comparisons)
                    if comparisons <= 0 or len(matches) >= MATCHES_MAX:
                        self._counts["scans_cut_short"] += 1
                        return self._used(matches[:MATCHES_MAX])
            return self._used(matches)

    def stats(self) -> dict[str, int]:
        """Pieces and bytes now; pieces added, refused and evicted, matches found, scans, and scans cut short so far."""
        with self._lock:
            return {"pieces": len(self._pieces), "used_bytes": self._used_bytes, **self._counts}

    def _beginnings(self, heads: dict[int, _Heads], ids: npt.NDArray[np.uint32]) -> Iterator[tuple[int, list[bytes]]]:
        """(position, keys) of first pieces whose first tokens have the right hash, in order of position."""
        hasher = WindowHasher(ids)
        places = []
        for width, known in heads.items():
            hashes = hasher.windows(width)
            places += [(int(place), known.by_hash[int(hashes[place])]) for place in known.places(hashes)]
        yield from sorted(places, key=lambda place: place[0])

    def _follow(self, key: bytes, origin: int, prompt: bytes, matches: list[Match], comparisons: int) -> int:
        """Compare a first piece at `origin`, and what continues it; answers how many comparisons are left."""
        waiting = [(key, origin)]
        while waiting and comparisons > 0 and len(matches) < MATCHES_MAX:
            key, start = waiting.pop()
            piece = self._pieces[key]
            comparisons -= 1
            if prompt.startswith(piece.tokens, 4 * start):
                stop = start + len(piece.tokens) // 4
                matches.append(Match(start, stop, origin, piece))
                waiting += [(child, stop) for child in self._children.get(key, ())]
        return comparisons

    def _used(self, matches: list[Match]) -> list[Match]:
        self._counts["found"] += len(matches)
        continued = {match.piece.parent for match in matches}
        for key in {match.piece.key: None for match in matches}:
            if key not in continued:  # touching what continues it will do
                self._touch(key)
        return matches

    def _touch(self, key: bytes) -> None:
        """Make a piece recent, and those before it more so."""
        while key in self._pieces:
            self._pieces.move_to_end(key)
            piece = self._pieces[key]
            if piece.is_first:
                return
            key = piece.parent

    def _make_room(self, piece: SideCar, nbytes: int, *, evict: bool) -> bool:
        self._touch(piece.parent)
        evict = evict and (piece.is_first or piece.parent in self._pieces)
        while self._used_bytes + nbytes > self.bytes_max:
            oldest = next(iter(self._pieces), None)
            # The pieces before it have just been touched: if it is their turn, there are no others.
            if oldest is None or not evict or oldest == piece.parent:
                return False
            self._remove(oldest, "evicted")
        return True

    def _insert(self, piece: SideCar, nbytes: int) -> None:
        self._pieces[piece.key] = piece
        self._by_sidecar[sidecar_key(piece.key)] = piece.key
        self._used_bytes += nbytes
        self._counts["added"] += 1
        if not piece.is_first:
            self._children[piece.parent].append(piece.key)
        elif width := _width(piece):
            self._heads[piece.scope].setdefault(width, _Heads()).add(window_hash(piece.ids[:width]), piece.key)

    def _remove(self, key: bytes, count: str) -> None:
        """Forget a piece and those that continue it."""
        waiting = [key]
        while waiting:
            piece = self._pieces.pop(waiting.pop(), None)
            if piece is None:
                continue
            del self._by_sidecar[sidecar_key(piece.key)]
            self._used_bytes -= _nbytes(piece)
            if count:
                self._counts[count] += 1
            waiting += self._children.pop(piece.key, [])
            if piece.is_first:
                self._forget_head(piece)
            elif piece.key in self._children.get(piece.parent, ()):
                self._children[piece.parent].remove(piece.key)
                if not self._children[piece.parent]:
                    del self._children[piece.parent]

    def _forget_head(self, piece: SideCar) -> None:
        width = _width(piece)
        if not width:
            return
        heads = self._heads[piece.scope]
        heads[width].remove(window_hash(piece.ids[:width]), piece.key)
        if not heads[width].by_hash:
            del heads[width]
        if not heads:
            del self._heads[piece.scope]


def _width(piece: SideCar) -> int:
    """How many of its first tokens are hashed; 0 if it is too short to be scanned for."""
    tokens = len(piece.tokens) // 4
    return next((width for width in SCAN_WIDTHS if width <= tokens), 0)


def _nbytes(piece: SideCar) -> int:
    return ENTRY_BYTES + len(piece.tokens)
