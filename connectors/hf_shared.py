"""A transformers model under the name that other engines know its checkpoint by (`shared_identity`).

That name is of files. The model in memory is compared with them, weight by weight, so that one that has been trained,
merged or cast since is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from kvstore.connectors.hf_spec import check_model, kv_spec
from kvstore.connectors.shared_identity import check_shareable, shared_fingerprint
from kvstore.connectors.vllm.identity import rope_of, snapshot, weight_files
from kvstore.errors import UnsupportedModelError
from kvstore.spec import KVSpec

_ADVICE = "share_between_engines needs the model as it is in its checkpoint"


def identify_shared(model: PreTrainedModel) -> tuple[KVSpec, bytes]:
    """Geometry of a model's KV and the 32-byte fingerprint that other engines have for its checkpoint.

    Raises:
        UnsupportedModelError: the model cannot be served, or is not what its checkpoint holds; names what and why.
    """
    check_model(model)
    config = model.config.to_dict()
    spec = kv_spec(model)
    spec = msgspec.structs.replace(spec, rope=rope_of(config, spec.key_dim))
    name = model.name_or_path or ""
    directory = Path(name)
    if not name or not directory.is_dir():
        directory = snapshot(name, getattr(model.config, "_commit_hash", None), None)
    files = weight_files(directory)
    check_shareable(spec, files, config)
    _check_weights(model, files)
    return spec, shared_fingerprint(spec, files)


def _check_weights(model: PreTrainedModel, files: Sequence[Path]) -> None:
    """Raise UnsupportedModelError unless every weight that KV depends on is that of the files, in the model's type."""
    if files[0].suffix != ".safetensors":
        raise UnsupportedModelError(f"{_ADVICE}, and that in safetensors files; {files[0].name} is none")
    base: Any = model.base_model
    own = dict(base.named_parameters())
    unseen = set(own)
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                short = name.removeprefix(f"{model.base_model_prefix}.")
                if short not in own:
                    continue
                weight, stored = own[short].detach().cpu(), file.get_tensor(name)
                if weight.shape != stored.shape or not torch.equal(weight, stored.to(weight.dtype)):
                    raise UnsupportedModelError(f"{_ADVICE}; {name} is not what {path.name} holds")
                unseen.discard(short)
    if unseen:
        raise UnsupportedModelError(f"{_ADVICE}; its files have no {min(unseen)}")
    for name, buffer in base.named_buffers():
        if buffer.is_floating_point() and buffer.dtype != torch.float32:
            raise UnsupportedModelError(
                f"{_ADVICE}; {name} has been cast to {buffer.dtype}: load the model in this type instead of casting it"
            )
