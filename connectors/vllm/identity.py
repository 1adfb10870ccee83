"""What a model's KV in vLLM is: its KVSpec, the name of its numbers, and whether it can be reused exactly.

The fingerprint covers the bytes of the checkpoint's weight files, the KVSpec, and the model's configuration but for
fields known not to change numbers. A path or a name is never part of it. How attention is computed (backend, processor,
tensor-parallel degree) is not either: it changes rounding alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from kvstore.errors import UnsupportedModelError
from kvstore.spec import KVSpec, Rope, RopeKind, fingerprint

READ_BYTES = 16 << 20
READ_THREADS = 4
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.gguf")

COSMETIC = frozenset(
    {
        "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "id2label",
        "initializer_range", "label2id", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type",
        "return_dict", "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache",
    }
)  # fmt: skip
"""Fields of a configuration that change no numbers."""

_PLAIN_ROPES: dict[str, RopeKind] = {"default": "default", "linear": "linear", "llama3": "llama3"}
_LAYER_NUMBER = re.compile(r"\.(\d+)\.")


def ordered_layers(names: Sequence[str], layers: int) -> list[str]:
    """The names of a model's attention layers, by their number.

    Raises:
        UnsupportedModelError: they are not exactly layers 0 to `layers` - 1.
    """
    by_number: dict[int, str] = {}
    for name in names:
        numbers = [int(number) for number in _LAYER_NUMBER.findall(f"{name}.")]
        if len(numbers) != 1 or numbers[0] in by_number:
            raise UnsupportedModelError(f"the attention layer {name!r} cannot be told apart from others by its number")
        by_number[numbers[0]] = name
    if sorted(by_number) != list(range(layers)):
        raise UnsupportedModelError(
            f"{len(by_number)} layers keep KV ({min(by_number)} to {max(by_number)}), and the model has {layers}: "
            "draft models, layers that share KV and layers without attention are not supported"
        )
    return [by_number[number] for number in range(layers)]


def rope_of(config: Mapping[str, Any], head_dim: int) -> Rope:
    """The rotary embedding in a model's configuration; kind "unknown" unless it is a plain one."""
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = _PLAIN_ROPES.get(str(given.pop("rope_type", given.pop("type", "default"))))
    theta = given.pop("rope_theta", config.get("rope_theta"))
    params = {name: value for name, value in given.items() if value is not None}
    partial = params.pop("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    numbers = all(isinstance(value, int | float) for value in (theta, partial, *params.values()))
    if kind is None or not numbers or config.get("position_embedding_type"):
        return Rope(kind="unknown")
    return Rope(kind=kind, theta=theta, dims=int(head_dim * partial), params=params)


def weight_files(directory: Path) -> list[Path]:
    """The files with a checkpoint's weights, of one format only, by name.

    Raises:
        UnsupportedModelError: there are none.
    """
    for pattern in WEIGHT_FILES:
        files = sorted(directory.glob(pattern))
        if files:
            return files
    raise UnsupportedModelError(
        f"no weight files ({', '.join(WEIGHT_FILES)}) in {str(directory)!r}, so the model's numbers cannot be named; "
        "load it from a directory, or set weights_identity to a text that changes whenever the weights do"
    )


def snapshot(name: str, revision: str | None, cache: str | None) -> Path:
    """Where the hub's cache has a model. Raises UnsupportedModelError if it has not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError, OSError) as error:
        raise UnsupportedModelError(
            f"the weights of {name!r} are neither in a directory nor in the hub's cache, so they cannot be named; "
            "set weights_identity to a text that changes whenever the weights do"
        ) from error


def checkpoint_digest(files: Sequence[Path]) -> bytes:
    """32-byte digest of the names and bytes of weight files. Raises OSError."""
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="kvstore-digest") as pool:
        contents = list(pool.map(_file_digest, files))
    digest = hashlib.sha256(b"kvstore-checkpoint-1\0")
    for path, content in zip(files, contents, strict=True):
        name = path.name.encode()
        digest.update(len(name).to_bytes(4, "little") + name + content)
    return digest.digest()


def stated_digest(identity: str) -> bytes:
    """32-byte digest of what the operator says the weights are."""
    return hashlib.sha256(b"kvstore-stated-weights-1\0" + identity.encode()).digest()


def model_fingerprint(spec: KVSpec, weights: bytes, config: Mapping[str, Any], quantisation: str) -> bytes:
    """32-byte name of everything that changes the numbers of a model's KV in vLLM."""
    numeric = {name: value for name, value in config.items() if name not in COSMETIC}
    settings = {"engine": "vllm", "config": msgspec.json.encode(numeric, enc_hook=str, order="sorted").decode()}
    return fingerprint(spec, weights, quantisation=quantisation, settings=settings)


def _file_digest(path: Path) -> bytes:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.digest()
