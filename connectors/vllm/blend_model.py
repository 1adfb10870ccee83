"""The model that vLLM has loaded, as something that runs single rows: its own layers, with attention of ours.

A connector is given no model. vLLM calls the model like any torch module, so a hook on module calls (torch's own, for
all modules) hears of it at the first forward pass, and is then taken away again. Until then nothing can be blended.

What runs are copies of the decoder layers: they share every weight and submodule with vLLM's but for the innermost
attention, which would read blocks through the metadata of a batch. The engine's own modules are not changed.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from kvstore.connectors.store_errors import one_line
from kvstore.errors import UnsupportedModelError


class Attends(Protocol):
    """What takes the place of vLLM's attention."""

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Attention output (n, heads * dim) of rows whose projections these are, each (n, heads * dim), rotated."""


class RowsModel:
    """A loaded model that runs rows of a prompt. One thread runs it at a time.

    Args:
        model: vLLM's, of one of `blend_refusals.ARCHITECTURES`.

    Raises:
        UnsupportedModelError: it is not built as is known of these; names what is not.
    """

    def __init__(self, model: nn.Module) -> None:
        inner: Any = getattr(model, "model", None)
        layers: Sequence[Any] = getattr(inner, "layers", ())
        if not layers or not hasattr(inner, "embed_tokens"):
            raise UnsupportedModelError(f"{type(model).__name__} has no decoder layers that blending could run")
        self._embed = inner.embed_tokens
        self.running: Attends | None = None
        self.layers = [self._with_own_attention(index, layer) for index, layer in enumerate(layers)]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states of tokens, (n, width)."""
        hidden: torch.Tensor = self._embed(ids)
        return hidden

    def _with_own_attention(self, index: int, layer: nn.Module) -> nn.Module:
        outer: Any = getattr(layer, "self_attn", None)
        inner = getattr(outer, "attn", None)
        if inner is None or not hasattr(outer, "scaling"):
            raise UnsupportedModelError(f"decoder layer {index}, a {type(layer).__name__}, has no attention to replace")
        if getattr(inner, "sliding_window", None) is not None:
            raise UnsupportedModelError(f"decoder layer {index} has a sliding window, which blending in vLLM has not")
        return _with(layer, self_attn=_with(outer, attn=_OwnAttention(self, index, outer.scaling)))


class _OwnAttention(nn.Module):
    """In the place of vLLM's attention layer: hands on what it is called with."""

    def __init__(self, model: RowsModel, index: int, scaling: float) -> None:
        super().__init__()
        self._model, self._index, self._scaling = model, index, scaling

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """What whoever runs the model makes of it."""
        running = self._model.running
        assert running is not None  # set by whoever runs it
        return running.attend(self._index, queries, keys, values, self._scaling)


def _with(module: nn.Module, **submodules: nn.Module) -> nn.Module:
    """A copy that shares everything with `module` but for these submodules."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **submodules}
    return twin


class ModelFinder:
    """Hears of the model when it is first called in this process.

    Args:
        architecture: name of its class.
        attention: an attention layer that is part of it.
    """

    def __init__(self, architecture: str, attention: nn.Module) -> None:
        self._architecture = architecture
        self._attention = attention
        self._lock = threading.Lock()
        self._model: RowsModel | None = None
        self._problem = "the model has not been called yet"
        self._hook: Any = register_module_forward_pre_hook(self._called)

    def model(self) -> RowsModel | str:
        """The model, or why there is none."""
        with self._lock:
            return self._problem if self._model is None else self._model

    def close(self) -> None:
        """Listen no longer. Idempotent."""
        with self._lock:
            hook, self._hook = self._hook, None
        if hook is not None:
            hook.remove()

    def _called(self, module: nn.Module, args: Any) -> None:
        if type(module).__name__ != self._architecture or all(part is not self._attention for part in module.modules()):
            return
        self.close()
        try:
            if not type(module).__module__.startswith("vllm.model_executor.models."):
                raise UnsupportedModelError(f"{type(module).__module__} is not one of vLLM's own implementations")
            found, problem = RowsModel(module), ""
        except Exception as error:  # the engine's forward pass goes on
            found, problem = None, one_line(error)
        with self._lock:
            self._model, self._problem = found, problem
