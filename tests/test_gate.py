"""The verdict: numbers against limits, and records against models, codecs and profiles."""

from __future__ import annotations

import math
import shlex

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import gate
from kvstore.codecs import registry
from kvstore.errors import ConfigError
from kvstore.gate import GateRecord, LevelResult, Limits, Metrics, judge
from kvstore.gate_limits import NOT_A_NUMBER, number
from kvstore.testing.noise import NoiseCodec

FINGERPRINT = b"f" * 32
GOOD = Metrics(
    bits_per_element=3.0,
    key_error=0.01,
    value_error=0.01,
    attention_error=0.01,
    scored_tokens=5000,
    kl_nats=0.001,
    top1_agreement=0.99,
    loss_full_nats=2.0,
    loss_nats=2.0005,
    loss_change_error_nats=0.0001,
    recall_questions=1000,
    recall_full=0.95,
    recall=0.949,
)

BEYOND = {
    "scored_tokens": st.integers(0, gate.STANDARD.scored_tokens_min - 1),
    "kl_nats": st.floats(gate.STANDARD.kl_max_nats, NOT_A_NUMBER, exclude_min=True),
    "top1_agreement": st.floats(0, gate.STANDARD.top1_agreement_min, exclude_max=True),
    "loss_nats": st.floats(2.0101, NOT_A_NUMBER) | st.floats(0, 1.989),
    "recall": st.floats(0, 0.9399),
}
"""Values of a field that break a standard limit, all others being good."""


def record(levels: dict[int, Metrics], *, limits: Limits = gate.STANDARD, **changes: object) -> GateRecord:
    fields = {
        "fingerprint": FINGERPRINT.hex(),
        "codec": "noise",
        "profile": bytes(32).hex(),
        "chunk_tokens": 256,
        "text_digest": "0" * 64,
        "text_tokens": 9999,
        "seed": 0,
        "writer": "0.1.0",
        "limits": limits,
        "levels": tuple(LevelResult(level, own, judge(own, limits)) for level, own in levels.items()),
    }
    return GateRecord(**{**fields, **changes})  # type: ignore[arg-type]


def test_what_is_within_all_limits_passes() -> None:
    assert judge(GOOD, gate.STANDARD) == ()


@pytest.mark.parametrize("field", sorted(BEYOND))
@given(data=st.data())
def test_any_number_beyond_its_limit_fails_and_is_named(field: str, data: st.DataObject) -> None:
    worse = msgspec.structs.replace(GOOD, **{field: data.draw(BEYOND[field])})
    failures = judge(worse, gate.STANDARD)
    assert len(failures) == 1
    verdict = gate.check([record({0: worse})], FINGERPRINT, NoiseCodec(), 0)
    assert not verdict.passed
    assert failures[0] in verdict.reason


@given(
    kl=st.floats(0, 1),
    agreement=st.floats(0, 1),
    loss=st.floats(0, 10),
    recall=st.floats(0, 1),
    scored=st.integers(0, 10_000),
)
def test_purposes_are_ordered(kl: float, agreement: float, loss: float, recall: float, scored: int) -> None:
    metrics = msgspec.structs.replace(
        GOOD, kl_nats=kl, top1_agreement=agreement, loss_nats=loss, recall=recall, scored_tokens=scored
    )
    passes = [not judge(metrics, gate.PURPOSES[name]) for name in ("strict", "standard", "coarse")]
    assert passes == sorted(passes)


@pytest.mark.parametrize("field", ["kl_nats", "top1_agreement", "loss_nats", "loss_full_nats", "recall"])
def test_what_is_not_a_number_fails(field: str) -> None:
    assert judge(msgspec.structs.replace(GOOD, **{field: math.nan}), gate.PURPOSES["coarse"])
    assert number(math.nan) == number(math.inf) == NOT_A_NUMBER


def test_recall_that_was_not_measured_is_not_judged() -> None:
    assert judge(msgspec.structs.replace(GOOD, recall_questions=0, recall=0.0), gate.STANDARD) == ()


@pytest.mark.parametrize("field", Limits.__struct_fields__)
@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_limits_are_checked(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"limit {field} is"):
        msgspec.structs.replace(gate.STANDARD, **{field: value})


def test_exact_codecs_need_no_record() -> None:
    assert gate.check([], FINGERPRINT, registry.get("lossless"), 0) == gate.Verdict(True)


def test_a_record_is_of_one_model_codec_variant_profile_and_level() -> None:
    good = record({0: GOOD})
    assert gate.check([good], FINGERPRINT, NoiseCodec(), 0).passed
    others = [
        gate.check([good], b"g" * 32, NoiseCodec(), 0),
        gate.check([good], FINGERPRINT, NoiseCodec(), 1),
        gate.check([good], FINGERPRINT, NoiseCodec(deviation=0.5), 0),
        gate.check([record({0: GOOD}, profile="1" * 64)], FINGERPRINT, NoiseCodec(), 0),
        gate.check([record({0: GOOD}, codec="int8")], FINGERPRINT, NoiseCodec(), 0),
    ]
    for verdict in others:
        assert not verdict.passed
        assert "is lossy and has not been measured on model" in verdict.reason


def test_the_caller_s_limits_decide_whatever_the_record_was_judged_by() -> None:
    loose = Limits(
        kl_max_nats=100, top1_agreement_min=0, perplexity_change_max_percent=1e6, recall_drop_max_points=100,
        scored_tokens_min=0,
    )  # fmt: skip
    bad = record({0: msgspec.structs.replace(GOOD, kl_nats=5.0)}, limits=loose)
    assert bad.levels[0].failures == ()
    assert not gate.check([bad], FINGERPRINT, NoiseCodec(), 0).passed
    assert gate.check([bad], FINGERPRINT, NoiseCodec(), 0, loose).passed


def test_the_measurement_with_the_most_tokens_decides() -> None:
    bad = msgspec.structs.replace(GOOD, kl_nats=5.0)
    more = {"scored_tokens": GOOD.scored_tokens + 1}

    def passed(*found: Metrics) -> bool:
        return gate.check([record({0: own}) for own in found], FINGERPRINT, NoiseCodec(), 0).passed

    assert passed(bad, msgspec.structs.replace(GOOD, **more))
    assert not passed(msgspec.structs.replace(bad, **more), GOOD)
    assert not passed(GOOD, bad)


def test_the_command_can_be_pasted() -> None:
    codec = NoiseCodec()
    codec.profile = b"p" * 32
    words = shlex.split(gate.command(codec, "my models/llama", ["--dtype", "float32"]))
    assert words[:6] == ["kvstore", "gate", "--model", "my models/llama", "--dtype", "float32"]
    assert words[6:] == ["--codecs", "noise", "--profile", f"{codec.profile.hex()}.kvprofile", "--text", "FILE..."]
    assert "run_gate(model, [codec], text=...)" in gate.command(NoiseCodec(deviation=0.5))
