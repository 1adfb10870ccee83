"""The gate of blending: what is measured, how it is judged, what its records open, and what it refuses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

import torch

from kvstore import blend_gate, blend_records
from kvstore.blend_gate import STANDARD, BlendMetrics, check, judge, lowest_ratio, noise_of
from kvstore.cli import main
from kvstore.codecs import registry
from kvstore.connectors.blend.gate import BlendGateReport, run_blend_gate
from kvstore.connectors.blend.gate_trials import BlendTrial, passage_trials, question_trials
from kvstore.connectors.blend.passing import BlendPass, settings_of
from kvstore.connectors.blend.policies.first_k import FirstK
from kvstore.connectors.blend.policies.hkvd import HighDeviation
from kvstore.connectors.blend.policies.parallel import Parallel
from kvstore.connectors.blend.policies.recommended import Recommended
from kvstore.connectors.blend.policy import Policy
from kvstore.connectors.gate_trials import Question, RecallPrompt
from kvstore.errors import ConfigError, ContainerError
from kvstore.testing.blend_pass import BAD, GOOD, blend_record
from kvstore.testing.models import VOCABULARY, random_model, random_prompt

MODEL = bytes(range(32))
TEXT_MODEL = Path(__file__).parent / "models" / "text"
PREAMBLE = [1, 2, 3]
PINNED = "5a30b1b9520da316cbf9c6667a95b8d783bd383e2cf2410d701ec0ce83f61a72"
"""SHA-256 of a record's bytes: a change of format needs another `format`."""

FEW = msgspec.structs.replace(STANDARD, scored_tokens_min=1)


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model("llama", changes={"num_hidden_layers": 3})


def trials(count: int = 2) -> list[BlendTrial]:
    return passage_trials(
        random_prompt(count * 100, 3)[0].tolist(),
        preamble=PREAMBLE,
        tokens_max=count * 100,
        passages=3,
        passage_tokens=28,
        query_tokens=8,
        following=8,
        seed=0,
        positions_max=2048,
        vocabulary=VOCABULARY,
    )


def measure(model: Any, policy: Policy, ratios: list[float], **options: Any) -> BlendGateReport:
    return run_blend_gate(model, policy, ratios, text=trials(), limits=FEW, preamble=PREAMBLE, **options)


def passes(records: list[blend_gate.BlendRecord], ratio: float, policy: Policy | None = None, **options: Any) -> bool:
    policy = policy or Recommended()
    return check(records, MODEL, policy.name, settings_of(policy)[0], ratio, **options).passed


def test_ratio_one_passes_and_less_is_worse(model: Any) -> None:
    report = measure(model, HighDeviation(), [0.0, 0.4, 1.0])
    none, some, everything = (record.metrics for record in report.records)
    assert everything.kl_nats < 1e-6 < some.kl_nats < none.kl_nats
    assert everything.top1_agreement == 1.0
    assert none.kl_nats == pytest.approx(none.kl_concat_nats, rel=1e-3)
    assert (everything.token_share, everything.scored_tokens) == (1.0, 16)
    assert [bool(record.failures) for record in report.records] == [True, True, False]
    assert report.passed


def test_a_policy_without_a_ratio_is_measured_as_it_is(model: Any) -> None:
    (record,) = measure(model, FirstK(tokens=28), [0.1, 0.2]).records
    assert (record.policy, record.ratio, json.loads(record.settings)) == ("first_k", 0.0, {"tokens": 28})
    assert record.metrics.kl_nats < 1e-6


def test_a_lossy_codec_is_measured_with_its_noise(model: Any) -> None:
    ladder = registry.get("ladder")
    (coarse,) = measure(model, HighDeviation(), [1.0], codec=ladder, level=0).records
    (fine,) = measure(model, HighDeviation(), [1.0], codec=ladder).records
    assert (coarse.codec, coarse.level) == ("ladder", 0)
    assert len(fine.noise) == 3
    assert all(0 < f[part] < c[part] for f, c in zip(fine.noise, coarse.noise, strict=True) for part in range(2))
    passed = BlendPass([coarse], bytes.fromhex(coarse.fingerprint), HighDeviation(ratio=1.0), FEW)
    assert passed.noise(ladder, 0) == coarse.noise
    assert not passed.verdict.passed  # a record of lossy chunks says nothing of exact ones
    assert passed.of(ladder, 0).passed
    assert not passed.of(ladder, 1).passed


