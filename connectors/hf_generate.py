"""The arguments of transformers' `generate`, read for what the connector has to know of them."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from transformers import Cache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from kvstore.errors import SpecError, UnsupportedModelError

Ids = npt.NDArray[np.int64]

HEADROOM_TOKENS = 256
"""Room kept behind a prompt for what follows, unless more is asked for. A cache that runs out grows by copying."""

HEADROOM_TOKENS_MAX = 4096

_REFUSED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("past_key_values", (), "the connector makes the cache"),
    ("cache_implementation", (), "the connector makes the cache"),
    ("use_cache", (True,), "the connector is a cache"),
    ("inputs_embeds", (), "chunks are named by token ids"),
    ("token_type_ids", (), "they are not part of a chunk's name"),
    ("position_ids", (), "positions follow from the attention mask"),
    ("num_beams", (1,), "beams reorder the rows of the cache"),
    ("num_return_sequences", (1,), "the cache has one row a prompt"),
    ("assistant_model", (), "assisted decoding rolls the cache back"),
    ("prompt_lookup_num_tokens", (), "assisted decoding rolls the cache back"),
    ("assistant_early_exit", (), "assisted decoding rolls the cache back"),
    ("prefill_chunk_size", (), "the connector prefills"),
    ("use_mtp", (False,), "multi-token prediction keeps a cache of its own"),
    ("token_healing", (False,), "it rewrites the prompt"),
    ("custom_generate", (), "nothing is known of what it does with the cache"),
)
"""Settings that cannot be served: name, the values that are fine besides none at all, and why others are not."""


class GenerateSettings:
    """What `generate` will go by: its keyword arguments, then the config given to it, then the model's own.

    Args:
        kwargs: the keyword arguments of `generate`.
        default: the model's generation config.
    """

    def __init__(self, kwargs: dict[str, Any], default: GenerationConfig | None) -> None:
        self._kwargs = kwargs
        self._configs = (kwargs.get("generation_config"), default)

    def get(self, name: str) -> Any:
        """A setting's value, None if nothing sets it."""
        if self._kwargs.get(name) is not None:
            return self._kwargs[name]
        return next((value for c in self._configs if (value := getattr(c, name, None)) is not None), None)

    def check(self) -> None:
        """Raise UnsupportedModelError naming the first setting that cannot be served."""
        for name, fine, why in _REFUSED:
            value = self.get(name)
            if value is not None and not (isinstance(value, int) and value in fine):
                raise UnsupportedModelError(
                    f"generate({name}=...) cannot be served: {why}; leave it out or call model.generate"
                )

    def infer_mask(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The mask transformers assumes when none is given, shaped like `input_ids`.

        Padding is where the pad token is, unless that token also ends a text.
        """
        pad = self.get("pad_token_id")
        if pad is None or int(pad) in self._end_tokens():
            return torch.ones_like(input_ids)
        return (input_ids != int(pad)).to(input_ids.dtype)

    def headroom_tokens(self, prompt_tokens: int) -> int:
        """Tokens to keep room for behind the prompt, at most HEADROOM_TOKENS_MAX."""
        new_tokens, total = self.get("max_new_tokens"), self.get("max_length")
        if new_tokens is None:
            new_tokens = HEADROOM_TOKENS if total is None else total - prompt_tokens
        return min(max(int(new_tokens), 1), HEADROOM_TOKENS_MAX)

    def worth_storing(self, sequence: Ids, prompt_tokens: int) -> Ids:
        """The tokens of a finished row whose KV is computed, without what fills the row behind its end.

        Args:
            sequence: prompt and generated tokens of one row, without padding on the left.
            prompt_tokens: how many of them are the prompt.
        """
        fill = {*self._end_tokens(), self.get("pad_token_id")}
        stop = len(sequence) - 1  # the last token was chosen, not computed
        while stop > prompt_tokens and int(sequence[stop - 1]) in fill:
            stop -= 1
        return sequence[: max(stop, prompt_tokens)]

    def _end_tokens(self) -> set[int]:
        ends = self.get("eos_token_id")
        if ends is None:
            return set()
        return {int(ends)} if isinstance(ends, int) else {int(end) for end in ends}


def one_prompt(input_ids: torch.Tensor) -> Ids:
    """The token ids of one prompt, (1, tokens). Raises SpecError."""
    rows = prompt_rows(input_ids, torch.ones_like(input_ids))
    if len(rows) != 1:
        raise SpecError(f"prefill takes one prompt, got {len(rows)}; use generate for a batch")
    return rows[0]


def prompt_rows(input_ids: torch.Tensor, mask: torch.Tensor) -> list[Ids]:
    """The token ids of each prompt without its padding.

    Args:
        input_ids: (rows, tokens).
        mask: same shape; 0 for padding, which may stand on the left only.

    Raises:
        SpecError: another shape, padding elsewhere, or an empty prompt.
    """
    if input_ids.dim() != 2 or input_ids.shape != mask.shape:
        raise SpecError(
            f"input_ids have shape {tuple(input_ids.shape)} and attention_mask {tuple(mask.shape)}; "
            "give both (rows, tokens)"
        )
    rows: list[Ids] = []
    pairs = zip(input_ids.cpu().numpy(), mask.cpu().numpy().astype(bool), strict=True)
    for row, (ids, present) in enumerate(pairs):
        count = int(present.sum())
        if count == 0:
            raise SpecError(f"prompt {row} has no tokens")
        if not present[-count:].all():
            raise SpecError(f"attention_mask of prompt {row} is not padding on the left only; set padding_side='left'")
        rows.append(ids[-count:].astype(np.int64))
    if not rows:
        raise SpecError("input_ids have no rows")
    return rows


class Generated(msgspec.Struct, frozen=True):
    """What `generate` answered, its sequences (rows, tokens), and time.perf_counter of its call and first logits."""

    output: Any
    sequences: torch.Tensor
    started: float
    first_step: float


def run_generate(
    model: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor, cache: Cache, kwargs: dict[str, Any]
) -> Generated:
    """Call `model.generate` on a cache; takes `logits_processor` out of `kwargs`."""
    first_step = FirstStep()
    processors = LogitsProcessorList([*(kwargs.pop("logits_processor", None) or ()), first_step])
    started = time.perf_counter()
    generate: Any = model.generate  # torch types a module's attributes as tensors or modules
    output = generate(input_ids, attention_mask=mask, past_key_values=cache, logits_processor=processors, **kwargs)
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    return Generated(output, sequences, started, first_step.seconds)


class FirstStep(LogitsProcessor):
    """Changes nothing; `seconds` is time.perf_counter when the first logits were there."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Note the time of the first call."""
        if not self.seconds:
            if scores.is_cuda:
                torch.cuda.synchronize(scores.device)
            self.seconds = time.perf_counter()
        return scores
