"""Attention split into documents and the rest, each with its own softmax, merged by their log-sum-exps.

APE (Yang et al., ICLR 2025, arXiv 2502.05431): documents that were computed apart get, together, more attention than in
one prompt, and spread out differently. A temperature T on their scores and a scale S on their log-sum-exp correct that:

    o_C, lse_C = attention(q; documents, scores / T)      o_O, lse_O = attention(q; other tokens)
    o = softmax([S * T * lse_C, lse_O]) . [o_C, o_O]

With T = S = 1 this is ordinary attention. It is put in the place of a layer's own with public hooks only: the queries
are heard (`QueryTap`), and a hook before the output projection hands it the merged output instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from kvstore.connectors.blend.queries import QueryTap
from kvstore.errors import ConfigError


@dataclass(frozen=True)
class Split:
    """Temperature T and scale S.

    Raises:
        ConfigError: one of them is not above 0.
    """

    temperature: float = 0.9
    scale: float = 0.9

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.scale <= 0:
            raise ConfigError(
                f"split attention: temperature is {self.temperature}, scale {self.scale}; both must be above 0"
            )


@contextmanager
def split_attention(
    model: PreTrainedModel,
    cache: Cache,
    context: torch.Tensor,
    split: Split,
    rows: Callable[[], torch.Tensor] | None = None,
) -> Iterator[None]:
    """Within it, the model attends to the tokens of `context` apart from the others.

    Args:
        model: without sliding windows; it runs one row of a batch at a time.
        cache: that it is called with.
        context: which places of the cache are documents', bool (T,); later ones are not.
        split: temperature and scale.
        rows: places in the cache of the tokens now computed; None for its last ones.
    """
    base: Any = model.base_model
    rotary: list[Any] = [None]

    def before_layer(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rotary[0] = kwargs["position_embeddings"]

    def before_projection(index: int, tap: QueryTap) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            queries = tap.take(rotary[0])
            layer: Any = cache.layers[index]
            keys, values = layer.keys[0].float(), layer.values[0].float()
            tokens, count = keys.shape[1], queries.shape[1]
            places = torch.arange(tokens - count, tokens) if rows is None else rows()
            seen = torch.arange(tokens, device=keys.device)[None] <= places.to(keys.device)[:, None]
            apart = torch.zeros(tokens, dtype=torch.bool, device=keys.device)
            apart[: len(context)] = context.to(keys.device)
            merged = merge(queries, keys, values, seen, apart, split, tap.scaling)
            return (merged.transpose(0, 1).reshape(1, count, -1).to(args[0].dtype), *args[1:])

        return hook

    with ExitStack() as hooks:
        for index, layer in enumerate(base.layers):
            tap = QueryTap(layer)
            hooks.callback(tap.handle.remove)
            hooks.callback(layer.register_forward_pre_hook(before_layer, with_kwargs=True).remove)
            projection = layer.self_attn.o_proj
            hooks.callback(projection.register_forward_pre_hook(before_projection(index, tap)).remove)
        yield


def merge(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor,
    apart: torch.Tensor,
    split: Split,
    scaling: float,
) -> torch.Tensor:
    """The merged output of attention, (heads, n, dim) fp32.

    Args:
        queries: (heads, n, dim) fp32.
        keys: (kv heads, T, dim) fp32; every KV head serves equally many query heads.
        values: likewise.
        seen: which keys each row attends to, bool (n, T); at least one each.
        apart: which tokens are documents', bool (T,).
        split: temperature and scale.
        scaling: of the scores.
    """
    grouped = queries.reshape(len(keys), -1, *queries.shape[1:])
    scores = torch.matmul(grouped, keys.transpose(1, 2)[:, None]) * scaling
    outputs, sums = [], []
    for part, temperature, factor in (
        (apart, split.temperature, split.scale * split.temperature),
        (~apart, 1.0, 1.0),
    ):
        own = (scores / temperature).masked_fill(~(seen & part), float("-inf"))
        total = own.logsumexp(-1, keepdim=True)
        probabilities = torch.where(total.isinf(), 0.0, (own - total).exp())  # a row may see nothing of a part
        outputs.append(torch.matmul(probabilities, values[:, None]))
        sums.append(torch.where(total.isinf(), total, factor * total))
    share = torch.cat(sums, dim=-1).softmax(-1)
    out = share[..., :1] * outputs[0] + share[..., 1:] * outputs[1]
    return out.flatten(0, 1)
