"""Records as bytes and files: what is damaged, renamed or contradicts itself counts as not there."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import gate
from kvstore.errors import ConfigError, ContainerError
from kvstore.gate import GateRecord, LevelResult, Limits, Metrics, judge
from kvstore.gate_limits import NOT_A_NUMBER
from kvstore.gate_records import SUFFIX, load_all, pack_record, parse_record, save
from kvstore.outcome import Reason
from kvstore.record_files import DIRECTORIES_VARIABLE, RECORD_BYTES_MAX, directories

PINNED = "a4462e6d35f820c291a146669f11933f3c5ed6a29007f5ec8b7169b2485bb080"
"""SHA-256 of the sample's bytes: a change of format needs another `format`."""

LIMITS = Limits(
    kl_max_nats=0.02,
    top1_agreement_min=0.94,
    perplexity_change_max_percent=1.0,
    recall_drop_max_points=1.0,
    scored_tokens_min=1024,
)
DIGEST = st.binary(min_size=32, max_size=32).map(bytes.hex)
AMOUNT = st.floats(0, NOT_A_NUMBER)
SHARE = st.floats(0, 1)
METRICS = st.builds(
    Metrics,
    bits_per_element=AMOUNT,
    key_error=AMOUNT,
    value_error=AMOUNT,
    attention_error=AMOUNT,
    scored_tokens=st.integers(0, 10**6),
    kl_nats=AMOUNT,
    top1_agreement=SHARE,
    loss_full_nats=AMOUNT,
    loss_nats=AMOUNT,
    loss_change_error_nats=AMOUNT,
    recall_questions=st.integers(0, 10**6),
    recall_full=SHARE,
    recall=SHARE,
)


@st.composite
def records(draw: st.DrawFn) -> GateRecord:
    metrics = draw(st.lists(METRICS, min_size=1, max_size=4))
    limits = draw(st.sampled_from(list(gate.PURPOSES.values())))
    return GateRecord(
        fingerprint=draw(DIGEST),
        codec=draw(st.text(min_size=1, max_size=16)),
        variant=draw(st.text(max_size=20)),
        profile=draw(DIGEST),
        chunk_tokens=draw(st.integers(1, 65536)),
        text_digest=draw(DIGEST),
        text_tokens=draw(st.integers(0, 10**9)),
        seed=draw(st.integers(0, 10**6)),
        writer="0.1.0",
        limits=limits,
        levels=tuple(LevelResult(level, own, judge(own, limits)) for level, own in enumerate(metrics)),
    )


def sample() -> GateRecord:
    metrics = msgspec.convert(
        dict.fromkeys(Metrics.__struct_fields__, 0) | {"scored_tokens": 5000, "top1_agreement": 1.0}, Metrics
    )
    return GateRecord(
        fingerprint="f" * 64,
        codec="noise",
        profile="0" * 64,
        chunk_tokens=256,
        text_digest="a" * 64,
        text_tokens=9,
        seed=0,
        writer="0.1.0",
        limits=LIMITS,
        levels=(LevelResult(0, metrics), LevelResult(1, metrics)),
    )


@given(records())
def test_records_come_back(record: GateRecord) -> None:
    data = pack_record(record)
    assert parse_record(data, record_id=hashlib.sha256(data).digest()) == record
    assert pack_record(parse_record(data)) == data


def test_the_bytes_of_a_record_are_pinned() -> None:
    assert hashlib.sha256(pack_record(sample())).hexdigest() == PINNED


@settings(max_examples=300)
@given(st.data())
def test_mutated_records_are_refused_or_whole(data: st.DataObject) -> None:
    original = bytearray(pack_record(sample()))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(original) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "insert"]))
        if kind == "set":
            original[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del original[at : at + data.draw(st.integers(1, 40))]
        else:
            original[at:at] = data.draw(st.binary(max_size=20))
        if not original:
            return
    try:
        record = parse_record(bytes(original))
    except ContainerError as error:
        reason: Reason | None = error.reason
    else:
        reason = None
    assert reason in (None, Reason.MALFORMED)
    if reason is None:
        assert all(result.failures == judge(result.metrics, record.limits) for result in record.levels)


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode) | st.just(b"[" * 100_000))
def test_rubbish_is_refused(data: bytes) -> None:
    with pytest.raises(ContainerError):
        parse_record(data)


def test_records_that_contradict_themselves_are_refused() -> None:
    good = sample()
    worse = msgspec.structs.replace(good.levels[0].metrics, kl_nats=1.0)
    lying = msgspec.structs.replace(good, levels=(LevelResult(0, worse),))
    with pytest.raises(ContainerError, match="contradicts itself at level 0"):
        parse_record(pack_record(lying))
    disordered = msgspec.structs.replace(good, levels=good.levels[::-1])
    with pytest.raises(ContainerError, match="levels are not in order"):
        parse_record(pack_record(disordered))
    for text in (b'"kl_nats":NaN', b'"kl_nats":Infinity', b'"kl_nats":1e999', b'"kl_nats":-1', b'"kl_nats":null'):
        with pytest.raises(ContainerError):
            parse_record(pack_record(good).replace(b'"kl_nats":0.0', text))


def test_a_record_larger_than_any_is_refused() -> None:
    with pytest.raises(ContainerError, match="too_large"):
        parse_record(b" " * (RECORD_BYTES_MAX + 1))


def test_records_lie_beside_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    monkeypatch.setenv("KVSTORE_PROFILES", f"{one}:{two}:")
    assert directories() == [one, two]
    assert load_all() == ()
    path = save(sample(), two)
    assert save(sample(), two) == path
    assert [own.name for own in two.iterdir()] == [f"{PINNED}{SUFFIX}"]
    assert load_all() == load_all([two]) == (sample(),)


def test_the_directories_are_those_of_profiles() -> None:
    from kvstore.codecs import profiles

    assert DIRECTORIES_VARIABLE == profiles.DIRECTORIES_VARIABLE


@pytest.mark.parametrize("damage", ["flip", "rename", "empty", "directory", "name"])
def test_bad_files_are_ignored_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    path = save(sample(), tmp_path)
    if damage == "flip":
        path.write_bytes(path.read_bytes().replace(b"5000", b"6000"))
    elif damage == "rename":
        path.rename(path.with_name("0" * 64 + SUFFIX))
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "directory":
        path.unlink()
        path.mkdir()
    else:
        path.rename(path.with_name("mine" + SUFFIX))
    with caplog.at_level(logging.WARNING):
        assert load_all([tmp_path]) == ()
    assert f"{SUFFIX} is ignored" in caplog.text


def test_a_directory_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the gate record to .*file"):
        save(sample(), tmp_path / "file")
