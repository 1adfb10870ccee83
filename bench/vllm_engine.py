"""A vLLM engine in a child process, for the benchmarks and for the tests with vLLM."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from kvstore.errors import KVStoreError

START_SECONDS_MAX = 600.0
RUN_SECONDS_MAX = 300.0
STOP_SECONDS_MAX = 30.0
LOG_TAIL_BYTES = 4000


class EngineError(KVStoreError):
    """The engine did not answer; carries the end of its log."""


class Outcome(msgspec.Struct):
    """What an engine made of some prompts.

    `cpu_seconds` are of all its threads, `transfer` is what connectors say of each, `counters` are since its start.
    """

    tokens: list[list[int]]
    finished: list[str]
    cached: list[int]
    seconds: float
    cpu_seconds: float
    counters: dict[str, float]
    transfer: list[dict[str, Any] | None] = []

    def counted(self, name: str) -> float:
        """The sum of vLLM's counters whose name begins like this."""
        return sum(value for key, value in self.counters.items() if key.startswith(f"vllm:{name}"))


class Engine:
    """A context manager: the engine runs inside it.

    Args:
        model: directory of the checkpoint.
        connector: `kv_connector_extra_config`; None for no connector.
        log: where the engine's output goes.
        session: how to start a `vllm_session`, behind the interpreter's name.
        environment: of the process, beside this one's.
        llm: further arguments of `vllm.LLM`.

    Raises:
        EngineError: on entering it, or from `finish`.
    """

    def __init__(
        self,
        model: Path,
        connector: dict[str, Any] | None,
        log: Path,
        *,
        session: Sequence[str | Path] = ("-m", "kvstore.bench.vllm_session"),
        environment: dict[str, str] | None = None,
        **llm: Any,
    ) -> None:
        config = json.dumps({"model": str(model), "connector": connector, "llm": llm})
        commands_read, commands_write = os.pipe()
        answers_read, answers_write = os.pipe()
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, *session, str(commands_read), str(answers_write), config],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(commands_read, answers_write),
                env={**os.environ, **(environment or {})},
            )
        os.close(commands_read)
        os.close(answers_write)
        self._commands = os.fdopen(commands_write, "w")
        self._answers = os.fdopen(answers_read, "r")

    def __enter__(self) -> Self:
        try:
            self._answer(START_SECONDS_MAX)
        except EngineError:
            self._stop()
            raise
        return self

    def start(self, prompts: list[list[int]], new_tokens: int, **options: Any) -> None:
        """Give it prompts; `finish` has the outcome."""
        print(json.dumps({"prompts": prompts, "new_tokens": new_tokens, **options}), file=self._commands, flush=True)

    def finish(self) -> Outcome:
        """The outcome of what was started."""
        return msgspec.convert(self._answer(RUN_SECONDS_MAX), Outcome)

    def run(self, prompts: list[list[int]], new_tokens: int, **options: Any) -> Outcome:
        """What it makes of some prompts."""
        self.start(prompts, new_tokens, **options)
        return self.finish()

    def idle_hooks_us(self, rounds: int) -> dict[str, float]:
        """Microseconds of each of the connector's hooks in a step with nothing to do."""
        print(json.dumps({"idle_hooks": rounds}), file=self._commands, flush=True)
        return msgspec.convert(self._answer(RUN_SECONDS_MAX), dict[str, float])

    def _answer(self, seconds: float) -> Any:
        ready, _, _ = select.select([self._answers], [], [], seconds)
        line = self._answers.readline() if ready else ""
        if not line:
            end = self.log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
            raise EngineError(f"vLLM did not answer; the end of {self.log}:\n{end}")
        return json.loads(line)

    def _stop(self) -> None:
        self._commands.close()
        self._answers.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS_MAX)
        self._process.kill()
        self._process.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
