"""Where the KV of a part of a prompt comes from: the tensors of a span, layer by layer, and what is known of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from kvstore.connectors.blend.chunk_statistics import ChunkStatistics
from kvstore.errors import SpecError

KV = tuple[torch.Tensor, torch.Tensor]
"""K and V of one layer, each (heads, tokens, dim)."""


@dataclass(frozen=True, eq=False)
class Source:
    """KV of consecutive tokens of a prompt, computed earlier, perhaps at another position and behind other tokens.

    Attributes:
        start: index in the prompt of its first token.
        ids: the tokens that the KV was computed of. They are compared with the prompt's: from the first difference on,
            the KV is not used.
        layer: answers K and V of a layer, K rotated as it was computed. Called once for each layer, in order; it may
            block until that layer is there. It must not answer late: whoever fills a source bounds its own wait.
        position: that its first token was computed at; None for `start`.
        exact: computed behind the very tokens that stand before it here. Such a span must begin the prompt, or follow
            another one that does, and is never recomputed.
        document: spans with the same number are one document; None for a document of its own.
        noise: expected squared error of an element of K and of V that its codec left, for each layer; None for exact
            bytes. Policies that look for tokens whose KV has changed do not take this for a change.
        statistics: what its tokens attended to when they were computed, for the policy `chunk_score`.
    """

    start: int
    ids: Sequence[int]
    layer: Callable[[int], KV]
    position: int | None = None
    exact: bool = False
    document: int | None = None
    noise: Sequence[tuple[float, float]] | None = None
    statistics: ChunkStatistics | None = None

    def __post_init__(self) -> None:
        if self.start < 0 or len(self.ids) == 0:
            raise SpecError(
                f"Source at token {self.start} of {len(self.ids)} tokens: start must not be negative, nor ids empty"
            )
        if self.position is not None and self.position < 0:
            raise SpecError(f"Source.position is {self.position}; it must not be negative")
        if self.exact and self.position not in (None, self.start):
            raise SpecError(
                f"Source at token {self.start} is exact but was computed at position {self.position}; "
                "exact KV stands where it was computed"
            )
        if self.statistics is not None and len(self.statistics.token_inter) != len(self.ids):
            raise SpecError(
                f"Source at token {self.start} has {len(self.ids)} tokens, its statistics "
                f"{len(self.statistics.token_inter)}; give those of the same chunk"
            )

    @property
    def stop(self) -> int:
        """Index in the prompt behind its last token."""
        return self.start + len(self.ids)

    @property
    def computed_at(self) -> int:
        """Position that its first token was computed at."""
        return self.start if self.position is None else self.position


def of_layers(layers: Sequence[KV]) -> Callable[[int], KV]:
    """The accessor of a source whose layers are all there."""
    return layers.__getitem__


def of_tokens(layers: Sequence[KV], tokens: slice) -> Callable[[int], KV]:
    """The accessor of a source of some of the tokens of layers that are all there."""

    def layer(index: int) -> KV:
        keys, values = layers[index]
        return keys[:, tokens], values[:, tokens]

    return layer


def document_numbers(pieces: Iterable[tuple[int, int, int]]) -> list[int]:
    """A number for the document of each piece of a prompt: pieces that follow one another are of the same.

    Args:
        pieces: from left to right, places start and stop in the prompt, and the position that the first of its tokens
            was computed at.
    """
    numbers, document, behind = [], 0, (0, 0)
    for start, stop, position in pieces:
        document += (start, position) != behind
        behind = stop, position + stop - start
        numbers.append(document)
    return numbers
