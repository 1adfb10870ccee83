"""Plans over HTTP: what a caller without a key library sends, what it must not send, and answers that are none."""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import plan_protocol
from kvstore.aio import AsyncClient
from kvstore.client import Client
from kvstore.config import ServiceConfig
from kvstore.connect import connect
from kvstore.cost_rates import CostRates, PrefillRates, TierRates
from kvstore.errors import ConfigError
from kvstore.keys import KeyScheme
from kvstore.outcome import Reason
from kvstore.plan_protocol import PlanReply, PlanRequest, SpanBody, parse_plan, plan_reply, plan_request
from kvstore.service import app as service_app
from kvstore.service.bodies import decode_body
from kvstore.service.refusal import RefusalError
from kvstore.span_plan import PlanOptions
from kvstore.spans import Document
from kvstore.testing.chunks import FINGERPRINT
from kvstore.testing.client_plan import PREAMBLE, put_document, put_prompt, sample_tokens, scheme
from kvstore.testing.memory_client import MemoryClient
from kvstore.testing.serving import ServerThread, small_store

DOCUMENT = sample_tokens(40, 1)
PROMPT = [*PREAMBLE, *DOCUMENT, 4]
BODY = {"token_ids": PROMPT, "fingerprint": FINGERPRINT.hex(), "chunk_tokens": 16, "preamble_tokens": 3}
BATCH = {"prompts": [PROMPT], "fingerprint": FINGERPRINT.hex(), "chunk_tokens": 16}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerThread]:
    config = ServiceConfig(request_keys_max=100, inflight_max=4)
    with ServerThread(small_store(tmp_path, nvme=""), config) as running:
        yield running


def ask(server: ServerThread, verb: str, body: object, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server.port, timeout=20)
    try:
        data = body if isinstance(body, bytes) else msgspec.json.encode(body)
        connection.request("POST", f"/v1/{verb}", data, headers)
        answer = connection.getresponse()
        return answer.status, msgspec.json.decode(answer.read())
    finally:
        connection.close()


def test_the_answer_is_that_of_the_client(server: ServerThread) -> None:
    with connect(server.unix_url) as client:
        pieces = put_document(client, DOCUMENT)
        status, answer = ask(server, "plan", BODY | {"documents": [{"start": 3, "stop": 43}]})
        assert status == 200
        options = PlanOptions(preamble_tokens=3, documents=[Document(3, 43)])
        plan = client.plan(PROMPT, scheme(), options)
        assert parse_plan(msgspec.convert(answer, PlanReply), len(PROMPT)) == plan
    spans = answer["spans"]
    assert [span["kind"] for span in spans] == ["recompute", "content", "content", "content", "recompute"]
    assert [span["keys"] for span in spans[1:4]] == [[piece.key.hex()] for piece in pieces]
    assert [span["position"] for span in spans[1:4]] == [3, 19, 35]
    assert spans[0] == {"kind": "recompute", "start": 0, "stop": 3, "reason": "new", "detail": spans[0]["detail"]}


def test_a_batch_is_planned_as_the_client_does(server: ServerThread) -> None:
    prompts = [[*DOCUMENT, 1], [5], [*DOCUMENT[:16], *sample_tokens(20, 2)]]
    with connect(server.http_url) as client:
        put_prompt(client, DOCUMENT[:16])
        plan = client.plan_batch(prompts, scheme(), cache_tokens=32)
    status, answer = ask(server, "plan_batch", BATCH | {"prompts": prompts, "cache_tokens": 32})
    assert status == 200
    assert answer == msgspec.json.decode(msgspec.json.encode(plan_protocol.batch_reply(plan)))
    assert (answer["order"], answer["computed_tokens"]) == ([1, 0, 2], 16 + 9 + 1 + 16 + 4)


