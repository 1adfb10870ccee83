"""`kvstore calibrate`: a model and text in, a profile out that the codec uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvstore import cli
from kvstore.codecs import profiles
from kvstore.codecs.cachegen import CacheGenCodec
from kvstore.codecs.floats import from_float32
from kvstore.codecs.ladder import LadderCodec
from kvstore.codecs.profile import parse_profile
from kvstore.codecs.rotary import Rotation, attention_factor, rotated_part
from kvstore.connectors import calibrate as calibration
from kvstore.connectors.calibrate import calibrate, text_windows
from kvstore.connectors.hf_spec import kv_spec
from kvstore.errors import ConfigError, UnsupportedModelError
from kvstore.spec import KVSpec, Rope
from kvstore.testing.lossy import decibels, pack, unpack
from kvstore.testing.models import FAMILIES, ROPES, random_model, random_prompt

TEXT_MODEL = Path(__file__).parent / "models" / "text"


def windows(count: int, tokens: int = 64) -> list[torch.Tensor]:
    return [random_prompt(tokens, seed)[0] for seed in range(count)]


@pytest.mark.parametrize("grouping", ["x0", "head", "layer", "all"])
def test_a_calibrated_profile_codes_the_model_it_was_made_for(grouping: str) -> None:
    model = random_model()
    found = calibrate(model, windows(24), grouping)
    profile = parse_profile(found.blob)
    profiles.add(profile)
    codec = LadderCodec(profile.id)
    with torch.inference_mode():
        cache = model(random_prompt(64, 99), use_cache=True).past_key_values
    arrays = [
        tuple(from_float32(np.ascontiguousarray(x[0].numpy()), found.spec.dtype) for x in (layer.keys, layer.values))
        for layer in cache.layers
    ]
    container = pack(codec, found.spec, arrays)  # type: ignore[arg-type]
    assert len(container) < found.spec.chunk_bytes(64)
    assert decibels(found.spec, arrays, unpack(codec, container)) > 25  # type: ignore[arg-type]
    assert CacheGenCodec(profile.id).profile == profile.id


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tested_family_can_be_calibrated_and_keeps_no_hooks(family: str) -> None:
    model = random_model(family)
    found = calibrate(model, windows(8), "head")
    assert found.tokens == 8 * 64
    assert not any(module._forward_hooks for module in model.modules())


def test_equal_input_gives_an_equal_profile() -> None:
    model = random_model()
    assert calibrate(model, windows(8)).blob == calibrate(model, windows(8)).blob


@pytest.mark.parametrize("rope", ROPES)
def test_rotation_is_the_models_own(rope: str) -> None:
    model: Any = random_model(rope=rope)
    spec = kv_spec(model)
    assert rotated_part(spec) == 0
    rotary = model.base_model.rotary_emb
    positions = torch.arange(7, 200)
    cosine, sine = rotary(torch.zeros(1, 1), positions[None])
    values = np.random.default_rng(0).normal(size=(2, len(positions), spec.key_dim)).astype(np.float32)
    turned = torch.from_numpy(values)
    half = spec.key_dim // 2
    expected = turned * cosine + torch.cat([-turned[..., half:], turned[..., :half]], dim=-1) * sine
    rotated = values.copy()
    rotation = Rotation(spec.rope, positions.numpy())
    rotation.apply(rotated)
    np.testing.assert_allclose(rotated, expected.numpy(), atol=2e-5)
    rotation.undo(rotated)
    np.testing.assert_allclose(rotated, values, atol=2e-6)


def test_a_rope_that_lacks_a_parameter_is_not_undone() -> None:
    for rope in (
        Rope(kind="unknown"),
        Rope(kind="none"),
        Rope(kind="linear", theta=1e4, dims=16),
        Rope(kind="llama3", theta=1e4, dims=16, params={"factor": 8.0}),
        Rope(kind="yarn", theta=1e4, dims=16, params={"factor": 8.0}),
        Rope(kind="default", theta=1e4, dims=15),
        Rope(kind="default", theta=1e4, dims=32),
    ):
        spec = KVSpec(layers=1, kv_heads=1, key_dim=16, value_dim=16, dtype="float32", rope=rope)
        assert rotated_part(spec) is None
    assert attention_factor(Rope(kind="yarn", theta=1e4, dims=16, params={"factor": 1.0})) == 1.0


def test_too_little_text_and_unserved_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="windows of text"):
        calibrate(random_model(), windows(2))
    with pytest.raises(UnsupportedModelError):
        calibrate(random_model().train(), windows(8))


class Tokenizer:
    bos_token_id = 1

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) % 64 + 2 for character in text]}


def test_text_is_cut_into_sequences_that_start_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "WINDOW_TOKENS", 32)
    (tmp_path / "a").write_text("x" * 100)
    (tmp_path / "b").write_text("y" * 10)
    cut = list(text_windows(Tokenizer(), [tmp_path / "a", tmp_path / "b"], 1000))
    assert [len(window) for window in cut] == [32, 32, 32, 8, 11]
    assert all(window[0] == 1 for window in cut)
    assert sum(len(window) for window in text_windows(Tokenizer(), [tmp_path / "a"], 50)) == 50
    with pytest.raises(ConfigError, match="--text"):
        list(text_windows(Tokenizer(), [tmp_path / "missing"], 10))


@pytest.mark.skipif(not (TEXT_MODEL / "model.safetensors").exists(), reason="the trained text model is not here")
def test_mistakes_are_said_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibration, "AutoModelForCausalLM", None)
    text = tmp_path / "text"
    text.write_text("too little text")
    for model, extra, message in (
        (tmp_path, [], "has no config.json"),
        (TEXT_MODEL, ["--profile", "heads"], "profile 'heads' is unknown"),
        (TEXT_MODEL, [], "give at least 2048 of both"),
    ):
        flags = ["--model", str(model), "--text", str(text), "--out", str(tmp_path / "out"), *extra]
        assert cli.main(["calibrate", *flags]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.skipif(not (TEXT_MODEL / "model.safetensors").exists(), reason="the trained text model is not here")
def test_the_command_writes_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text((Path(calibration.__file__)).read_text() * 3)
    flags = ["calibrate", "--model", str(TEXT_MODEL), "--text", str(text), "--tokens", "4096", "--profile", "head"]
    assert cli.main([*flags, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob(f"*{profiles.SUFFIX}")
    assert parse_profile(path.read_bytes()).id.hex() == path.stem
    assert path.stem in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nowhere", "--text", "x", "--out", "out"], "--model nowhere"),
        (["--model", "m", "--text", "x", "--out", "missing/out"], "--out missing/out"),
        (["--model", "m", "--text", "x", "--out", "out", "--tokens", "0"], "--tokens is 0"),
    ],
)
def test_wrong_flags_are_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["calibrate", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
