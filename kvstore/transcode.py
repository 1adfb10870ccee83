"""Containers from one codec into another: on the way down to a tier with a codec of its own, and decoded on request.

A tier's codec is a `Recipe`. What a recipe may do depends on the chunk: an exact codec replaces any exact one; a lossy
codec needs the writer's permission (FLAG_LOSSY_ALLOWED), numbers that have not been through another lossy codec, and a
pass of the quality gate for the chunk's model, which also says with which profile. Whatever may not be changed, or does
not get smaller, stays as it is: a recipe never costs a chunk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Protocol

import msgspec

from kvstore import container, gate, kernels
from kvstore.chunk import check_coverage, decode_chunk, encode_chunk, encoded_bytes_max
from kvstore.client import QUALITY_EXACT, Origin
from kvstore.codec import Codec
from kvstore.container import FLAG_FROM_LOSSY, FLAG_LOSSY_ALLOWED, Header
from kvstore.counters import Counters
from kvstore.errors import CodecError, ConfigError, ContainerError
from kvstore.fetching import Step
from kvstore.keys import ROOT
from kvstore.loan import Loan, TransientBuffer, TransientPool
from kvstore.outcome import Miss, Reason

_log = logging.getLogger(__name__)

AS_IS = "as_is"
"""Name of the recipe that changes nothing."""

RAW = "raw"
ROOM_SECONDS = 2.0
"""How long a chunk waits for buffers to be decoded into; on its way down it then stays as it is."""


class Codecs(Protocol):
    """What the core needs of a codec registry; `kvstore.codecs.registry` is one."""

    def get(self, codec_id: str, profile: bytes = ROOT) -> Codec:
        """The codec. Raises ContainerError if there is none, or no such profile."""

    def is_exact(self, codec_id: str) -> bool | None:
        """Whether a codec returns the bits it was given; None if there is no such codec."""


class Recipe(msgspec.Struct, frozen=True):
    """A codec to store chunks in and, for a lossy one, the highest level to keep (None: all)."""

    codec: str
    level: int | None = None


def parse_recipe(text: str, field: str, codecs: Codecs) -> Recipe | None:
    """The recipe written as "CODEC" or "CODEC@LEVEL"; None for "as_is" and "".

    Raises:
        ConfigError: there is no such codec, or the level is not one; names `field`.
    """
    if text in ("", AS_IS):
        return None
    codec, at, level = text.partition("@")
    exact = codecs.is_exact(codec)
    if exact is None:
        try:
            codecs.get(codec)
        except ContainerError as error:
            raise ConfigError(f"{field} is {text!r}: {error.detail}; or use {AS_IS!r}") from error
        raise ConfigError(f"{field} is {text!r}: it does not say whether it is exact")
    if not at:
        return Recipe(codec)
    if exact or not level.isdecimal() or int(level) >= gate.LEVELS_MAX:
        raise ConfigError(f"{field} is {text!r}; write CODEC, or CODEC@LEVEL with the level of a lossy codec")
    levels = getattr(codecs.get(codec), "levels", 1)
    if int(level) >= levels:
        raise ConfigError(f"{field} is {text!r}; the highest level of {codec} is {levels - 1}")
    return Recipe(codec, int(level))


def quality(header: Header, codecs: Codecs) -> int:
    """The quality of a container, as `kvstore.client.Client` defines it."""
    if not codecs.is_exact(header.codec):
        return header.levels - 1
    return 0 if header.meta.flags & FLAG_FROM_LOSSY else QUALITY_EXACT


class Transcoder:
    """Puts containers into a tier's codec.

    Args:
        recipe: of the tier.
        codecs: to read and write with.
        gates: records of the quality gate.
        limits: what a lossy codec may do to a model.
        transient: budget of the buffers.
        counters: gets transcodes (label: done, truncated, or why not) and transcoded_bytes (label: before, after).
    """

    def __init__(
        self,
        recipe: Recipe,
        codecs: Codecs,
        *,
        gates: Sequence[gate.GateRecord],
        limits: gate.Limits,
        transient: TransientPool,
        counters: Counters,
    ) -> None:
        self.recipe = recipe
        self._codecs = codecs
        self._gates = gates
        self._limits = limits
        self._transient = transient
        self._counters = counters
        self._exact = bool(codecs.is_exact(recipe.codec))

    def recode(self, source: memoryview) -> Loan | None:
        """The container in the tier's codec, to be released by the caller; None if it should stay as it is."""
        try:
            header = container.parse(source)
            loan, outcome = self._recode(source, header)
        except (ContainerError, CodecError) as error:
            _log.warning("a chunk could not be put into codec %s and stays as it is: %s", self.recipe.codec, error)
            loan, outcome = None, "failed"
        if outcome:
            self._counters.add("transcodes", outcome)
        if loan is not None:
            self._counters.add("transcoded_bytes", "before", len(source))
            self._counters.add("transcoded_bytes", "after", len(loan.view))
        return loan

    def _recode(self, source: memoryview, header: Header) -> tuple[Loan | None, str]:
        same = header.codec == self.recipe.codec
        was_exact = self._codecs.is_exact(header.codec)
        if was_exact is None or (same and (self._exact or not self._surplus(header))):
            return None, ""
        if not self._exact and not header.meta.flags & FLAG_LOSSY_ALLOWED:
            return None, "exact_wanted"
        if not same and (not was_exact or (not self._exact and header.meta.flags & FLAG_FROM_LOSSY)):
            return None, "lossy_already"
        codec = self._codecs.get(header.codec, header.profile) if same else self._choose(header)
        if codec is None or (same and not self._passes(codec, header)):
            return None, "ungated"
        room = len(source) if same else encoded_bytes_max(codec, header.meta.spec, header.meta.tokens)
        buffer = self._transient.take(room, deadline=time.monotonic() + ROOM_SECONDS)
        if buffer is None:
            return None, "no_room"
        nbytes = 0
        try:
            if same:
                nbytes = truncate(source, buffer.view, self._level(codec, header))
            else:
                nbytes = self._convert(source, header, codec, buffer)
        finally:
            if not 0 < nbytes < len(source):
                buffer.release()
        if not 0 < nbytes < len(source):
            return None, "no_smaller" if nbytes else "no_room"
        return Loan(buffer.view[:nbytes], "transient", buffer), "truncated" if same else "done"

    def _convert(self, source: memoryview, header: Header, codec: Codec, target: TransientBuffer) -> int:
        scratch = self._transient.take(
            header.meta.spec.chunk_bytes(header.meta.tokens), deadline=time.monotonic() + ROOM_SECONDS
        )
        if scratch is None:
            return 0
        try:
            return convert(source, header, codec, scratch.view, target.view, self._codecs, level_max=self.recipe.level)
        finally:
            scratch.release()

    def _surplus(self, header: Header) -> bool:
        """Whether a container in the tier's lossy codec has levels that the tier does not keep."""
        return self.recipe.level is not None and header.levels - 1 > self.recipe.level

    def _level(self, codec: Codec, header: Header) -> int:
        """The highest level that the tier keeps of a chunk."""
        highest = max(plan.level for plan in codec.plan(header.meta.spec, header.meta.tokens))
        return highest if self.recipe.level is None else min(highest, self.recipe.level)

    def _passes(self, codec: Codec, header: Header) -> bool:
        level = self._level(codec, header)
        return gate.check(self._gates, header.meta.fingerprint, codec, level, self._limits).passed

    def _choose(self, header: Header) -> Codec | None:
        """The tier's codec with the profile that is smallest among those that pass for the chunk's model."""
        if self._exact:
            return self._codecs.get(self.recipe.codec)
        passing: list[tuple[float, Codec]] = []
        for record in self._gates:
            if (record.fingerprint, record.codec, record.variant) != (
                header.meta.fingerprint.hex(),
                self.recipe.codec,
                "",
            ):
                continue
            try:
                codec = self._codecs.get(record.codec, bytes.fromhex(record.profile))
                level = self._level(codec, header)
            except (ContainerError, CodecError) as error:
                _log.warning("profile %s has a gate record and cannot be used: %s", record.profile[:12], error)
                continue
            sizes = [result.metrics.bits_per_element for result in record.levels if result.level == level]
            if sizes and self._passes(codec, header):
                passing.append((sizes[0], codec))
        return min(passing, key=lambda pair: pair[0])[1] if passing else None