def test_questions_are_counted(model: Any) -> None:
    context = random_prompt(60, 4)[0].tolist()
    with torch.no_grad():
        answer = int(model(torch.tensor([[*context, 5, 6]])).logits[0, -1].argmax())
    prompt = RecallPrompt(
        tuple(context), (Question((5, 6), (answer,)), Question((7,), ((answer + 1) % 512, 3))), ((10, 30), (30, 60))
    )
    asked = question_trials([prompt], positions_max=2048, vocabulary=VOCABULARY)
    report = run_blend_gate(model, HighDeviation(), [1.0], recall=asked, limits=FEW, preamble=PREAMBLE)
    metrics = report.records[0].metrics
    assert (metrics.recall_questions, metrics.scored_tokens) == (2, 3)
    assert metrics.recall == metrics.recall_full >= 0.5


def test_what_cannot_be_measured_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="at least one ratio and one trial"):
        run_blend_gate(model, Recommended(), [0.1], preamble=[])
    with pytest.raises(ConfigError, match="attention of its own"):
        measure(model, Parallel(), [0.1])


@pytest.mark.parametrize(
    ("passages", "message"),
    [((), "no passages"), (((5, 3),), "empty, overlap"), (((0, 9), (8, 20)), "overlap"), (((0, 99),), "end behind")],
)
def test_passages_that_do_not_fit_are_refused(passages: tuple[tuple[int, int], ...], message: str) -> None:
    prompt = RecallPrompt((1,) * 30, (Question((1,), (2,)),), passages)
    with pytest.raises(ConfigError, match=message):
        question_trials([prompt], positions_max=100, vocabulary=10)


def test_other_questions_that_do_not_fit_are_refused() -> None:
    for prompt, message in (
        (RecallPrompt((1,) * 30, (Question((), (2,)),), ((0, 9),)), "empty question"),
        (RecallPrompt((1,) * 30, (Question((11,), (2,)),), ((0, 9),)), "outside 0..9"),
        (RecallPrompt((1,) * 99, (Question((1,), (2,)),), ((0, 9),)), "has 101 tokens"),
    ):
        with pytest.raises(ConfigError, match=message):
            question_trials([prompt], positions_max=100, vocabulary=10)


def test_each_limit_counts() -> None:
    assert judge(GOOD, STANDARD) == ()
    for name, value, phrase in (
        ("scored_tokens", 3, "tokens scored"),
        ("kl_nats", 0.5, "KL nats"),
        ("top1_agreement", 0.5, "top-1"),
    ):
        (failure,) = judge(msgspec.structs.replace(GOOD, **{name: value}), STANDARD)
        assert phrase in failure
    asked = {"recall_questions": 100, "recall_full": 0.98, "recall": 0.96}
    assert judge(msgspec.structs.replace(GOOD, **asked), STANDARD) == ()  # 2 points are allowed
    assert "recall drop" in judge(msgspec.structs.replace(GOOD, **{**asked, "recall": 0.95}), STANDARD)[0]
    with pytest.raises(ConfigError, match="top1_agreement_min"):
        msgspec.structs.replace(STANDARD, top1_agreement_min=2.0)


def test_a_pass_is_for_its_ratio_and_more() -> None:
    record = blend_record(MODEL, Recommended(ratio=0.15))
    assert not passes([record], 0.1)
    assert passes([record], 0.15)
    assert passes([record], 0.6)
    failed = blend_record(MODEL, Recommended(ratio=0.3), metrics=BAD)
    assert passes([record, failed], 0.2)
    assert not passes([record, failed], 0.4)  # the nearest ratio that was measured decides
    assert not passes([record, blend_record(MODEL, Recommended(ratio=0.15), metrics=BAD)], 0.15)


def test_a_pass_is_for_its_model_policy_and_settings() -> None:
    record = blend_record(MODEL, Recommended())
    assert not check([record], bytes(32), "recommended", record.settings, 0.15).passed
    assert not passes([record], 0.15, Recommended(first=3))
    assert not passes([record], 0.15, HighDeviation())
    assert not passes([record], 0.15, limits=msgspec.structs.replace(STANDARD, kl_max_nats=0.001))
    assert not passes([record], 0.15, coding=registry.get("ladder"))
    assert passes([record], 0.15, coding=registry.get("lossless"))
    assert noise_of([record], MODEL, registry.get("lossless"), 0) is None


