"""A checkpoint has one name for all engines that opt in, and a model that is not the checkpoint's any more has none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from transformers import AutoModelForCausalLM

from kvstore.connectors.hf_shared import identify_shared
from kvstore.connectors.transformers import TransformersConnector
from kvstore.connectors.vllm.identity import weight_files
from kvstore.connectors.vllm.naming import ModelName
from kvstore.connectors.vllm.settings import VllmSettings
from kvstore.errors import ConfigError, UnsupportedModelError
from kvstore.spec import KVSpec
from kvstore.testing.memory_client import MemoryClient
from kvstore.testing.models import FAMILIES, random_model, random_prompt


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path / "model")


def save(directory: Path, family: str = "llama", **more: Any) -> Path:
    random_model(family, **more).save_pretrained(directory)
    return directory


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


def name_in_vllm(directory: Path, spec: KVSpec, **changes: Any) -> bytes:
    """The fingerprint on vLLM's side, of a model whose configuration there is the checkpoint's with changes."""
    config = {**load(directory).config.to_dict(), "torch_dtype": "anything", **changes}
    settings = VllmSettings(url="unix:/s", share_between_engines=True)
    name = ModelName(settings, spec, weight_files(directory), config, "")
    return name.scheme_wait("").fingerprint


@pytest.mark.parametrize("family", FAMILIES)
def test_both_engines_have_one_name_for_a_checkpoint(family: str, tmp_path: Path) -> None:
    directory = save(tmp_path / "model", family)
    spec, name = identify_shared(load(directory))
    assert name_in_vllm(directory, spec) == name
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in directory.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert identify_shared(load(copy)) == (spec, name), "a path is no name"
    others = [
        identify_shared(load(directory, torch.bfloat16))[1],
        identify_shared(load(save(tmp_path / "other", family, seed=1)))[1],
        TransformersConnector(load(directory), MemoryClient()).fingerprint,
    ]
    assert name not in others


def test_connectors_that_opt_in_share_and_others_do_not(checkpoint: Path) -> None:
    client = MemoryClient()
    options: dict[str, Any] = {"chunk_tokens": 16, "load_policy": "always"}
    model, prompt = load(checkpoint), random_prompt(40, 1)
    TransformersConnector(model, client, share_between_engines=True, **options).prefill(prompt)
    for share, reused in ((True, 32), (False, 0)):
        connector = TransformersConnector(load(checkpoint), client, share_between_engines=share, **options)
        assert connector.prefill(prompt)[2].reused_tokens == reused


def trained(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] += 1.0


def cast(model: Any) -> None:
    model.to(torch.bfloat16)


def renamed(model: Any) -> None:
    model.config._name_or_path = model.name_or_path = ""


def changed(model: Any) -> None:
    model.config.rms_norm_eps = 0.5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (trained, "k_proj.weight is not what model.safetensors holds"),
        (cast, "has been cast to torch.bfloat16"),
        (renamed, "neither in a directory nor in the hub's cache"),
        (changed, "rms_norm_eps is 0.5 in the engine"),
    ],
)
def test_a_model_that_is_not_its_checkpoints_any_more_is_refused(
    checkpoint: Path, change: Callable[[Any], None], says: str
) -> None:
    model = load(checkpoint)
    change(model)
    with pytest.raises(UnsupportedModelError, match=says):
        TransformersConnector(model, MemoryClient(), share_between_engines=True)


def test_a_model_that_is_changed_later_is_refused_then(checkpoint: Path) -> None:
    model = load(checkpoint)
    connector = TransformersConnector(model, MemoryClient(), share_between_engines=True)
    trained(model)
    with pytest.raises(UnsupportedModelError, match="share_between_engines"):
        connector.prefill(random_prompt(40, 1))


def test_what_engines_may_do_in_different_ways_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    spec, _ = identify_shared(load(checkpoint))
    with pytest.raises(UnsupportedModelError, match="rotary embedding is not a plain one"):
        identify_shared(load(save(tmp_path / "yarn", rope="yarn")))
    with pytest.raises(UnsupportedModelError, match="hidden_act is 'relu' in the engine"):
        name_in_vllm(checkpoint, spec, hidden_act="relu")
    settings = VllmSettings(url="unix:/s", share_between_engines=True)
    with pytest.raises(UnsupportedModelError, match="quantised"):
        ModelName(settings, spec, weight_files(checkpoint), load(checkpoint).config.to_dict(), "awq")
    with pytest.raises(ConfigError, match="remove weights_identity"):
        VllmSettings(url="unix:/s", share_between_engines=True, weights_identity="mine")
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(UnsupportedModelError, match="cannot be read"):
        ModelName(settings, spec, weight_files(checkpoint), {}, "")


def test_the_configuration_that_is_only_in_the_file_is_part_of_the_name(checkpoint: Path) -> None:
    spec, name = identify_shared(load(checkpoint))
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "transformers_version": "0", "use_cache": False}))
    assert identify_shared(load(checkpoint))[1] == name
    (checkpoint / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    other, another = identify_shared(load(checkpoint))
    assert other == spec
    assert another != name