@pytest.mark.parametrize(
    ("change", "status", "field", "message"),
    [
        ({"token_ids": []}, 400, "token_ids", "tokens is empty"),
        ({"token_ids": None}, 400, "token_ids", "Expected `array`"),
        ({"token_ids": [-1]}, 400, "token_ids[0]", ">= 0"),
        ({"token_ids": [1] * 1601}, 413, "token_ids", "at most 1600"),
        ({"fingerprint": "ab"}, 400, "fingerprint", "fingerprint has 1 bytes"),
        ({"salt": "x"}, 400, "salt", "write bytes as hexadecimal"),
        ({"chunk_tokens": 0}, 400, "chunk_tokens", ">= 1"),
        ({"preamble_tokens": -1}, 400, "preamble_tokens", ">= 0"),
        ({"preamble_tokens": 45}, 400, "preamble_tokens", "the prompt has 44 tokens"),
        ({"context_tokens": 43}, 400, "token_ids", "the model's context has 43"),
        ({"recompute_share": 1.1}, 400, "recompute_share", "<= 1"),
        ({"documents": [{"start": 5, "stop": 5}]}, 400, "documents", "documents[0] is empty"),
        ({"documents": [{"start": 1, "stop": 5}]}, 400, "documents", "before the preamble ends"),
        ({"documents": [{"start": 40, "stop": 45}]}, 400, "documents", "ends at 45"),
        ({"documents": [{"start": 5, "stop": 9}, {"start": 8, "stop": 12}]}, 400, "documents", "documents[1] starts"),
        ({"documents": [{"start": 5, "stop": 9, "token_ids": []}]}, 400, "documents", "documents[0].tokens is empty"),
        ({"documents": [{"start": 5, "stop": 9, "tokens": []}]}, 400, "tokens", "unknown field 'tokens'"),
        ({"documents": [{"start": 5}]}, 400, "documents[0]", "missing required field"),
        ({"documents": [{"start": 0, "stop": 1}] * 4097}, 400, "documents", "length <= 4096"),
        ({"rates": {"tiers": {"dram": {"request_ms": -1, "chunk_ms": 0, "byte_ms": 0}}}}, 400, None, ">= 0"),
        ({"rates": {"prefil": {}}}, 400, "prefil", "unknown field 'prefil'"),
        ({"preamble_token": 3}, 400, "preamble_token", "did you mean 'preamble_tokens'?"),
    ],
)
def test_mistakes_are_refused_by_field(
    server: ServerThread, change: dict[str, object], status: int, field: str | None, message: str
) -> None:
    got, answer = ask(server, "plan", BODY | change)
    assert got == status
    assert message in answer["error"]["message"]
    if field is not None:
        assert answer["error"].get("field") == field
    assert "\n" not in answer["error"]["message"]


def test_mistakes_in_a_batch_are_refused_by_field(server: ServerThread) -> None:
    for change, status, field in (
        ({"prompts": [[1] * 1000, [1] * 601]}, 413, "prompts"),
        ({"prompts": [[]] * 4097}, 400, "prompts"),
        ({"prompts": [[-1]]}, 400, "prompts[0][0]"),
        ({"cache_tokens": -1}, 400, "cache_tokens"),
        ({"fingerprint": "zz" * 32}, 400, "fingerprint"),
        ({"token_ids": []}, 400, "token_ids"),
    ):
        got, answer = ask(server, "plan_batch", BATCH | change)
        assert (got, answer["error"].get("field")) == (status, field), answer


def test_a_plan_needs_the_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret-of-sixteen-characters\n")
    (tmp_path / "token").chmod(0o600)
    config = ServiceConfig(token_file=str(tmp_path / "token"))
    with ServerThread(small_store(tmp_path, nvme=""), config) as server:
        for verb, body in (("plan", BODY), ("plan_batch", BATCH)):
            assert ask(server, verb, body)[0] == 401
            assert ask(server, verb, body, Authorization="Bearer secret-of-sixteen-characters")[0] == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 40) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from([*PlanRequest.__struct_fields__, "start", "stop", "other"])


def test_any_body_is_answered_or_refused(server: ServerThread) -> None:
    @settings(max_examples=150, deadline=None)
    @given(st.dictionaries(FIELDS, JSON, max_size=4))
    def fuzz(change: dict[str, object]) -> None:
        status, answer = ask(server, "plan", BODY | change)
        assert status in (200, 400, 413), answer
        if status == 200:
            tokens = msgspec.convert((BODY | change)["token_ids"], list[int])
            parse_plan(msgspec.convert(answer, PlanReply), len(tokens))

    fuzz()
    assert ask(server, "plan", BODY)[0] == 200


@settings(max_examples=300)
@given(st.binary(max_size=200), st.integers(0, 2000))
def test_damaged_bodies_are_refused_in_one_line(noise: bytes, place: int) -> None:
    good = msgspec.json.encode(BODY)
    damaged = good[: place % len(good)] + noise + good[place % len(good) + len(noise) :]
    for data in (noise, damaged):
        try:
            decode_body(data, PlanRequest).options()
        except ConfigError:
            pass
        except RefusalError as error:
            assert error.status == 400  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017


