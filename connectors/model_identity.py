"""The KVSpec and the fingerprint of a transformers model: what its chunks, profiles and gate records are bound to."""

from __future__ import annotations

from transformers import PreTrainedModel

from kvstore.connectors.hf_spec import check_model, kv_spec, numeric_settings
from kvstore.connectors.weights import weights_digest
from kvstore.spec import KVSpec, fingerprint


def identify(model: PreTrainedModel) -> tuple[KVSpec, bytes]:
    """Geometry and 32-byte fingerprint of a model's KV; reads all its weights.

    Raises:
        UnsupportedModelError: the model cannot be served exactly; names what and why.
    """
    check_model(model)
    spec = kv_spec(model)
    return spec, fingerprint(spec, weights_digest(model.base_model), settings=numeric_settings(model))
