"""A transformers model in the shape of vLLM's models, for tests without vLLM: same weights, same calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


class NoAttention(nn.Module):
    """What vLLM's attention layer is to whoever replaces it; it cannot be called."""

    sliding_window = None

    def forward(self, *projected: torch.Tensor) -> torch.Tensor:
        """Raises: vLLM's would read blocks through the metadata of a batch."""
        raise RuntimeError("the engine's own attention was called")


class _Norm(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if residual is None:
            return self.norm(hidden)
        total = hidden + residual
        return self.norm(total), total


class _Attention(nn.Module):
    def __init__(self, attention: Any, rotary: Any) -> None:
        super().__init__()
        self.attn = NoAttention()
        self.scaling = attention.scaling
        self.attention, self.rotary = attention, rotary

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> Any:
        own = self.attention
        rows = len(hidden_states)

        def heads(projection: nn.Module, norm: nn.Module | None) -> torch.Tensor:
            split: torch.Tensor = projection(hidden_states).view(1, rows, -1, own.head_dim)
            normed: torch.Tensor = split if norm is None else norm(split)
            return normed.transpose(1, 2)

        cosine, sine = self.rotary(hidden_states[None], positions[None])
        queries, keys = apply_rotary_pos_emb(
            heads(own.q_proj, getattr(own, "q_norm", None)),
            heads(own.k_proj, getattr(own, "k_norm", None)),
            cosine,
            sine,
        )
        flat = [tensor[0].transpose(0, 1).reshape(rows, -1) for tensor in (queries, keys)]
        return own.o_proj(self.attn(*flat, own.v_proj(hidden_states)))


class _Layer(nn.Module):
    def __init__(self, layer: Any, rotary: Any) -> None:
        super().__init__()
        self.self_attn = _Attention(layer.self_attn, rotary)
        self.mlp = layer.mlp
        self.input_layernorm = _Norm(layer.input_layernorm)
        self.post_attention_layernorm = _Norm(layer.post_attention_layernorm)

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None) -> Any:
        if residual is None:
            residual, hidden = hidden, self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(positions=positions, hidden_states=hidden)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


class _Inner(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embed_tokens = model.embed_tokens
        self.layers = nn.ModuleList([_Layer(layer, model.rotary_emb) for layer in model.layers])


class VllmShaped(nn.Module):
    """A model as vLLM builds it, with the weights of a transformers model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = _Inner(model.base_model)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Something, so that a call can be heard of."""
        hidden: torch.Tensor = self.model.embed_tokens(ids)
        return hidden
