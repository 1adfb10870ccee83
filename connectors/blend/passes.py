"""One run of a model over some rows of a prompt, over the KV of all of its tokens, with public hooks only.

The model is called with the tokens of the rows, their positions and a cache that puts their K and V among those of the
others. A hook before every decoder layer waits for that layer's reused KV, drops the rows that do not go on, and gives
the layer the mask of its rows. What a layer costs is what its rows cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from kvstore.connectors.blend.masks import additive, visible, windows
from kvstore.connectors.blend.memory import BlendMemory
from kvstore.connectors.blend.policy import Attention
from kvstore.connectors.blend.queries import QueryTap, weights
from kvstore.connectors.blend.split import Split, split_attention

Computed = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | None]
"""(layer, rows, K, V) -> which rows go on, bool (n,), or None for all; K and V are (heads, n, dim)."""


class RowsPass:
    """Runs a model over rows of a prompt.

    Args:
        model: accepted by `hf_spec.check_model`.
        memory: the prompt's KV, read and written.
        ids: the prompt, (T,).
        positions: of its tokens in the rotary embedding, (T,).
        computed: called when K and V of a layer are computed, before they take the place of what was reused.
        attended: called with what the rows in `queries` attended to in every layer; None to save that work.
        queries: places in the prompt, bool (T,); all of them are rows.
        context: tokens of documents, bool (T,), for `split`.
        split: attend to them apart from the rest; None for the model's own attention.
        seen: what a row attends to, as `masks.visible` says.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        memory: BlendMemory,
        ids: torch.Tensor,
        positions: torch.Tensor,
        *,
        computed: Computed | None = None,
        attended: Callable[[Attention], None] | None = None,
        queries: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        split: Split | None = None,
        seen: Callable[[torch.Tensor, int, int | None], torch.Tensor] = visible,
    ) -> None:
        self._model = model
        self._memory = memory
        self._ids = ids.to(model.device)
        self._positions = positions.to(model.device)
        self._computed = computed
        self._attended = attended
        self._queries = None if queries is None else queries.to(model.device)
        self._context = context
        self._split = split
        self._seen = seen
        self._windows = windows(model)
        self._masks: dict[int | None, torch.Tensor] = {}
        self._taps: list[QueryTap] = []
        self._going_on: torch.Tensor | None = None
        self._rotary: tuple[torch.Tensor, torch.Tensor] | None = None
        self.rows = torch.empty(0, dtype=torch.long)
        self.rows_of_layers: list[torch.Tensor] = []

    def run(self, rows: torch.Tensor, *, logits_tokens: int = 0) -> torch.Tensor | None:
        """Logits of the last `logits_tokens` rows, (logits_tokens, vocabulary); with 0 None, and none are computed.

        Args:
            rows: places in the prompt, increasing, (n,).
            logits_tokens: rows whose logits are wanted; they go on to the last layer.
        """
        self.rows = rows.to(self._model.device)
        self.rows_of_layers = []
        self._masks.clear()
        called: Any = self._model if logits_tokens else self._model.base_model
        more = {"logits_to_keep": logits_tokens} if logits_tokens else {}
        cache = self._memory.cache(self)
        with self._hooked(cache):
            output = called(
                self._ids[self.rows][None],
                position_ids=self._positions[self.rows][None],
                attention_mask=self._mask(None),
                past_key_values=cache,
                use_cache=True,
                **more,
            )
        return output.logits[0] if logits_tokens else None

    def computed(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Hear of the K and V of this layer's rows; called by the cache."""
        if self._computed is not None:
            self._going_on = self._computed(layer, self.rows, keys[0], values[0])

    def placed(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Hear that they are in their places; called by the cache."""
        if self._attended is None or self._queries is None:
            return
        tap = self._taps[layer]
        assert self._rotary is not None  # the hook before the layer has set it
        asking = self._queries[self.rows]
        queries = tap.take(self._rotary)[:, asking]
        seen = self._seen(self.rows[asking], len(self._ids), self._windows[layer])
        self._attended(Attention(layer, weights(queries, keys[0], seen, tap.scaling), values[0]))

    @contextmanager
    def _hooked(self, cache: Cache) -> Iterator[None]:
        base: Any = self._model.base_model
        with ExitStack() as hooks:
            hooks.callback(self._taps.clear)
            for index, layer in enumerate(base.layers):
                before = layer.register_forward_pre_hook(self._before(index), with_kwargs=True)
                hooks.callback(before.remove)
                if self._attended is not None:
                    self._taps.append(QueryTap(layer))
                    hooks.callback(self._taps[-1].handle.remove)
            if self._split is not None and self._context is not None:  # behind the hooks that drop rows
                hooks.enter_context(split_attention(self._model, cache, self._context, self._split, lambda: self.rows))
            yield

    def _before(self, index: int) -> Callable[..., Any]:
        """A hook that gives a layer the rows that go on, their rotary embedding and their mask."""

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._memory.fill(index)
            hidden = args[0]
            if index == 0:
                self._rotary = kwargs["position_embeddings"]
            assert self._rotary is not None  # layer 0 comes first
            if self._going_on is not None and not bool(self._going_on.all()):
                kept = torch.nonzero(self._going_on)[:, 0]
                hidden = hidden[:, kept]
                self.rows = self.rows[kept]
                self._rotary = self._rotary[0][:, kept], self._rotary[1][:, kept]
                self._masks.clear()
            self._going_on = None
            self.rows_of_layers.append(self.rows)
            changed = {
                **kwargs,
                "position_embeddings": self._rotary,
                "position_ids": self._positions[self.rows][None],
                "attention_mask": self._mask(self._windows[index]),
            }
            return (hidden, *args[1:]), changed

        return hook

    def _mask(self, window: int | None) -> torch.Tensor:
        """The additive mask of the current rows, (1, 1, n, T)."""
        if window not in self._masks:
            self._masks[window] = additive(self._seen(self.rows, len(self._ids), window), self._model.dtype)
        return self._masks[window]
