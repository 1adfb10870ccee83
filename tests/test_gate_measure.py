"""The gate's measurements on small random models: what is exact changes nothing, what is noisy does, and how much."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

import torch

from kvstore.codecs import registry
from kvstore.connectors.gate import GateReport, run_gate
from kvstore.connectors.gate_attention import recorded_attention
from kvstore.connectors.gate_measure import Measurement
from kvstore.connectors.gate_tally import Tally
from kvstore.connectors.gate_trials import (
    CONTEXT_CHUNKS,
    Question,
    RecallPrompt,
    Trial,
    digest,
    recall_trials,
    text_trials,
)
from kvstore.connectors.model_identity import identify
from kvstore.connectors.transformers import TransformersConnector
from kvstore.errors import CodecError, ConfigError, UnsupportedModelError
from kvstore.gate import STANDARD, Metrics
from kvstore.spec import KVArrays, KVSpec
from kvstore.testing.memory_client import MemoryClient
from kvstore.testing.models import VOCABULARY, random_model
from kvstore.testing.noise import NoiseCodec

CHUNK = 16
MODELS: list[dict[str, Any]] = [
    {},
    {"family": "qwen3", "dtype": torch.bfloat16},
    {"family": "mistral", "window": 24},
    {"family": "qwen2", "window": 24},
    {"rope": "yarn"},
]


def text(tokens: int = 160, seed: int = 0) -> list[Trial]:
    ids = np.random.default_rng(1).integers(3, VOCABULARY, 3 * tokens).tolist()
    return text_trials(
        ids,
        start=[1],
        tokens_max=tokens,
        chunk_tokens=CHUNK,
        following=8,
        seed=seed,
        positions_max=2048,
        vocabulary=VOCABULARY,
    )


def prompts(count: int = 2) -> list[RecallPrompt]:
    questions = (Question((7, 8), (9,)), Question((9,), (3, 4)), Question((9, 5, 6), (3,)))
    return [RecallPrompt(tuple(range(5 + start, 40 + start)), questions) for start in range(count)]


def metrics(report: GateReport) -> list[Metrics]:
    return [own.result.metrics for own in report.levels]


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_exact_codecs_change_nothing(options: dict[str, Any]) -> None:
    model = random_model(**options)
    together = options.get("window") is None
    report = run_gate(
        model,
        [registry.get("raw"), registry.get("lossless"), NoiseCodec()],
        text=text(),
        recall=recall_trials(prompts(), together=together, vocabulary=VOCABULARY),
        chunk_tokens=CHUNK,
    )
    assert [(own.codec, own.level) for own in report.levels] == [
        ("raw", 0), ("lossless", 0), ("noise", 0), ("noise", 1),
    ]  # fmt: skip
    for own in report.levels:
        m = own.result.metrics
        silent = (own.codec, own.level) != ("noise", 0)
        errors = [m.key_error, m.value_error, m.attention_error, m.kl_nats]
        errors += [value for layer in own.layers for value in layer.values()]
        assert all((error == 0) == silent for error in errors)
        assert (m.loss_nats == m.loss_full_nats) == silent
        assert m.scored_tokens == 8 * report.text_trials
        assert m.recall_questions == 6
        assert not silent or (m.top1_agreement, m.recall) == (1.0, m.recall_full)
    assert [record.codec for record in report.records] == ["noise"]


def test_more_noise_does_more_harm_and_fails() -> None:
    model = random_model()
    codecs = [NoiseCodec(deviation=deviation) for deviation in (0.0001, 0.03, 1.0)]
    limits = msgspec.structs.replace(STANDARD, scored_tokens_min=100)
    report = run_gate(model, codecs, text=text(800), limits=limits, chunk_tokens=CHUNK)
    noisy = [own for own in report.levels if own.level == 0]
    faint, audible, loud = (own.result for own in noisy)
    assert faint.failures == ()
    assert {failure.split()[0] for failure in loud.failures} == {"KL", "top-1", "perplexity"}
    for name in ("key_error", "value_error", "attention_error", "kl_nats"):
        values = [getattr(own.metrics, name) for own in (faint, audible, loud)]
        assert values == sorted(set(values))
    for own, codec in zip(noisy, codecs, strict=True):
        assert own.result.metrics.key_error == pytest.approx(codec.deviation, rel=0.1)
        assert own.result.metrics.value_error == pytest.approx(codec.deviation, rel=0.1)
    assert report.refused == []  # level 1 passes
    assert [record.variant for record in report.records] == [codec.variant for codec in codecs]


class _Level0Codec(NoiseCodec):
    def plan(self, spec: KVSpec, tokens: int) -> Any:
        return super().plan(spec, tokens)[:1]


def test_a_codec_without_a_passing_level_is_refused() -> None:
    report = run_gate(random_model(), [_Level0Codec(deviation=1.0)], text=text(), chunk_tokens=CHUNK)
    assert report.refused == ["noise"]


def test_the_same_run_gives_the_same_report() -> None:
    def run(seed: int) -> GateReport:
        return run_gate(random_model(), [NoiseCodec()], text=text(seed=seed), chunk_tokens=CHUNK, seed=seed)

    assert run(3) == run(3)
    assert run(3).records[0].text_digest != run(4).records[0].text_digest


def test_bits_are_those_of_whole_containers() -> None:
    """Level 1 is all of a container; raw has the same values in half of its segments."""
    report = run_gate(random_model(), [registry.get("raw"), NoiseCodec()], text=text(60), chunk_tokens=CHUNK)
    raw, noisy, whole = (own.bits_per_element for own in metrics(report))
    elements = CHUNK * 2 * 2 * 2 * 16
    assert raw == (4096 + 4 * elements) * 8 / elements  # header padded to a page, then fp32
    assert noisy == raw
    assert whole == noisy + 32


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_attention_is_computed_as_the_model_would(options: dict[str, Any]) -> None:
    """In the first layer queries do not depend on the cache, so the model itself, run on decoded KV, has the answer."""
    model = random_model(**options)
    spec, fingerprint = identify(model)
    (trial, *_) = text(60)
    seen: list[torch.Tensor] = []
    project = model.base_model.layers[0].self_attn.o_proj
    hook = project.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double()))
    tally = Tally(spec.layers)
    codec = _Level0Codec(deviation=0.3)
    Measurement(model, spec, fingerprint, CHUNK).run(trial, [codec], {(0, 0): tally})
    hook.remove()
    _, full, decoded = seen  # context, what follows on full KV, what follows on decoded KV
    expected = float((full - decoded).norm() / full.norm())
    assert expected > 0
    assert tally.attention_errors[0].value == pytest.approx(expected, rel=1e-6)


def test_attention_that_cannot_be_observed_is_refused() -> None:
    model = random_model()
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModelError, match="attn_implementation='sdpa'"), recorded_attention(model):
        pass


def test_questions_asked_together_do_not_see_each_other() -> None:
    model = random_model()
    codecs = [registry.get("raw"), NoiseCodec(deviation=0.2)]
    one, other = (
        run_gate(
            model,
            codecs,
            recall=recall_trials(prompts(), together=together, vocabulary=VOCABULARY),
            chunk_tokens=CHUNK,
        )
        for together in (True, False)
    )
    assert (one.recall_trials, other.recall_trials) == (2, 6)
    for a, b in zip(metrics(one), metrics(other), strict=True):
        assert a.scored_tokens == b.scored_tokens == 8
        assert a.loss_nats == pytest.approx(b.loss_nats, abs=1e-4)
        assert a.kl_nats == pytest.approx(b.kl_nats, abs=1e-4)


def test_recall_counts_answers_that_are_right_as_a_whole() -> None:
    model = random_model()
    context = list(range(5, 40))
    with torch.no_grad():
        first = int(model(torch.tensor([[*context, 7]])).logits[0, -1].argmax())
        second = int(model(torch.tensor([[*context, 7, first]])).logits[0, -1].argmax())
    wrong = 3 if second != 3 else 4
    asked = (Question((7,), (first,)), Question((7,), (first, second)), Question((7,), (first, wrong)))
    trials = recall_trials([RecallPrompt(tuple(context), asked)], together=True, vocabulary=VOCABULARY)
    report = run_gate(model, [NoiseCodec(deviation=3.0)], text=text(60), recall=trials, chunk_tokens=CHUNK)
    noisy, exact = metrics(report)
    assert (exact.recall_questions, exact.recall_full, exact.recall) == (3, 2 / 3, 2 / 3)
    assert noisy.recall_full == 2 / 3
    assert noisy.recall < 2 / 3


def test_distributions_are_compared_as_defined() -> None:
    generator = torch.Generator().manual_seed(0)
    full, other = (torch.randn(5, 7, generator=generator) for _ in range(2))
    targets = torch.tensor([0, 6, 3, 3, 1])
    trial = Trial(torch.zeros(1, 1), torch.zeros(1, 5), torch.arange(5), targets, answers=((0, 2), (2, 5)))
    tally = Tally(1)
    tally.add_logits(trial, full, other)
    m = tally.metrics(None)
    p, q = full.double().softmax(-1), other.double().softmax(-1)
    assert m.kl_nats == pytest.approx(float((p * (p / q).log()).sum(-1).mean()))
    assert m.top1_agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    losses = [-x[torch.arange(5), targets].log() for x in (p, q)]
    assert m.loss_full_nats == pytest.approx(float(losses[0].mean()))
    assert m.loss_nats == pytest.approx(float(losses[1].mean()))
    assert m.loss_change_error_nats == pytest.approx(float((losses[1] - losses[0]).std(correction=0) / 5**0.5))
    assert m.perplexity_change_percent == pytest.approx(
        100 * float(losses[1].mean().exp() / losses[0].mean().exp() - 1)
    )


class _BrokenCodec(NoiseCodec):
    """Decodes to what is not a number."""

    def decode(self, segments: Any, arrays: KVArrays, spec: KVSpec) -> None:
        for pair in arrays:
            for array in pair:
                array[...] = 0x7FC00000


def test_what_is_not_a_number_is_recorded_and_fails() -> None:
    report = run_gate(random_model(), [_BrokenCodec()], text=text(60), chunk_tokens=CHUNK)
    for own in report.levels:
        assert own.result.metrics.kl_nats == own.result.metrics.key_error == 1e9
        assert len(own.result.failures) >= 3


def test_the_fingerprint_is_the_connector_s() -> None:
    model = random_model("qwen3")
    _, fingerprint = identify(model)
    assert TransformersConnector(model, MemoryClient()).fingerprint == fingerprint


def test_a_codec_that_cannot_serve_the_model_is_named() -> None:
    class Picky(NoiseCodec):
        def plan(self, spec: KVSpec, tokens: int) -> Any:
            raise CodecError("two layers are too few")

    with pytest.raises(CodecError, match="codec 'noise' cannot serve this model: two layers are too few"):
        run_gate(random_model(), [Picky()], text=text(60), chunk_tokens=CHUNK)
    with pytest.raises(ConfigError, match="at least one codec and one trial"):
        run_gate(random_model(), [Picky()])


@given(
    length=st.integers(0, 600),
    tokens_max=st.integers(1, 600),
    chunk=st.integers(1, 40),
    following=st.integers(1, 40),
    start=st.booleans(),
    seed=st.integers(0, 5),
    positions_max=st.integers(1, 200),
)
def test_trials_are_disjoint_pieces_of_the_text(
    length: int, tokens_max: int, chunk: int, following: int, start: bool, seed: int, positions_max: int
) -> None:
    first = [0] if start else []
    try:
        trials = text_trials(
            list(range(1, length + 1)),
            start=first,
            tokens_max=tokens_max,
            chunk_tokens=chunk,
            following=following,
            seed=seed,
            positions_max=positions_max,
            vocabulary=1000,
        )
    except ConfigError:
        assert min(length, tokens_max) < chunk + following + 1 or chunk + following > positions_max
        return
    used = [int(id) for trial in trials for id in trial.context[0, len(first) :]]
    for trial in trials:
        assert trial.context_tokens in {chunks * chunk for chunks in CONTEXT_CHUNKS}
        assert trial.context_tokens + following <= positions_max
        assert trial.context[0, : len(first)].tolist() == first
        whole = [*trial.context[0].tolist(), *trial.tokens[0].tolist(), int(trial.targets[-1])][len(first) :]
        assert whole == list(range(whole[0], whole[0] + len(whole)))
        assert trial.targets[:-1].tolist() == trial.tokens[0, 1:].tolist()
        assert len(trial.scored) == following
        used += trial.targets.tolist()
    assert len(used) == len(set(used)) <= tokens_max
    spans = [(int(trial.context[0, -1]), int(trial.targets[-1])) for trial in trials]
    assert all(a[1] < b[1] for a, b in itertools.pairwise(spans))
    assert digest(trials)[1] >= len(used)
