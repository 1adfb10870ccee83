"""Runs a model over text and fits a codec profile to its K and V; needs torch and transformers.

Three things are learnt: moments of K and V from most of the text, error weights (for K the second moments of the
queries that meet it, at random distances behind it; for V what the output projection makes of it), and, on text that
the transforms were not fitted to, the deviations and tables of what the codec will write. Memory is bounded by the
moments and by one held back part of the text (HELD_BACK_BYTES_MAX); everything else is streamed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kvstore.codecs.cachegen_fit import Meter
from kvstore.codecs.ladder_fit import Grouping, Moments, TableCounter, fit_transforms
from kvstore.codecs.profile import pack_profile
from kvstore.codecs.rotary import Rotation, rotated_part
from kvstore.connectors.hf_spec import check_model, kv_spec
from kvstore.errors import ConfigError
from kvstore.spec import KVSpec

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Report = Callable[[int, int], None]
"""Called with tokens done and tokens in all."""

WINDOW_TOKENS = 512
SKIPPED_TOKENS = 4
"""First tokens of every sequence: the codec keeps them exactly, for they are unlike all others."""

HELD_BACK_ONE_IN = 4
HELD_BACK_BYTES_MAX = 1 << 30
QUERIES_A_WINDOW = 64


class Calibration(msgspec.Struct, frozen=True):
    """A fitted profile and what it was fitted to."""

    blob: bytes
    spec: KVSpec
    tokens: int


def calibrate(
    model: PreTrainedModel,
    windows: Sequence[torch.Tensor],
    grouping: str = "layer",
    *,
    weighted: bool = True,
    report: Report | None = None,
) -> Calibration:
    """A profile of the model from token ids, each tensor of shape (tokens,) one sequence from its start.

    Args:
        model: one that `check_model` accepts.
        windows: at least HELD_BACK_ONE_IN sequences of more than SKIPPED_TOKENS tokens.
        grouping: x0, head, layer, group:N or all.
        weighted: weight errors by what attention makes of them; else all count alike.
        report: told of progress.

    Raises:
        UnsupportedModelError: the model's KV is not known well enough.
        ConfigError: the grouping is unknown or there is too little text.
    """
    check_model(model)
    spec = kv_spec(model)
    moments = Moments(spec, Grouping.parse(grouping, spec.layers))
    usable = [window for window in windows if len(window) > SKIPPED_TOKENS]
    if len(usable) < HELD_BACK_ONE_IN:
        raise ConfigError(f"{len(usable)} windows of text; give at least {HELD_BACK_ONE_IN}")
    recorder = _Recorder(model, spec)
    held_back: list[list[Float32]] = []
    room = HELD_BACK_BYTES_MAX
    done, total = 0, sum(map(len, usable))
    try:
        for index, window in enumerate(usable):
            parts = recorder.run(window)
            nbytes = sum(part.nbytes for part in parts)
            if index % HELD_BACK_ONE_IN == 0 and (nbytes <= room or not held_back):
                held_back.append(parts)
                room -= nbytes
            else:
                moments.add(parts)
            done += len(window)
            if report:
                report(done, total)
    finally:
        recorder.close()
    counter = TableCounter(fit_transforms(moments, recorder.weights() if weighted else None))
    for parts in held_back:
        counter.measure(parts)
    for parts in held_back:
        counter.add(parts)
    attributes, arrays = counter.finish()
    arrays |= recorder.meter.arrays()
    return Calibration(pack_profile(attributes, arrays), spec, total)


def calibrate_path(
    model_path: str | Path, texts: Sequence[str | Path], grouping: str, tokens: int, report: Report | None = None
) -> Calibration:
    """`calibrate` for a model directory and UTF-8 text files, about `tokens` tokens of them.

    Raises:
        ConfigError: a path cannot be read, or there is too little text.
        UnsupportedModelError: see `calibrate`.
    """
    if not (Path(model_path) / "config.json").is_file():
        raise ConfigError(f"--model {model_path} is not a directory with a transformers model (it has no config.json)")
    tokenizer = _loaded(AutoTokenizer, model_path)
    layers = _loaded(AutoConfig, model_path).get_text_config().num_hidden_layers
    Grouping.parse(grouping, layers)
    windows = list(text_windows(tokenizer, texts, tokens))
    if len(windows) < HELD_BACK_ONE_IN:  # said before a large model is loaded
        raise ConfigError(
            f"--text gives {sum(map(len, windows))} tokens and --tokens allows {tokens}; "
            f"give at least {HELD_BACK_ONE_IN * WINDOW_TOKENS} of both"
        )
    model = _loaded(AutoModelForCausalLM, model_path)
    return calibrate(model.eval(), windows, grouping, report=report)


def _loaded(kind: Any, model_path: str | Path) -> Any:
    try:
        return kind.from_pretrained(model_path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {model_path}: {' '.join(str(error).split())[:300]}") from error


def text_windows(tokenizer: Any, texts: Sequence[str | Path], tokens: int) -> Iterator[torch.Tensor]:
    """Token ids of text files in sequences of WINDOW_TOKENS, until there are `tokens`. Raises ConfigError."""
    left = tokens
    start = [tokenizer.bos_token_id] if getattr(tokenizer, "bos_token_id", None) is not None else []
    for path in texts:
        try:
            text = Path(path).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise ConfigError(f"--text {path}: {error.strerror}") from error
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        size = WINDOW_TOKENS - len(start)
        for first in range(0, len(ids), size):
            piece = [*start, *ids[first : first + min(size, max(0, left - len(start)))]]
            if len(piece) < WINDOW_TOKENS // 8:
                break
            left -= len(piece)
            yield torch.tensor(piece)
        if left < WINDOW_TOKENS // 8:
            return


class _Recorder:
    """Runs a model and takes K, V and queries of every layer, without rotary embedding; `meter` is CacheGen's."""

    def __init__(self, model: Any, spec: KVSpec) -> None:
        self._model = model
        self._spec = spec
        self._queries: list[torch.Tensor] = [torch.empty(0)] * spec.layers
        self._second_moments = np.zeros((spec.layers, spec.kv_heads, spec.key_dim, spec.key_dim))
        self.meter = Meter(spec)
        self._random = np.random.default_rng(0)
        self._hooks = []
        self._attention = [layer.self_attn for layer in model.base_model.layers]
        for index, attention in enumerate(self._attention):
            source = getattr(attention, "q_norm", None) or attention.q_proj
            self._hooks.append(source.register_forward_hook(self._hook(index)))

    def run(self, window: torch.Tensor) -> list[Float32]:
        """K and V, each (layers, heads, tokens, dim), of all but the first tokens of a sequence."""
        with torch.inference_mode():
            out = self._model.base_model(input_ids=window[None].to(self._model.device), use_cache=True)
        layers = out.past_key_values.layers
        parts = [np.stack([_numpy(getattr(layer, name)[0]) for layer in layers]) for name in ("keys", "values")]
        self.meter.add(parts)
        if (part := rotated_part(self._spec)) is not None:
            Rotation.consecutive(self._spec.rope, 0, len(window)).undo(parts[part])
        self._weigh(len(window))
        return [np.ascontiguousarray(part[:, :, SKIPPED_TOKENS:]) for part in parts]

    def weights(self) -> list[Float64]:
        """Error weights of K and of V, (layers, heads, dim, dim)."""
        return [self._second_moments, self._output_weights()]

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, index: int) -> Callable[[Any, Any, torch.Tensor], None]:
        def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            self._queries[index] = output.detach()

        return keep

    def _weigh(self, tokens: int) -> None:
        """Add queries, turned by random distances up to their position: what an error of K meets."""
        positions = self._random.integers(SKIPPED_TOKENS, tokens, QUERIES_A_WINDOW)
        distances = (self._random.random(QUERIES_A_WINDOW) * (positions + 1)).astype(np.int64)
        rotation = None if rotated_part(self._spec) is None else Rotation(self._spec.rope, distances)
        dim, heads = self._spec.key_dim, self._spec.kv_heads
        for total, output in zip(self._second_moments, self._queries, strict=True):
            queries = _numpy(output.reshape(tokens, -1, dim)[torch.from_numpy(positions)]).transpose(1, 0, 2)
            queries = np.ascontiguousarray(queries)
            if rotation is not None:
                rotation.apply(queries)
            own = queries.reshape(heads, -1, dim)
            total += np.matmul(own.transpose(0, 2, 1), own)

    def _output_weights(self) -> Float64:
        """W^T W of the output projection, summed over the query heads that share a KV head."""
        heads, dim = self._spec.kv_heads, self._spec.value_dim
        out = []
        for attention in self._attention:
            weight = _numpy(attention.o_proj.weight).astype(np.float64)
            columns = weight.reshape(len(weight), heads, -1, dim)
            out.append(np.einsum("ohgi,ohgj->hij", columns, columns))
        return np.stack(out)


def _numpy(tensor: torch.Tensor) -> Float32:
    array: Float32 = tensor.detach().float().cpu().numpy()
    return array
