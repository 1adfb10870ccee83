"""What `kvstore gate` reads: a model directory, its tokenizer, and text files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from kvstore.connectors.torch_kv import TORCH_DTYPE
from kvstore.errors import ConfigError

CHARACTERS_A_TOKEN = 16
"""Text is read up to this many characters for every token that may be used; real text has 3 to 5."""

PIECE_CHARACTERS = 1 << 16


def load_model(path: str | Path, dtype: str = "auto", device: str = "cpu") -> Any:
    """The causal language model in a directory, in eval mode on a device. Typed Any as torch types modules.

    Args:
        path: directory with config.json and weights.
        dtype: "auto" for what the checkpoint says, or float32, float16, bfloat16.
        device: as torch names it.

    Raises:
        ConfigError: names the flag and what is wrong.
    """
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(f"--model: {path} is not a directory with a transformers model (it has no config.json)")
    if dtype != "auto" and dtype not in TORCH_DTYPE:
        raise ConfigError(f"--dtype: {dtype!r} is not auto, {', '.join(TORCH_DTYPE)}")
    quiet: Any = transformers_logging
    quiet.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=TORCH_DTYPE.get(dtype, "auto"), attn_implementation="sdpa", local_files_only=True
        )
        return model.to(torch.device(device)).eval()
    except Exception as error:  # transformers and its readers raise nearly anything on damaged files
        raise ConfigError(f"--model: {path} cannot be loaded: {_line(error)}") from error


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer in a model's directory. Raises ConfigError naming the flag."""
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # as above
        raise ConfigError(
            f"--model: {path} has no tokenizer that can be loaded; put tokenizer.json there ({_line(error)})"
        ) from error


def text_ids(tokenizer: Any, files: Sequence[str | Path], tokens_max: int) -> list[int]:
    """Token ids of UTF-8 text files one after another, without special tokens.

    Reads no more than CHARACTERS_A_TOKEN characters for each of `tokens_max` tokens, the same share of every file's
    beginning if they are longer together. Raises ConfigError naming the file.
    """
    share = max(1, tokens_max * CHARACTERS_A_TOKEN // max(1, len(files)))
    ids: list[int] = []
    for path in files:
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                text = file.read(share)
        except OSError as error:
            raise ConfigError(f"--text: {path}: {error.strerror}") from error
        for start in range(0, len(text), PIECE_CHARACTERS):
            piece = text[start : start + PIECE_CHARACTERS]
            ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def start_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every prompt: its BOS token, or nothing."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
