"""Recall prompts from a file: data as JSON lines, or a Python file that makes them.

A line of JSON is `{"context": [ids], "questions": [{"question": [ids], "answer": [ids]}]}`, for the blend gate with
`"passages": [[start, stop], ...]`, where the context has them. A Python file defines

    def recall_prompts(seed: int, count: int) -> Iterable[tuple[context ids, [(question ids, answer ids), ...]]]

(with a third item, [(start, stop), ...], for passages) and is run like a script, with its own folder to import from:
name only files that you would run.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import msgspec

from kvstore.connectors.gate_trials import RecallPrompt
from kvstore.decoding import decode_json
from kvstore.errors import ConfigError

LINE_BYTES_MAX = 16 << 20
FUNCTION = "recall_prompts"


def load_recall(path: str | Path, *, seed: int, count: int) -> list[RecallPrompt]:
    """At most `count` prompts of a file. Raises ConfigError naming the file and what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"--recall: there is no file {path}")
    prompts = _run(path, seed, count) if path.suffix == ".py" else _read(path, count)
    if not prompts:
        raise ConfigError(f"--recall: {path} has no prompts")
    return prompts


def _read(path: Path, count: int) -> list[RecallPrompt]:
    prompts = []
    with path.open("rb") as file:
        lines = iter(lambda: file.readline(LINE_BYTES_MAX), b"")
        for line in islice(lines, count):
            try:
                prompts.append(decode_json(line, RecallPrompt))
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                raise ConfigError(f"--recall: line {len(prompts) + 1} of {path} is not a prompt: {error}") from error
    return prompts


def _run(path: Path, seed: int, count: int) -> list[RecallPrompt]:
    name = f"kvstore_recall_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # a file that ends in .py has a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
        made: Iterable[object] = getattr(module, FUNCTION)(seed, count)
        return [_prompt(item) for item in islice(made, count)]
    except Exception as error:  # it is the user's code: whatever it raises is said in one line
        raise ConfigError(f"--recall: {path} failed: {type(error).__name__}: {error}".splitlines()[0]) from error
    finally:
        sys.path.remove(str(path.parent))
        del sys.modules[name]


def _prompt(item: object) -> RecallPrompt:
    context, questions, *more = item if isinstance(item, tuple) else (None, None)
    asked = msgspec.convert(questions, list[tuple[list[int], list[int]]])
    built = [{"question": question, "answer": answer} for question, answer in asked]
    passages = more[0] if more else ()
    return msgspec.convert({"context": context, "questions": built, "passages": passages}, RecallPrompt)
