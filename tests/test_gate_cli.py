"""`kvstore gate` end to end on a small random model, and what it says when something is wrong."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("transformers")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from kvstore import cli, gate, gate_records, record_files
from kvstore.codecs import registry
from kvstore.connectors.gate_inputs import CHARACTERS_A_TOKEN, load_model, text_ids
from kvstore.connectors.model_identity import identify
from kvstore.connectors.transformers import TransformersConnector
from kvstore.errors import ConfigError
from kvstore.testing.memory_client import MemoryClient
from kvstore.testing.models import VOCABULARY, random_model

SMALL = "--tokens 600 --chunk-tokens 16 --following 8 --limit scored_tokens_min=8"
TASK = """
import random

def recall_prompts(seed, count):
    draw = random.Random(seed)
    while True:
        context = [draw.randrange(3, 300) for _ in range(20)]
        yield context, [([2, token], [token + 1]) for token in context[:3]]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and its tokenizer, a text, and a recall task."""
    folder = tmp_path_factory.mktemp("gate")
    words = {"<s>": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    random_model().save_pretrained(folder / "model")
    make: Any = PreTrainedTokenizerFast
    make(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder / "model")
    (folder / "text.txt").write_text(" ".join(f"w{i * i % 499 + 3}" for i in range(2000)))
    (folder / "task.py").write_text(TASK)
    return folder


@pytest.fixture(autouse=True)
def noise_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("noise", "kvstore.testing.noise:NoiseCodec", registry.GROUP)
    monkeypatch.setitem(registry._entries(), "noise", entry)
    monkeypatch.delenv(record_files.DIRECTORIES_VARIABLE, raising=False)


def run(home: Path, options: str, *, model: str = "model") -> int:
    text = f"gate --model {home / model} {options}".replace("@", f"{home}/")
    return cli.main(shlex.split(text))


def test_a_pass_is_recorded_and_lets_the_connector_in(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "report.json"
    options = f"--text @text.txt --recall @task.py --recall-prompts 4 --codecs lossless,noise {SMALL}"
    assert run(home, f"{options} --out {tmp_path / 'gates'} --json {report}") == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["lossless", "0"], ["noise", "0"], ["noise", "1"]]
    assert [line.split()[-1] for line in lines[1:4]] == ["exact", "pass", "pass"]
    assert err.splitlines()[-1].endswith("prompts")
    written = json.loads(report.read_text())
    assert [level["codec"] for level in written["levels"]] == ["lossless", "noise", "noise"]
    assert written["levels"][1]["result"]["metrics"]["recall_questions"] == 12
    assert len(written["levels"][1]["layers"]) == 2

    (record,) = gate_records.load_all([tmp_path / "gates"])
    assert lines[4] == f"noise: {next((tmp_path / 'gates').iterdir())}"
    assert record == msgspec.convert(written["records"][0], gate.GateRecord)
    monkeypatch.setenv(record_files.DIRECTORIES_VARIABLE, str(tmp_path / "gates"))
    model: Any = AutoModelForCausalLM.from_pretrained(home / "model")
    limits = msgspec.structs.replace(gate.STANDARD, scored_tokens_min=8)
    connector = TransformersConnector(model.eval(), MemoryClient(), codec="noise", limits=limits)
    assert connector.fingerprint.hex() == record.fingerprint


def test_the_same_command_gives_the_same_record(home: Path, tmp_path: Path) -> None:
    options = f"--text @text.txt --codecs noise {SMALL} --out {tmp_path}"
    assert run(home, options) == run(home, options) == 0
    assert len(list(tmp_path.iterdir())) == 1


def test_recall_alone_is_enough_and_a_failure_is_exit_code_1(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [{"context": list(range(10, 40)), "questions": [{"question": [3], "answer": [4, 5]}]}] * 3
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    options = (
        f"--recall {tmp_path / 'prompts.jsonl'} --recall-prompts 2 --codecs noise --chunk-tokens 16 --out {tmp_path}"
    )
    assert run(home, f"{options} --purpose strict") == 1
    assert "FAIL: tokens scored 4, at least 4096" in capsys.readouterr().out
    assert run(home, f"{options} --limit scored_tokens_min=4") == 0


def test_without_names_all_lossy_codecs_are_measured(home: Path, tmp_path: Path) -> None:
    run(home, f"--text @text.txt {SMALL} --out {tmp_path}")
    measured = {record.codec for record in gate_records.load_all([tmp_path])}
    assert measured == {name for name in registry.available() if not registry.get(name).exact}


GOOD = f"--text @text.txt --codecs noise --out @out {SMALL}"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ("--codecs noise --out @out", "give --text FILE... (held-out text), --recall FILE, or both"),
        (GOOD.replace("@text.txt", "@none.txt"), "--text: @none.txt: No such file or directory"),
        (
            GOOD.replace("--tokens 600", "--tokens 20"),
            "--tokens allows 20; one chunk and what follows take 24: give more",
        ),
        (GOOD.replace("--following 8", "--following 3000"), "the model was made for 2048 tokens"),
        (GOOD.replace("noise", "nosie"), "unknown codec 'nosie' (--codecs); did you mean 'noise'?"),
        (GOOD.replace("--out @out", ""), "say where records go: --out DIR, or set KVSTORE_PROFILES"),
        (f"{GOOD} --profile @text.txt", "--profile: "),
        (f"{GOOD} --profile @none", "--profile: @none: No such file or directory"),
        (f"{GOOD} --json @none/report.json", "--json: there is no directory @none"),
        (f"{GOOD} --json @model", "is a directory; name a file"),
        (GOOD.replace("@out", "@text.txt"), "is not a directory"),
        (f"{GOOD} --ratio 0.2", "--ratio is for --blend"),
        (f"{GOOD} --passages 2", "--passages is for --blend"),
        (f"{GOOD} --purpose strickt", "unknown purpose 'strickt'; did you mean 'strict'?"),
        (f"{GOOD} --limit kl_max=1", "unknown limit 'kl_max'; did you mean 'kl_max_nats'?"),
        (f"{GOOD} --limit kl_max_nats", "--limit 'kl_max_nats': write NAME=VALUE"),
        (f"{GOOD} --limit kl_max_nats=low", "--limit kl_max_nats: 'low' is not a number"),
        (f"{GOOD} --limit kl_max_nats=-1", "limit kl_max_nats is -1.0; it must be in 0.."),
        (f"{GOOD} --dtype int8", "--dtype: 'int8' is not auto, float32, float16, bfloat16"),
        (f"{GOOD} --device moon", "cannot be loaded: "),
        (f"{GOOD} --tokens 0", "--tokens is 0; give at least 1"),
        (f"{GOOD} --recall @none.py", "--recall: there is no file @none.py"),
        (f"{GOOD} --recall @text.txt", "--recall: line 1 of @text.txt is not a prompt: "),
        (f"{GOOD} --recall @bad.py", "--recall: @bad.py failed: ZeroDivisionError: division by zero"),
        (f"{GOOD} --recall @other.py", "--recall: @other.py failed: AttributeError: "),
        (f"{GOOD} --recall @huge.jsonl", "recall prompt 0 has a token id outside 0..511, the model's vocabulary"),
        (f"{GOOD} --recall @empty.jsonl", "--recall: @empty.jsonl has no prompts"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    home: Path, capsys: pytest.CaptureFixture[str], options: str, what: str
) -> None:
    (home / "bad.py").write_text("1 / 0\n")
    (home / "other.py").write_text("")
    (home / "empty.jsonl").write_text("")
    (home / "huge.jsonl").write_text('{"context": [512], "questions": [{"question": [3], "answer": [4]}]}\n')
    assert run(home, options) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("kvstore: ")
    assert what.replace("@", f"{home}/") in line
    assert out == ""
    assert not (home / "out").exists()


@pytest.mark.parametrize(
    ("missing", "what"),
    [
        ("config.json", "is not a directory with a transformers model (it has no config.json)"),
        ("model.safetensors", "cannot be loaded: "),
        ("tokenizer", "has no tokenizer that can be loaded; put tokenizer.json there"),
    ],
)
def test_an_incomplete_model_is_said_in_one_line(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str, what: str
) -> None:
    (tmp_path / "part").mkdir()
    for path in (home / "model").iterdir():
        if not path.name.startswith(missing):
            (tmp_path / "part" / path.name).write_bytes(path.read_bytes())
    options = f"--text {home / 'text.txt'} --codecs noise --out {tmp_path / 'out'} {SMALL}"
    assert run(tmp_path, options, model="part") == 2
    assert what in capsys.readouterr().err.splitlines()[-1]


def test_a_model_loaded_for_the_gate_is_the_one_that_is_served(home: Path) -> None:
    served: Any = AutoModelForCausalLM.from_pretrained(home / "model")
    assert identify(load_model(home / "model")) == identify(served.eval())


def test_text_is_read_within_bounds(tmp_path: Path) -> None:
    def letters(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    for name in ("a", "b"):
        (tmp_path / name).write_text(name * 10_000)
    assert text_ids(letters, [tmp_path / "a", tmp_path / "b"], 10) == [97] * 80 + [98] * (CHARACTERS_A_TOKEN * 10 // 2)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    assert len(text_ids(letters, [tmp_path / "bytes"], 10)) == 3
    with pytest.raises(ConfigError, match="--text: .*: Is a directory"):
        text_ids(letters, [tmp_path], 10)
