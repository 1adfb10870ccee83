"""Blended requests on real vLLM on the CPU, float32: as good as a full prefill where it says so, and never in the way.

Needs vLLM, so it runs by `make test-vllm` and is skipped elsewhere. Eight engine starts. The model is the trained
recall model: questions whose answer takes one passage to name something and another to say what it is; then one of
random weights of each architecture.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvstore import connect
from kvstore.bench.daemon import Daemon
from kvstore.bench.vllm_engine import Engine, Outcome
from tests.engines.vllm_samples import ROOT, start_engine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; see make test-vllm"),
]

MODEL = ROOT / "tests" / "models" / "recall"
CHUNK_TOKENS = 32
NEW_TOKENS = 2
SALT = "blend:test"
RATIO = 0.15
WAIT_MS = 30_000.0
# Few blocks and small steps: requests are preempted, and prompts computed in pieces.
TIGHT: dict[str, Any] = {
    "block_size": 32,
    "max_model_len": 512,
    "max_num_seqs": 6,
    "num_gpu_blocks_override": 22,
    "max_num_batched_tokens": 64,
}
ROOMY: dict[str, Any] = {"block_size": 32, "max_model_len": 512, "max_num_seqs": 6}


class Questions(msgspec.Struct):
    """Prompts of passages with a question across two of them; `documents` are the passages behind the preamble."""

    prompts: list[list[int]]
    answers: list[int]
    wishes: list[dict[str, Any]]
    documents: list[list[int]]
    to_store: dict[str, Any]

    def accuracy(self, outcome: Outcome) -> float:
        """Share of the right answers."""
        return sum(tokens[0] == answer for tokens, answer in zip(outcome.tokens, self.answers, strict=True)) / len(
            self.answers
        )


def questions(contexts: int = 6, seed: int = 5) -> Questions:
    """Every context's passages stand behind the preamble they were computed with and eight tokens they were not."""
    from tests.models.recall_task import BOS, FILLER0, N_FILLERS, make_sample

    rng = random.Random(seed)

    def fill(count: int) -> list[int]:
        return [rng.randrange(FILLER0, FILLER0 + N_FILLERS) for _ in range(count)]

    preamble = [BOS, *fill(16)]
    found = Questions([], [], [], [], {"kvstore": {"store_document": {"preamble_tokens": len(preamble)}}})
    for _ in range(contexts):
        sample = make_sample(rng, bindings=20, aliases=16, passages=4, layout="shuffled", prefix=16)
        context = [*preamble, *fill(8)]
        places = []
        for passage in sample.passages:
            found.documents.append(preamble + passage)
            places.append([len(context), len(context) + len(passage)])
            context += passage
        for at, cross in zip(sample.answer_positions, sample.cross, strict=True):
            if cross:
                found.prompts.append([*context, *sample.tokens[at - 2 : at]])
                found.answers.append(sample.tokens[at])
                found.wishes.append({"kvstore": {"blend": {"preamble_tokens": len(preamble), "documents": places}}})
    return found


@pytest.fixture(scope="module")
def asked() -> Questions:
    return questions()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "vllm.log"


@pytest.fixture(scope="module")
def full(asked: Questions, log: Path) -> Outcome:
    """What vLLM alone answers."""
    with start_engine(MODEL, None, log, **ROOMY) as engine:
        return engine.run(asked.prompts, NEW_TOKENS)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path, dram="256MiB", nvme="512MiB") as daemon:
        daemon.start().close()
        yield daemon


def settings(daemon: Daemon, policy: str, **options: float) -> dict[str, Any]:
    """With deadlines that busy cores do not miss."""
    return {
        "url": daemon.url,
        "chunk_tokens": CHUNK_TOKENS,
        "lookup_deadline_ms": WAIT_MS,
        "load_deadline_ms": WAIT_MS,
        "store_deadline_ms": WAIT_MS,
        "blend": {"policy": policy, "options": options, "ungated": True, "deadline_ms": WAIT_MS},
    }


def store_documents(engine: Engine, asked: Questions, daemon: Daemon) -> int:
    """Have the engine compute and store the documents; answers how many chunks the store has then."""
    said = engine.run(asked.documents, 1, transfer=[asked.to_store] * len(asked.documents)).transfer
    pieces = sum(answer["kvstore"]["storing"]["pieces"] for answer in said if answer is not None)
    with connect(daemon.url) as client, client.events(deadline_ms=WAIT_MS, after=0) as events:
        found = set()
        for event in events:  # a piece and its side-car each
            if event.kind == "stored" and event.tier == "dram":
                found.add(event.key)
            if len(found) == 2 * pieces:
                break
        assert client.flush(deadline_ms=WAIT_MS)
    return len(found)


def entries(daemon: Daemon) -> int:
    with connect(daemon.url) as client:
        count: int = client.stats()["tiers"]["dram"]["usage"]["entries"]
        return count


def shares(outcome: Outcome) -> list[float]:
    """The share of the reused tokens that was computed again, of every request that was blended."""
    said = [answer["kvstore"] for answer in outcome.transfer if answer is not None]
    return [answer["blended"]["token_share"] for answer in said if "blended" in answer]


