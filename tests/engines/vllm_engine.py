"""What the engine tests share: an engine in a child process, a checkpoint, prompts."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

SESSION = Path(__file__).with_name("vllm_session.py")
START_SECONDS_MAX = 600.0
RUN_SECONDS_MAX = 300.0


class Outcome(msgspec.Struct):
    """What an engine made of some prompts. `counters` are since its start."""

    tokens: list[list[int]]
    finished: list[str]
    cached: list[int]
    seconds: float
    counters: dict[str, float]


class Engine:
    """A vLLM engine in a process of its own. A context manager.

    Args:
        model: directory of the checkpoint.
        connector: `kv_connector_extra_config`; None for no connector.
        log: where the engine's output goes.
        llm: further arguments of `vllm.LLM`.
    """

    def __init__(self, model: Path, connector: dict[str, Any] | None, log: Path, **llm: Any) -> None:
        config = json.dumps({"model": str(model), "connector": connector, "llm": llm})
        commands_read, commands_write = os.pipe()
        answers_read, answers_write = os.pipe()
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(SESSION), str(commands_read), str(answers_write), config],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(commands_read, answers_write),
            )
        os.close(commands_read)
        os.close(answers_write)
        self._commands = os.fdopen(commands_write, "w")
        self._answers = os.fdopen(answers_read, "r")

    def __enter__(self) -> Self:
        self._answer(START_SECONDS_MAX)
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

    def _answer(self, seconds: float) -> Any:
        ready, _, _ = select.select([self._answers], [], [], seconds)
        line = self._answers.readline() if ready else ""
        assert line, f"the engine did not answer; the end of its log:\n{self.log.read_text()[-4000:]}"
        return json.loads(line)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._commands.close()
        self._answers.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        self._process.kill()
        self._process.wait()


def save_checkpoint(directory: Path) -> Path:
    """A small Llama with random weights, large enough that attention is peaked and wrong KV changes tokens at once."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.float32).save_pretrained(directory)
    return directory


def mixed_prompts(seed: int = 0) -> list[list[int]]:
    """Twenty prompts of 69 to 310 tokens, most of which begin like others."""
    random_ = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [random_.randrange(3, 500) for _ in range(count)]

    beginnings = [ids(64), ids(128), ids(160)]
    shared = [beginning + ids(random_.randrange(5, 150)) for beginning in beginnings for _ in range(6)]
    return [*shared, ids(96), ids(256)]


def second_turns(prompts: list[list[int]], answers: list[list[int]]) -> list[list[int]]:
    """Twelve of the conversations continued: prompt, answer, and a new question."""
    random_ = random.Random(99)
    turns = zip(prompts[:12], answers[:12], strict=True)
    return [[*prompt, *answer, *(random_.randrange(3, 500) for _ in range(20))] for prompt, answer in turns]
