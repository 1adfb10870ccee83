"""What the transformers connector refuses, and that it says what and why."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
import transformers

from kvstore.codecs import registry
from kvstore.connectors.transformers import TransformersConnector
from kvstore.errors import CodecError, ConfigError, SpecError, UnsupportedModelError
from kvstore.testing.memory_client import MemoryClient
from kvstore.testing.models import random_model, random_prompt

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def connect(model: Any, **options: Any) -> TransformersConnector:
    return TransformersConnector(model, MemoryClient(), **{"chunk_tokens": 16, "codec": "raw", **options})


def tiny(name: str, **changes: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**{**TINY, **changes})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def test_a_wrapper_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Linear is not a transformers PreTrainedModel"):
        connect(torch.nn.Linear(2, 2))


def test_code_from_elsewhere_is_refused() -> None:
    other: Any = type("Other", (transformers.LlamaForCausalLM,), {})
    with pytest.raises(UnsupportedModelError, match="Other cannot be served exactly: its code is in"):
        connect(other(transformers.LlamaConfig(**TINY)).eval())


def test_an_encoder_decoder_is_refused() -> None:
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    model: Any = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        connect(model.eval())


def test_latent_attention_is_refused() -> None:
    model = tiny(
        "DeepseekV3", kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=2,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="multi-head latent attention"):
        connect(model)


def test_a_state_space_layer_is_refused() -> None:
    config = transformers.FalconMambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=1)
    model: Any = transformers.FalconMambaForCausalLM(config)
    with pytest.raises(UnsupportedModelError, match=r"FalconMambaForCausalLM cannot be served exactly"):
        connect(model.eval())


def test_layers_that_keep_another_state_are_refused() -> None:
    model = random_model("qwen3")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UnsupportedModelError, match="layers of type linear_attention"):
        connect(model)


def test_a_family_that_was_not_tested_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"model type 'cohere' has not been tested.*llama, mistral"):
        connect(tiny("Cohere"))


@pytest.mark.parametrize(
    ("rope", "what"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope type 'dynamic': its frequencies depend on the prompt's length"),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 1024,
            },
            "rope type 'longrope'",
        ),
        ({"rope_type": "proportional"}, "rope type 'proportional' is unknown"),
        ({"rope_type": "default", "mrope_section": [2, 3, 3]}, "rope parameter 'mrope_section' is not a number"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_rope_that_is_not_known_is_refused(rope: dict[str, Any], what: str) -> None:
    with pytest.raises(UnsupportedModelError, match=what):
        connect(random_model(changes={"rope_parameters": {"rope_theta": 10000.0, **rope}}))


def test_training_mode_is_refused_now_and_later() -> None:
    model = random_model()
    connector = connect(model)
    model.train()
    with pytest.raises(UnsupportedModelError, match=r"call model.eval\(\)"):
        connector.prefill(random_prompt(20, 1))
    with pytest.raises(UnsupportedModelError, match=r"call model.eval\(\)"):
        connect(model)


def test_autocast_is_refused() -> None:
    connector = connect(random_model())
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(UnsupportedModelError, match="autocast is on"):
        connector.generate(random_prompt(20, 1), max_new_tokens=2)


def test_quantised_weights_and_adapters_are_refused() -> None:
    model = random_model()
    model.config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(UnsupportedModelError, match="quantised weights"):
        connect(model)
    model = random_model()
    model._hf_peft_config_loaded = True
    with pytest.raises(UnsupportedModelError, match="an adapter is loaded; merge it"):
        connect(model)


def test_mixed_precision_and_offloaded_weights_are_refused() -> None:
    model = random_model()
    model.model.norm.to(torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match="its weights are bfloat16, float32"):
        connect(model)
    with pytest.raises(UnsupportedModelError, match="its weights are float64"):
        connect(random_model(dtype=torch.float64))
    model = random_model()
    model.model.norm.to("meta")
    with pytest.raises(UnsupportedModelError, match="its weights are on cpu, meta"):
        connect(model)


def test_projections_that_contradict_the_configuration_are_refused() -> None:
    model = random_model()
    model.model.layers[1].self_attn.v_proj = torch.nn.Linear(64, 16, bias=False)
    with pytest.raises(UnsupportedModelError, match="layer 1 projects v_proj to 16"):
        connect(model)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cache_implementation", "static"),
        ("cache_implementation", "quantized"),
        ("past_key_values", object()),
        ("use_cache", False),
        ("num_beams", 2),
        ("num_return_sequences", 2),
        ("assistant_model", object()),
        ("prompt_lookup_num_tokens", 3),
        ("inputs_embeds", torch.zeros(1)),
        ("position_ids", torch.zeros(1)),
        ("prefill_chunk_size", 8),
        ("custom_generate", "x"),
    ],
)
def test_settings_of_generate_that_cannot_be_served_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"generate\({name}=...\) cannot be served"):
        connect(random_model()).generate(random_prompt(20, 1), **{name: value})


def test_settings_are_found_in_a_generation_config_too() -> None:
    config = transformers.GenerationConfig(num_beams=3)  # type: ignore[no-untyped-call]
    with pytest.raises(UnsupportedModelError, match="num_beams"):
        connect(random_model()).generate(random_prompt(20, 1), generation_config=config)
    model = random_model()
    model.generation_config.num_beams = 3
    with pytest.raises(UnsupportedModelError, match="num_beams"):
        connect(model).generate(random_prompt(20, 1))


@pytest.mark.parametrize(
    ("ids", "mask", "what"),
    [
        (torch.ones(1, 4), torch.tensor([[1, 1, 1, 0]]), "prompt 0 is not padding on the left only"),
        (torch.ones(2, 3), torch.tensor([[1, 1, 1], [1, 0, 1]]), "prompt 1 is not padding on the left only"),
        (torch.ones(2, 3), torch.tensor([[1, 1, 1], [0, 0, 0]]), "prompt 1 has no tokens"),
        (torch.ones(1, 0), torch.ones(1, 0), "prompt 0 has no tokens"),
        (torch.ones(0, 3), torch.ones(0, 3), "no rows"),
        (torch.ones(1, 4), torch.ones(1, 3), r"shape \(1, 4\) and attention_mask \(1, 3\)"),
        (torch.ones(4), torch.ones(4), r"give both \(rows, tokens\)"),
    ],
)
def test_prompts_that_are_none_are_refused(ids: torch.Tensor, mask: torch.Tensor, what: str) -> None:
    with pytest.raises(SpecError, match=what):
        connect(random_model()).generate(ids.long(), mask.long())


def test_prefill_takes_one_prompt() -> None:
    with pytest.raises(SpecError, match="prefill takes one prompt, got 2"):
        connect(random_model()).prefill(torch.ones(2, 3, dtype=torch.long))


def test_arguments_are_checked() -> None:
    model = random_model()
    for field in ("load_deadline_ms", "store_deadline_ms"):
        with pytest.raises(ConfigError, match=rf"{field} is 0"):
            connect(model, **{field: 0})
    with pytest.raises(SpecError, match="chunk_tokens is 0"):
        connect(model, chunk_tokens=0)
    with pytest.raises(CodecError, match="'nonsense' is not one of"):
        connect(model, codec="nonsense")


def test_a_lossy_codec_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = registry.get("raw")
    monkeypatch.setattr(type(codec), "exact", False)
    with pytest.raises(ConfigError, match="codec 'raw' level 0 is lossy"):
        connect(random_model())