def test_computing_all_again_and_every_failure_give_vllm_s_own_tokens(
    asked: Questions, full: Outcome, daemon: Daemon, log: Path
) -> None:
    with start_engine(MODEL, settings(daemon, "recommended", ratio=1.0), log, **TIGHT) as engine:
        store_documents(engine, asked, daemon)
        blended = engine.run(asked.prompts, NEW_TOKENS, transfer=asked.wishes)
        assert blended.tokens == full.tokens
        assert shares(blended) == [1.0] * len(asked.prompts)
        long = engine.run(asked.prompts, 40, transfer=asked.wishes)
        assert long.counted("num_preemptions") > 0
        assert [tokens[:NEW_TOKENS] for tokens in long.tokens] == full.tokens
        mixed = [wish if index % 2 else None for index, wish in enumerate(asked.wishes)]
        for fault in ("miss", "raise", "corrupt"):  # the last one has damaged pieces deleted
            spoilt = engine.run(asked.prompts, NEW_TOKENS, transfer=asked.wishes, fault=fault, fault_rate=0.1)
            assert spoilt.tokens == full.tokens
            refused = {a["kvstore"]["refused"] for a in spoilt.transfer if a is not None and "refused" in a["kvstore"]}
            assert refused & {"io_error", "unavailable", "corrupt"}
        assert spoilt.counted("kvstore_unblended_requests") > 0
        daemon.kill()
        alone = engine.run(asked.prompts, NEW_TOKENS, transfer=mixed)
        assert alone.tokens == full.tokens
        assert shares(alone) == []


def test_a_few_tokens_computed_again_answer_what_concatenation_does_not(
    asked: Questions, full: Outcome, daemon: Daemon, log: Path, tmp_path: Path
) -> None:
    assert asked.accuracy(full) >= 0.9
    with start_engine(MODEL, settings(daemon, "none"), log, **ROOMY, enable_prefix_caching=True) as engine:
        stored = store_documents(engine, asked, daemon)
        plain = engine.run(asked.prompts, NEW_TOKENS, transfer=asked.wishes, salt=SALT)
        assert asked.accuracy(plain) < 0.7
        check_nothing_is_polluted(engine, asked, full, daemon, stored)
    (tmp_path / "other").mkdir()
    with Daemon(tmp_path / "other", dram="256MiB") as other:
        other.start().close()
        with start_engine(MODEL, settings(other, "recommended", ratio=RATIO), log, **ROOMY) as engine:
            stored = store_documents(engine, asked, other)
            blended = engine.run(asked.prompts, NEW_TOKENS, transfer=asked.wishes)
            assert asked.accuracy(blended) >= asked.accuracy(full) - 0.02
            assert len(shares(blended)) == len(asked.prompts)
            assert max(shares(blended)) <= 0.2
            assert entries(other) == stored


def check_nothing_is_polluted(engine: Engine, asked: Questions, full: Outcome, daemon: Daemon, stored: int) -> None:
    """Blended KV, here of the worst kind, reaches no request that did not ask for it, and no store."""
    again = engine.run(asked.prompts, NEW_TOKENS, salt=SALT)
    assert sum(again.cached) > len(asked.prompts) * CHUNK_TOKENS  # vLLM has it in its cache, under this salt
    assert again.tokens != full.tokens  # it is blended indeed: a salt alone keeps it from others
    assert entries(daemon) == stored
    for other_salt in ("", "another", "blend:another"):
        assert engine.run(asked.prompts[:6], NEW_TOKENS, salt=other_salt).tokens == full.tokens[:6]
    unsalted = engine.run(asked.prompts, NEW_TOKENS, transfer=asked.wishes)
    assert unsalted.tokens == full.tokens
    assert all(answer is not None and answer["kvstore"]["refused"] == "salt" for answer in unsalted.transfer)


@pytest.mark.parametrize(
    ("family", "rope"), [("llama", "llama3"), ("mistral", "default"), ("qwen2", "linear"), ("qwen3", "default")]
)
def test_every_architecture_computes_all_again_as_vllm_does(
    family: str, rope: str, daemon: Daemon, log: Path, tmp_path: Path
) -> None:
    from kvstore.testing.models import random_model

    shape = {"hidden_size": 128, "head_dim": 32, "num_hidden_layers": 3}  # the least that vLLM has kernels for
    random_model(family, rope=rope, changes=shape).save_pretrained(tmp_path / "model")
    asked = random_documents()
    with start_engine(tmp_path / "model", settings(daemon, "recommended", ratio=1.0), log, **ROOMY) as engine:
        store_documents(engine, asked, daemon)
        blended = engine.run(asked.prompts, 20, transfer=asked.wishes)
        assert shares(blended) == [1.0] * len(asked.prompts)
        assert engine.run(asked.prompts, 20).tokens == blended.tokens


def random_documents(seed: int = 2) -> Questions:
    """Prompts of three documents of random tokens, longer and shorter than a chunk."""
    rng = random.Random(seed)

    def draw(count: int) -> list[int]:
        return [rng.randrange(3, 500) for _ in range(count)]

    preamble = draw(7)
    passages = [draw(count) for count in (75, 20, 64)]
    found = Questions([], [], [], [preamble + passage for passage in passages], {})
    found.to_store = {"kvstore": {"store_document": {"preamble_tokens": len(preamble)}}}
    for order in ((2, 0, 1), (1, 2, 0), (0, 1, 2)):
        prompt, places = preamble + draw(5), []
        for index in order:
            places.append([len(prompt), len(prompt) + len(passages[index])])
            prompt = prompt + passages[index]
        found.prompts.append(prompt + draw(11))
        found.wishes.append({"kvstore": {"blend": {"preamble_tokens": len(preamble), "documents": places}}})
    return found
