"""The first tokens of every document but one that begins the prompt (EPIC, Hu et al. 2024, arXiv 2410.15332).

What a document computed alone gets most wrong is its beginning: the first tokens took up the attention that in a whole
prompt goes to the prompt's own first tokens, and had nothing before them to attend to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvstore.connectors.blend.policies.none import Fixed
from kvstore.connectors.blend.policy import Chooser, Policy
from kvstore.connectors.blend.prompt import Prompt


@dataclass(frozen=True)
class FirstK(Policy):
    """Computes the first tokens of every document again, in all layers.

    Attributes:
        tokens: of each document; 16 to 32 in the paper.
        ratio: share of the moved tokens instead, dealt out evenly over the documents.
    """

    name: ClassVar[str] = "first_k"
    tokens: int = 16
    ratio: float | None = None

    def begin(self, prompt: Prompt) -> Chooser:
        """Fixed choices."""
        count = self.tokens
        if self.ratio is not None:
            documents = max(1, len(set(prompt.document[prompt.moved].tolist())))
            count = round(prompt.budget(self.ratio) / documents)
        return Fixed(prompt.first_of_documents(count, skip_first=True))