def truncate(source: memoryview, target: memoryview, level_max: int) -> int:
    """Write a container without its levels above `level_max`, every byte verified on the way; answers its size.

    Args:
        source: a container.
        target: as many bytes as `source` has are enough.
        level_max: the highest level to keep; side-cars stay.

    Raises:
        ContainerError: the source is damaged.
    """
    header = container.parse(source)
    kept = [
        segment for segment in header.segments if segment.part >= container.PART_ANCILLARY or segment.level <= level_max
    ]
    writer = container.ContainerWriter(
        target, header.meta, codec=header.codec, segment_count=len(kept), profile=header.profile
    )
    for segment in kept:
        data = source[segment.offset : segment.offset + segment.length]
        if kernels.copy_xxh3(writer.tail(segment.level)[: segment.length], data) != segment.xxh3:
            raise ContainerError(Reason.CORRUPT, container.segment_label(segment))
        writer.commit(
            level=segment.level,
            part=segment.part,
            layers=segment.layers,
            nbytes=segment.length,
            xxh3=segment.xxh3,
            params=segment.params,
        )
    return writer.finish()


def convert(
    source: memoryview,
    header: Header,
    codec: Codec,
    scratch: memoryview,
    target: memoryview,
    codecs: Codecs,
    *,
    level_max: int | None = None,
) -> int:
    """Write a container's chunk in another codec, every byte verified; answers the size.

    Args:
        source: the container.
        header: its header.
        codec: what to write.
        scratch: room for the decoded chunk, `KVSpec.chunk_bytes`.
        target: room for the result, `encoded_bytes_max`.
        codecs: to read with.
        level_max: the highest level to write; None for all.

    Raises:
        ContainerError: the source cannot be decoded.
        CodecError: the codec cannot write it.
    """
    meta = header.meta
    arrays = meta.spec.arrays(scratch, meta.tokens)
    decode_chunk(source, arrays, codecs.get)
    if not codecs.is_exact(header.codec):
        meta = msgspec.structs.replace(meta, flags=meta.flags | FLAG_FROM_LOSSY)
    return encode_chunk(codec, meta, arrays, target, level_max=level_max)


