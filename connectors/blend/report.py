"""What a blended prefill did and what it cost."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch

from kvstore.connectors.blend.prompt import Kind, Prompt


class BlendReport(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of one prompt.

    Attributes:
        policy: name of the policy.
        prompt_tokens: T.
        exact_tokens: reused as a prefill would have computed them.
        moved_tokens: reused from behind other tokens.
        fresh_tokens: that had no KV and were computed.
        mismatched_tokens: of sources whose tokens were not those of the prompt; they are among the fresh ones.
        moved_rows: moved tokens computed in each layer, all runs together.
        extra_rows: fresh tokens computed in each layer by a run that came before the one that counts.
    """

    policy: str
    prompt_tokens: int
    exact_tokens: int
    moved_tokens: int
    fresh_tokens: int
    mismatched_tokens: int
    moved_rows: tuple[int, ...]
    extra_rows: tuple[int, ...]

    @property
    def token_share(self) -> float:
        """Mean share of the moved tokens over the layers that were not computed for all of them: what papers report.

        A layer computed for all tokens to compare is left out; 1 if every layer was.
        """
        if not self.moved_tokens:
            return 0.0
        partial = [rows for rows in self.moved_rows if rows < self.moved_tokens]
        return sum(partial) / len(partial) / self.moved_tokens if partial else 1.0

    @property
    def layer_share(self) -> float:
        """Token-layers computed beyond the fresh tokens' own, over those of all moved tokens: the honest number.

        Layers that a policy computes for all tokens only to compare, and a first run of the query, are in it.
        """
        whole = self.moved_tokens * len(self.moved_rows)
        return (sum(self.moved_rows) + sum(self.extra_rows)) / whole if whole else 0.0


def report_of(policy: str, prompt: Prompt, rows_of_layers: Sequence[torch.Tensor], extra: int) -> BlendReport:
    """What a run has done for a prompt.

    Args:
        policy: its name.
        prompt: what was known of each token.
        rows_of_layers: the tokens that the run computed, for each layer.
        extra: fresh tokens that a run before it computed in every layer.
    """
    moved = prompt.moved.to(rows_of_layers[0].device)
    return BlendReport(
        policy=policy,
        prompt_tokens=prompt.tokens,
        exact_tokens=int((prompt.kind == Kind.EXACT).sum()),
        moved_tokens=int(prompt.moved.sum()),
        fresh_tokens=int(prompt.fresh.sum()),
        mismatched_tokens=prompt.mismatched,
        moved_rows=tuple(int(moved[rows].sum()) for rows in rows_of_layers),
        extra_rows=(extra,) * prompt.layers,
    )
