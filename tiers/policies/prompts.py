"""What kind of prompt used a chunk last: how much of it was new.

The next turn of a conversation brings a few new chunks behind many known ones, and is followed by another more often
than a prompt that brings many: a document to read, say, behind a head that all share. The last chunk of a prompt is a
kind of its own: the next turn may find it only partly filled, and then never uses it. So are the chunks that a prompt
left behind when another went a different way: an answer that was regenerated, a question that was edited.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvstore.keys import ROOT

KINDS = 7
"""At most 1, 3, 7, 15 and any number of new chunks; what was left behind; and the last chunk of whatever prompt."""
SUPERSEDED = KINDS - 2
_OF_NEW = KINDS - 2


class Prompt(msgspec.Struct, eq=False, gc=False):
    """A prompt, shared by the chunks that it used last.

    `new` counts its chunks that had not been seen before; `kind` is 0 .. KINDS - 1 by that, or SUPERSEDED.
    """

    new: int = 0
    kind: int = 0

    def add(self, new: int) -> None:
        """Count more of them."""
        self.new += new
        self.kind = min(_OF_NEW - 1, max(self.new, 1).bit_length() - 1)


LAST = Prompt(kind=KINDS - 1)
"""Stands for the prompt of a chunk that is the last of it."""


class PromptTracker:
    """Tells prompts apart by the order of uses and offers: those of one prompt follow each other along its chain."""

    def __init__(self) -> None:
        self._prompt = Prompt()
        self._above: object = None
        self._tip = b""
        self._left: Prompt | None = None
        self._expected: frozenset[bytes] = frozenset()

    def used(self, key: bytes, node: object, above: object, left: Prompt | None) -> Prompt:
        """The prompt of a use; the chunks of a prompt are used last to first. `above`: what comes before the node.

        `left`: the prompt that used the node last, if it is known to be the only one that went on behind it. It is
        superseded if this one goes on differently. A head that many share has many behind it.
        """
        if node is not self._above:
            self._prompt, self._tip = Prompt(), key
            self._left = None if left is LAST else left
        self._above = above
        return self._prompt

    def expect(self, keys: Sequence[bytes], parent: bytes, new: int) -> bytes | None:
        """These chunks will be offered, `new` of them never seen before.

        Answers the chunk that was taken for the last of a prompt and is not, None if there is none.
        """
        amended = None
        if parent == ROOT or parent != self._tip:
            self._prompt = Prompt()
        elif self._left is not None:
            self._left.kind = SUPERSEDED
        elif parent in self._expected:
            amended = parent
        self._left = None
        self._prompt.add(new)
        self._tip, self._above = keys[-1], None
        self._expected = frozenset(keys)
        return amended

    def expects(self, key: bytes) -> bool:
        """True for a chunk that has been announced."""
        return key in self._expected

    def of(self, key: bytes) -> Prompt:
        """The prompt of an announced chunk."""
        return LAST if key == self._tip else self._prompt

    @property
    def latest(self) -> Prompt:
        """The prompt of which something was used or announced last."""
        return self._prompt
