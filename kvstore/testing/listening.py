"""What a tier tells its listener: a part of `kvstore.testing.tier.TierContract`."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from kvstore.testing.harness import TierHarness, bytes_of, item, key_of, put
from kvstore.tier import IO_ALIGN, Entry, Removal, Tier

Told = tuple[str, bytes]


class Recorder:
    """A listener that keeps what it hears: (stored or the removal, key) in `told`, sizes and parents in `entries`."""

    def __init__(self) -> None:
        self.told: list[Told] = []
        self.entries: list[Entry] = []
        self.heads: list[bytes] = []

    def stored(self, entry: Entry, data: memoryview) -> None:
        self.told.append(("stored", entry.key))
        self.entries.append(entry)
        self.heads.append(bytes(data[:IO_ALIGN]))

    def removed(self, entries: Sequence[Entry], removal: Removal) -> None:
        self.told += [(str(removal), entry.key) for entry in entries]
        self.entries += entries

    def present(self) -> set[bytes]:
        """The keys in the tier, from what it told alone; raises AssertionError where that contradicts itself."""
        keys: set[bytes] = set()
        for what, key in self.told:
            assert (key in keys) == (what != "stored"), f"{what} of {key.hex()[:12]} out of order"
            keys ^= {key}
        return keys


class ListenerContract(TierHarness):
    """What enters and leaves is told, once, in order."""

    def listen(self, tier: Tier) -> Recorder:
        """Listen to an empty tier."""
        recorder = Recorder()
        tier.listener = recorder
        return recorder

    def test_stored_chunks_are_told_with_their_parents_and_first_bytes(self, tier: Tier) -> None:
        recorder = self.listen(tier)
        tier.put([item(1, 100), item(2, 5000, key_of(1))])
        assert sorted(recorder.entries, key=lambda entry: entry.nbytes) == [
            Entry(key_of(1), bytes(32), 100),
            Entry(key_of(2), key_of(1), 5000),
        ]
        heads = dict(zip(recorder.told, recorder.heads, strict=True))
        assert heads["stored", key_of(2)] == bytes_of(2, 5000)[:IO_ALIGN]
        assert put(tier, 1, 100).existed
        assert not put(tier, 3, tier.chunk_bytes_max + 1).stored
        assert len(recorder.told) == 2

    def test_evictions_and_deletions_are_told(self, tier: Tier) -> None:
        recorder = self.listen(tier)
        for number in range(5):
            assert put(tier, number, self.quarter).stored
        assert recorder.told.index(("evicted", key_of(0))) < recorder.told.index(("stored", key_of(4)))
        assert tier.delete([key_of(1), key_of(77), key_of(1)]) == [True, False, False]
        assert recorder.told[-1] == ("deleted", key_of(1))
        told = list(recorder.told)
        tier.close()
        assert recorder.told == told

    def test_what_is_told_is_what_is_there_whatever_threads_do(self, tier: Tier) -> None:
        recorder = self.listen(tier)

        def work(seed: int) -> None:
            for step in range(30):
                number = (seed * 7 + step * 3) % 12
                if step % 4 == 3:
                    tier.delete([key_of(number)])
                else:
                    put(tier, number, self.quarter // 2)

        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(work, seed) for seed in range(4)]:
                done.result(timeout=120)
        assert recorder.present() == {entry.key for entry in tier.scan()}