def test_the_controller_may_go_down_to_what_has_passed_without_a_gap() -> None:
    ratios = {0.05: BAD, 0.1: GOOD, 0.15: GOOD, 0.3: GOOD}
    records = [blend_record(MODEL, Recommended(ratio=ratio), metrics=own) for ratio, own in ratios.items()]
    own = settings_of(Recommended())[0]
    assert lowest_ratio(records, MODEL, "recommended", own, 0.3, STANDARD) == 0.1
    assert lowest_ratio([], MODEL, "recommended", own, 0.3, STANDARD) == 0.3


def test_records_are_files_named_by_their_content(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = blend_record(MODEL, Recommended())
    path = blend_records.save(record, tmp_path)
    assert blend_records.load_all([tmp_path]) == (record,)
    path.write_bytes(path.read_bytes().replace(b"0.99", b"0.98"))
    assert blend_records.load_all([tmp_path]) == ()
    assert "is ignored" in caplog.text


def test_the_bytes_of_a_record_are_pinned() -> None:
    record = msgspec.structs.replace(
        blend_record(MODEL, Recommended()), settings="{}", ratio=0.15, noise=((0.5, 0.25),)
    )
    assert hashlib.sha256(blend_records.pack_record(record)).hexdigest() == PINNED


def test_a_record_that_contradicts_itself_is_none() -> None:
    record = msgspec.structs.replace(blend_record(MODEL, Recommended(), metrics=BAD), failures=())
    with pytest.raises(ContainerError, match="contradicts"):
        blend_records.parse_record(blend_records.pack_record(record))


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 2000), value=st.integers(0, 255), cut=st.integers(0, 2000))
def test_damaged_records_never_raise_anything_else(at: int, value: int, cut: int) -> None:
    data = bytearray(blend_records.pack_record(blend_record(MODEL, Recommended())))
    data[at % len(data)] = value
    for damaged in (bytes(data), bytes(data[: cut % len(data)])):
        try:
            blend_records.parse_record(damaged)
        except ContainerError:
            continue


def test_metrics_hold_no_numbers_that_are_none() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({**msgspec.structs.asdict(GOOD), "kl_nats": float(np.inf)}, BlendMetrics)


def run_cli(*flags: str) -> int:
    return main(["gate", "--blend", "--model", str(TEXT_MODEL), "--dtype", "float32", *flags])


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The gate measures what blending does to the answers of a model. " * 60)
    return str(path)


def test_the_command_writes_a_record_that_opens_blending(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--passages", "2", "--passage-tokens", "16", "--query-tokens", "8", "--following", "8", "--tokens", "100"]
    flags = ["--limit", "scored_tokens_min=1", "--ratio", "1.0", "--ratio", "0.5"]
    code = run_cli("--text", text, "--out", str(tmp_path), "--json", str(tmp_path / "r.json"), *small, *flags)
    assert code == 0
    shown = capsys.readouterr().out
    assert "recommended  exact   1 " in shown
    records = blend_records.load_all([tmp_path])
    assert {record.ratio for record in records} == {0.5, 1.0}
    assert json.loads((tmp_path / "r.json").read_text())[0]["text_trials"] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ratio", "1.5"], "--ratio"),
        (["--policy", "recomended"], "did you mean 'recommended'"),
        (["--policy-settings", "{"], "--policy-settings is not JSON"),
        (["--policy-settings", '{"ratio": 0.1}'], "--ratio"),
        (["--policy-settings", '{"frist": 1}'], "did you mean 'first'"),
        (["--passages", "0"], "--passages is 0"),
        (["--passage-tokens", "9000"], "lower --passages"),
        (["--limit", "kl_max=1"], "kl_max_nats"),
        (["--purpose", "standart"], "standard"),
        (["--preamble", "no-such-file"], "--preamble"),
    ],
)
def test_bad_flags_are_refused_by_name(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert run_cli("--text", text, "--out", str(tmp_path), *flags) != 0
    assert message in capsys.readouterr().err
