"""Documents as chunks that can be reused anywhere in a prompt, and the spans that a plan of a prompt consists of.

A document is computed behind a preamble (the tokens that every prompt of a model begins with: BOS, a fixed system
prefix), as one causal run, and cut into pieces of at most `chunk_tokens` tokens. A piece's KV depends on the preamble,
on the pieces before it and on itself, and its key says exactly that: it is the content key of its own tokens behind
the key of the piece before it; the first piece stands behind the key of the preamble, which is the content key of the
preamble's tokens behind nothing (zeros for an empty one). So a piece may be used in a prompt where the pieces before
it stand before it: in the prompt's text, whether they are loaded or computed. docs/blend.md explains.
"""

from __future__ import annotations

import enum
from typing import Literal

import msgspec

from kvstore.errors import ConfigError
from kvstore.keys import ROOT, KeyScheme, Tokens, token_array

SpanKind = Literal["prefix", "content", "recompute"]


class Piece(msgspec.Struct, frozen=True):
    """One chunk of a document: tokens start..stop of it, whose first token was computed at `position`.

    `parent` is the key of the piece before it, for the first piece that of the preamble. The container of a piece has
    `container.FLAG_CONTENT_KEY`, this parent, and `position` as its first position.
    """

    key: bytes
    start: int
    stop: int
    position: int
    parent: bytes = ROOT


class SpanReason(enum.StrEnum):
    """Why tokens of a prompt are recomputed. Stable names: they are wire values."""

    NEW = "new"  # no chunk with this text is known
    ABSENT = "absent"  # the text is a known chunk's, and no tier holds it
    OVERLAP = "overlap"  # it belongs to a known chunk, another part of which is covered by a better span
    NOT_WORTH_IT = "not_worth_it"  # computing it is quicker than loading it
    TOKENISATION = "tokenisation"  # the document's tokens are not the prompt's: its text was tokenised differently here
    PREAMBLE = "preamble"  # it was computed behind another preamble than this prompt's
    LAST_TOKEN = "last_token"  # its logits are what the prompt is for
    UNAVAILABLE = "unavailable"  # the store does not answer


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """What to do about the tokens start..stop of a prompt.

    prefix     load the chunks `keys` of the chain from the prompt's start, in place.
    content    load the one chunk `keys[0]`, whose first token was computed at `position`, and move it to `start`.
               `preamble_matches` says whether it was computed behind the tokens that the prompt begins with.
    recompute  compute it; `reason` and `detail` say why.

    A span uses the first `stop - start` tokens of its chunks; only a span that ends before the prompt's last token
    uses fewer than they have. `tiers` and `nbytes` say where each chunk lies and how many container bytes it has.
    `load_ms` is what loading should take and `compute_ms` what computing should; None where that is not known yet.
    """

    kind: SpanKind
    start: int
    stop: int
    keys: tuple[bytes, ...] = ()
    position: int = 0
    preamble_matches: bool = True
    tiers: tuple[str, ...] = ()
    nbytes: tuple[int, ...] = ()
    load_ms: float | None = None
    compute_ms: float | None = None
    reason: SpanReason | None = None
    detail: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of the span."""
        return self.stop - self.start


class Document(msgspec.Struct, frozen=True):
    """Where a prompt has a document: tokens start..stop of it.

    `tokens` are the document's own, as it was cut and stored, if the caller has them: a tokeniser may merge text across
    a document's ends, so that the prompt's are others. None where the prompt's tokens are the document's.
    """

    start: int
    stop: int
    tokens: Tokens | None = None


def preamble_key(keys: KeyScheme, preamble: Tokens) -> bytes:
    """Key of a preamble's tokens, which the first piece of every document stands behind; zeros if there are none."""
    return keys.content(preamble) if len(preamble) else ROOT


def cut(keys: KeyScheme, document: Tokens, *, preamble: Tokens = (), context_tokens: int | None = None) -> list[Piece]:
    """The pieces of a document that is computed behind `preamble`: `keys.chunk_tokens` tokens each, the last the rest.

    Args:
        keys: the model's key scheme.
        document: its token ids.
        preamble: token ids that it is computed behind.
        context_tokens: how many positions the model has, if that is to be checked.

    Raises:
        ConfigError: the document is empty, or does not fit the context behind the preamble.
        SpecError: a token id is not in 0..2**32-1.
    """
    ids = token_array(document)
    first = len(preamble)
    if not len(ids):
        raise ConfigError("document is empty; leave it out")
    if context_tokens is not None and first + len(ids) > context_tokens:
        raise ConfigError(
            f"document has {len(ids)} tokens; behind {first} of the preamble the model's context of {context_tokens} "
            f"has no room for them: cut the document"
        )
    pieces = []
    parent = preamble_key(keys, preamble)
    for start in range(0, len(ids), keys.chunk_tokens):
        stop = min(start + keys.chunk_tokens, len(ids))
        key = keys.content(ids[start:stop], parent)
        pieces.append(Piece(key, start, stop, first + start, parent))
        parent = key
    return pieces