def decoded_steps(
    steps: Iterator[Step], codecs: Codecs, transient: TransientPool, deadline: float
) -> Generator[Step, None, None]:
    """The same steps, each a whole chunk, in codec raw; what cannot be decoded misses with the reason."""
    raw = codecs.get(RAW)
    try:
        for step in steps:
            if step.header is None or step.header.codec == RAW:
                yield step
                continue
            yield from _decoded(step, step.header, raw, codecs, transient, deadline)
    finally:
        close = getattr(steps, "close", None)
        if close is not None:
            close()


def _decoded(
    step: Step, header: Header, raw: Codec, codecs: Codecs, transient: TransientPool, deadline: float
) -> Generator[Step, None, None]:
    meta = header.meta
    if codecs.is_exact(header.codec) is None:
        yield Step(step.index, Miss(Reason.UNKNOWN_CODEC, f"{header.codec!r} is not a codec of this store"))
        return
    sizes = [meta.spec.chunk_bytes(meta.tokens), encoded_bytes_max(raw, meta.spec, meta.tokens)]
    # Not for long: the chunk itself, and others of its window, may take such room.
    taken = transient.take_all(sizes, deadline=min(deadline, time.monotonic() + ROOM_SECONDS))
    buffers = [buffer for buffer in taken if buffer is not None]
    try:
        if len(buffers) < len(sizes):
            yield Step(step.index, Miss(Reason.FULL, f"no room for {sum(sizes)} bytes to decode into"))
            return
        scratch, target = buffers
        try:
            check_coverage(header)
            nbytes = convert(step.view, header, raw, scratch.view, target.view, codecs)
        except (ContainerError, CodecError) as error:
            reason = error.reason if isinstance(error, ContainerError) else Reason.MALFORMED
            yield Step(step.index, Miss(reason, str(error)))
            return
        buffers.remove(scratch)
        scratch.release()
        view = target.view[:nbytes].toreadonly()
        result = container.parse(view)
        yield Step(step.index, None, result, tuple(result.groups()), view, None, "", origin=_origin(header, codecs))
    finally:
        for buffer in buffers:
            buffer.release()


def _origin(header: Header, codecs: Codecs) -> Origin | None:
    if codecs.is_exact(header.codec):
        return None
    return Origin(codec=header.codec, profile=header.profile.hex(), level=header.levels - 1)