def test_what_is_sent_is_what_is_asked() -> None:
    rates = CostRates(PrefillRates(1.0, 0.5, 2.0), {"dram": TierRates(1.0, 2.0, 3e-6)})
    keys = KeyScheme(FINGERPRINT, chunk_tokens=16, salt=b"\x00t", extras={"a": b"\xff", "b": "c", "d": -1})
    options = PlanOptions(
        documents=[Document(3, 9, (7, 8)), Document(9, 12)],
        preamble_tokens=3,
        scan=False,
        any_preamble=True,
        context_tokens=99,
        recompute_share=0.25,
        rates=rates,
    )
    sent = decode_body(msgspec.json.encode(plan_request(PROMPT, keys, options)), PlanRequest)
    expected = msgspec.structs.replace(options, documents=[Document(3, 9, [7, 8]), Document(9, 12)])
    assert sent.options() == expected
    assert sent.token_ids == PROMPT


@pytest.mark.parametrize(
    "spans",
    [
        [],
        [SpanBody(kind="recompute", start=0, stop=43)],
        [SpanBody(kind="recompute", start=1, stop=44)],
        [SpanBody(kind="recompute", start=0, stop=20), SpanBody(kind="recompute", start=19, stop=44)],
        [SpanBody(kind="recompute", start=0, stop=0), SpanBody(kind="recompute", start=0, stop=44)],
        [SpanBody(kind="recompute", start=0, stop=44, keys=["ab" * 32])],
        [SpanBody(kind="content", start=0, stop=44)],
        [SpanBody(kind="content", start=0, stop=44, keys=["ab" * 32] * 2)],
        [SpanBody(kind="prefix", start=0, stop=44, keys=["ab"])],
    ],
)
def test_plans_that_are_none_are_not_believed(spans: list[SpanBody]) -> None:
    with pytest.raises(ConfigError, match=r"spans"):
        parse_plan(PlanReply(spans=spans), 44)


def test_a_daemon_that_answers_nonsense_or_has_gone_means_recompute(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    client: Client
    with connect(server.unix_url) as client:
        put_document(client, DOCUMENT)
        with monkeypatch.context() as patched:
            other = plan_reply(MemoryClient().plan([1], scheme()))
            patched.setattr("kvstore.service.plans._plan", lambda *_: other)
            plan = client.plan(PROMPT, scheme())
            assert plan.miss is not None
            assert (plan.miss.reason, plan.tokens, plan.reused_tokens) == (Reason.UNAVAILABLE, len(PROMPT), 0)
        assert client.plan(PROMPT, scheme(), PlanOptions(preamble_tokens=3)).reused_tokens == 40
        too_many = client.plan(list(range(1601)), scheme())
        assert too_many.miss is not None
        assert too_many.miss.reason is Reason.TOO_LARGE


def test_the_async_client_plans_as_the_client_does(server: ServerThread) -> None:
    async def plan(client: AsyncClient) -> None:
        async with client:
            assert (await client.plan(PROMPT, scheme(), PlanOptions(preamble_tokens=3))).reused_tokens == 40
            assert (await client.plan_batch([PROMPT, PROMPT], scheme())).order == (0, 1)

    with connect(server.unix_url) as client:
        put_document(client, DOCUMENT)
        asyncio.run(plan(AsyncClient(client)))


def test_a_daemon_that_has_gone_means_recompute(tmp_path: Path) -> None:
    with ServerThread(small_store(tmp_path, nvme="")) as server:
        client = connect(server.unix_url)
        put_document(client, DOCUMENT)
    for _ in range(2):  # once found out, once during the back-off
        plan = client.plan(PROMPT, scheme())
        assert plan.miss is not None
        assert (plan.miss.reason, plan.tokens, plan.reused_tokens) == (Reason.UNAVAILABLE, len(PROMPT), 0)
        assert client.plan_batch([PROMPT], scheme()).nodes[0].stored == 0
    client.close()


def test_the_openapi_document_describes_the_bodies() -> None:
    path = Path(service_app.__file__).parent / "static" / "openapi.yaml"
    schemas = pytest.importorskip("yaml").safe_load(path.read_text())["components"]["schemas"]
    structs: list[type[msgspec.Struct]] = [CostRates, PrefillRates, TierRates, plan_protocol.DocumentBody, SpanBody]
    structs += [PlanReply, plan_protocol.NodeBody, plan_protocol.PlanBatchReply]
    for struct in structs:
        assert set(schemas[struct.__name__]["properties"]) == set(struct.__struct_fields__), struct.__name__
