"""Nothing the transformers connector does changes what a model answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("transformers")

import torch
from transformers import PreTrainedModel

from kvstore.connectors.torch_kv import TorchKV
from kvstore.connectors.transformers import TransformersConnector
from kvstore.testing.memory_client import MemoryClient
from kvstore.testing.models import FAMILIES, ROPES, random_model, random_prompt

CHUNK = 16
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.5, torch.float16: 0.05}
WINDOW = 20
WINDOWED = ("mistral", "qwen2", "qwen3")


def connect(model: PreTrainedModel, client: MemoryClient, *, codec: str = "raw") -> TransformersConnector:
    return TransformersConnector(
        model, client, chunk_tokens=CHUNK, codec=codec, load_deadline_ms=60_000, load_policy="always"
    )


def bits(cache: Any, tokens: int) -> list[npt.NDArray[np.integer]]:
    """K and V of every layer of a cache as integers."""
    integer = {4: torch.int32, 2: torch.int16}
    return [
        tensor[:, :, :tokens].contiguous().view(integer[tensor.itemsize]).numpy()
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
    ]


def batch(*lengths: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts padded on the left, and their mask."""
    width = max(lengths)
    ids = torch.zeros((len(lengths), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = random_prompt(length, seed + row)
        mask[row, width - length :] = 1
    return ids, mask


@pytest.mark.parametrize("codec", ["raw", "lossless"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_kv_comes_back_bit_for_bit(family: str, dtype: torch.dtype, codec: str) -> None:
    model, client, prompt = random_model(family, dtype=dtype), MemoryClient(), random_prompt(3 * CHUNK + 5, 1)
    cold, cold_logits, _ = connect(model, client, codec=codec).prefill(prompt)
    warm, warm_logits, report = connect(model, client, codec=codec).prefill(prompt)
    assert report.reused_tokens == 3 * CHUNK
    for before, after in zip(bits(cold, 3 * CHUNK), bits(warm, 3 * CHUNK), strict=True):
        np.testing.assert_array_equal(before, after)
    torch.testing.assert_close(warm_logits, cold_logits, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize(("family", "window"), [*((f, None) for f in FAMILIES), *((f, WINDOW) for f in WINDOWED)])
def test_logits_are_those_without_the_store(family: str, rope: str, window: int | None) -> None:
    model, client, prompt = random_model(family, rope=rope, window=window), MemoryClient(), random_prompt(61, 2)
    with torch.no_grad():
        expected = model(prompt).logits[:, -1]
    for reused in (0, 3 * CHUNK):
        _, logits, report = connect(model, client).prefill(prompt)
        assert report.reused_tokens == reused
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_the_same_on_many_prompts(family: str) -> None:
    """Fifty prompts a family, two hundred in all, cold and warm, at every length around the chunk borders."""
    model, client = random_model(family, rope="llama3"), MemoryClient()
    connector = connect(model, client)
    seen = set()
    for number in range(50):
        prompt = random_prompt(CHUNK + number % 34, 100 + number)
        expected = model.generate(prompt, **GREEDY)
        for reused in (0, min(len(prompt[0]) // CHUNK * CHUNK, len(prompt[0]) - 1)):
            sequences, (report,) = connector.generate(prompt, **GREEDY)
            assert report.reused_tokens == reused
            assert torch.equal(sequences, expected)
        seen.add(tuple(expected[0, len(prompt[0]) :].tolist()))
    assert len(seen) == 50  # the models do not answer every prompt alike


@pytest.mark.parametrize("family", WINDOWED)
def test_windows_are_exact_while_generating(family: str) -> None:
    """Prompts longer and shorter than the window, generating across its edge; a model without the window differs."""
    model, client = random_model(family, window=WINDOW), MemoryClient()
    wide = random_model(family)
    connector = connect(model, client)
    differs = False
    for length in (WINDOW - 3, 2 * WINDOW + 9):
        prompt = random_prompt(length, length)
        expected = model.generate(prompt, max_new_tokens=12, do_sample=False)
        for _ in range(2):
            sequences, _ = connector.generate(prompt, max_new_tokens=12, do_sample=False)
            assert torch.equal(sequences, expected)
        differs |= not torch.equal(wide.generate(prompt, max_new_tokens=12, do_sample=False), expected)
    assert differs


@pytest.mark.parametrize(
    ("family", "window"), [("llama", None), ("mistral", WINDOW), ("qwen2", WINDOW), ("qwen3", None)]
)
def test_batches_of_unequal_lengths_are_exact(family: str, window: int | None) -> None:
    model, client = random_model(family, window=window), MemoryClient()
    connector = connect(model, client)
    ids, mask = batch(40, 1, 33, 64, 17)
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    for warm in (False, True):
        sequences, reports = connector.generate(ids, mask, **GREEDY)
        assert torch.equal(sequences, expected)
        assert [report.prompt_tokens for report in reports] == [40, 1, 33, 64, 17]
        assert [report.reused_tokens for report in reports] == ([32, 0, 32, 63, 16] if warm else [0] * 5)


def test_a_batch_equals_its_prompts_alone() -> None:
    model, client = random_model("llama"), MemoryClient()
    connector = connect(model, client)
    ids, mask = batch(40, 23, seed=7)
    together, _ = connector.generate(ids, mask, **GREEDY)
    for row, length in enumerate((40, 23)):
        alone, (report,) = connector.generate(ids[row : row + 1, -length:], **GREEDY)
        assert torch.equal(alone[0, -6:], together[row, -6:])
        assert report.reused_tokens == length // CHUNK * CHUNK


def test_rows_of_a_batch_share_their_beginning() -> None:
    model, client = random_model("llama"), MemoryClient()
    shared = random_prompt(2 * CHUNK, 1)
    ids = torch.cat([torch.cat([shared, random_prompt(9, seed)], dim=1) for seed in (2, 3, 4)])
    expected = model.generate(ids, **GREEDY)
    sequences, reports = connect(model, client).generate(ids, **GREEDY)
    assert torch.equal(sequences, expected)
    assert [report.reused_tokens for report in reports] == [0, 2 * CHUNK, 2 * CHUNK]


def test_a_mask_is_inferred_as_transformers_does() -> None:
    model = random_model("llama")
    ids, mask = batch(40, 23)
    expected = model.generate(ids, attention_mask=mask, pad_token_id=0, **GREEDY)
    sequences, _ = connect(model, MemoryClient()).generate(ids, pad_token_id=0, **GREEDY)
    assert torch.equal(sequences, expected)


def test_a_row_that_ends_early_is_filled_and_not_stored_beyond_its_end() -> None:
    model, client = random_model("llama"), MemoryClient()
    ids, mask = batch(40, 30)
    free = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False)
    end = int(free[0, 42])
    settings: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=mask, **settings)
    sequences, reports = connect(model, client).generate(ids, mask, **settings)
    assert torch.equal(sequences, expected)
    assert reports[0].stored_chunks == 40 // CHUNK
    assert reports[1].stored_chunks == 59 // CHUNK


def test_a_conversation_grows_on_what_was_generated() -> None:
    model, client = random_model("qwen3"), MemoryClient()
    turn, known = random_prompt(21, 1), 1
    for number in range(4):
        expected = model.generate(turn, max_new_tokens=19, do_sample=False)
        sequences, (report,) = connect(model, client).generate(turn, max_new_tokens=19, do_sample=False)
        assert torch.equal(sequences, expected)
        assert report.reused_tokens == (known - 1) // CHUNK * CHUNK
        known = sequences.shape[1]
        turn = torch.cat([sequences, random_prompt(5, 50 + number)], dim=1)


def test_the_cache_of_a_prefill_goes_on_beyond_its_room() -> None:
    model, client, prompt = random_model("llama"), MemoryClient(), random_prompt(40, 3)
    expected = model.generate(prompt, max_new_tokens=20, do_sample=False)
    for _ in range(2):
        cache, logits, _ = connect(model, client).prefill(prompt, headroom=3)
        chosen = [logits.argmax(-1, keepdim=True)]
        with torch.no_grad():
            for _ in range(19):
                chosen.append(model(chosen[-1], past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True))
        assert torch.equal(torch.cat([prompt, *chosen], dim=1), expected)


def test_sampling_with_a_seed_and_dict_output_are_the_same() -> None:
    model, client, prompt = random_model("llama"), MemoryClient(), random_prompt(40, 4)
    settings: dict[str, Any] = {
        "max_new_tokens": 8,
        "do_sample": True,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    torch.manual_seed(1)
    expected = model.generate(prompt, **settings)
    for _ in range(2):
        torch.manual_seed(1)
        output, _ = connect(model, client).generate(prompt, **settings)
        assert torch.equal(output.sequences, expected.sequences)
        torch.testing.assert_close(output.scores, expected.scores, rtol=0, atol=1e-4)


def test_inference_mode_is_served() -> None:
    with torch.inference_mode():
        model, client, prompt = random_model("llama"), MemoryClient(), random_prompt(40, 6)
        expected = model.generate(prompt, **GREEDY)
        for _ in range(2):
            sequences, _ = connect(model, client).generate(prompt, **GREEDY)
            assert torch.equal(sequences, expected)


def test_eager_attention_is_exact_too() -> None:
    model, client = random_model("mistral", window=WINDOW), MemoryClient()
    model.set_attn_implementation("eager")
    ids, mask = batch(40, 23)
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    for _ in range(2):
        sequences, _ = connect(model, client).generate(ids, mask, **GREEDY)
        assert torch.equal(sequences, expected)


def test_kv_moves_through_host_memory_when_it_must() -> None:
    """The way taken on a GPU, here between two host tensors."""
    model, client, prompt = random_model("llama", dtype=torch.bfloat16), MemoryClient(), random_prompt(40, 5)
    connector = connect(model, client)
    cache, _, _ = connector.prefill(prompt)
    direct = TorchKV.of(connector._prefixes.spec, cache)
    staged = TorchKV(direct.spec, direct.layers, staged=True)
    for pair, other in zip(direct.readable(3, 19), staged.readable(3, 19), strict=True):
        np.testing.assert_array_equal(pair[0], other[0])
        np.testing.assert_array_equal(pair[1], other[1])
    target = TorchKV.allocate(direct.spec, 1, 40, torch.device("cpu"))
    target.staged = True
    for mine, theirs in zip(target.writable(3, 19), direct.readable(3, 19), strict=True):
        mine[0][...] = theirs[0]
        mine[1][...] = theirs[1]
    target.commit(3, 19)
    for (keys, values), (other_keys, other_values) in zip(target.layers, direct.layers, strict=True):
        assert torch.equal(keys[:, :, 3:19], other_keys[:, :, 3:19])
        assert torch.equal(values[:, :, 3:19], other_values[:, :, 3:19])
