"""The main job, shown: a real model answers real prompts from KV that came back out of kvstore, after a daemon restart
too.

    python -m kvstore.bench.demo

Starts a daemon, runs a conversation and a document with several questions (a) without a store, (b) through it for the
first time, (c) again, warm from memory, (d) again after kill -9 and restart, warm from disk. Every run must answer the
same tokens as (a). Ends with everything stopped; exit code 1 if any token differs.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import sys
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import kvstore
from kvstore import kernels
from kvstore.bench.daemon import Daemon
from kvstore.bench.first_token import Generated, generate
from kvstore.bench.timing import median
from kvstore.connectors.transformers import TransformersConnector
from kvstore.sizes import format_bytes

MODEL = Path(__file__).resolve().parents[1] / "tests" / "models" / "text"
DOCUMENT_TOKENS = 1536
ANSWER_TOKENS = 128
NEW_TOKENS = 24

QUESTIONS = (
    "def wrap(text, width=70, **kwargs):",
    "Return a list of wrapped lines.",
    "class TextWrapper:",
    "expand_tabs (default: true)",
)
TURNS = (
    "\n\ndef dedent(text):\n",
    "\n\ndef indent(text, prefix, predicate=None):\n",
    "\n\ndef shorten(text, width, **kwargs):\n",
    "\n\nif __name__ == '__main__':\n",
)


class Prompt(msgspec.Struct, frozen=True):
    """One prompt of the demo: its name in the table and its token ids, shape (1, tokens)."""

    name: str
    ids: torch.Tensor


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; answers the exit code."""
    parser = argparse.ArgumentParser(prog="kvstore-demo", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default=str(MODEL), help="a transformers causal LM with its tokenizer")
    arguments = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more cost more than they bring on a model this small, most of all on a busy machine
    say(f"kvstore {kvstore.__version__}, kernels: {kernels.NAME}")
    say(f"loading the model from {arguments.model}")
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    prompts = make_prompts(tokenizer, model)
    with tempfile.TemporaryDirectory(prefix=".kvstore-demo-", dir=".") as directory:
        return run(model, prompts, Path(directory).resolve())


def run(model: Any, prompts: list[Prompt], directory: Path) -> int:
    """All four runs and the table."""
    model.generate(prompts[0].ids[:, :64], max_new_tokens=2, do_sample=False)  # warms the allocator up
    say("a) without a store: every prompt is computed from its first token")
    cold = _each(prompts, lambda ids: generate(model.generate, ids, NEW_TOKENS))
    with Daemon(directory, dram="256MiB", nvme="1GiB") as daemon:
        say("b) a daemon starts with an empty store; chunks are stored on the way")
        with daemon.start() as client:
            first = _each(prompts, _through(model, client))
            say("c) the same prompts again: warm from the daemon's memory")
            warm = _each(prompts, _through(model, client))
            durable = client.flush()
        say(f"   everything is on disk: {'yes' if durable else 'NO'}; kill -9 of daemon {daemon.pid}")
        daemon.kill()
        say("d) the daemon starts again on the same files: warm from disk")
        with daemon.start() as client:
            say(f"   up in {daemon.start_seconds:.2f} s")
            disk = _each(prompts, _through(model, client))
        code = daemon.stop()
    say(f"   daemon stopped, exit code {code}")
    equal = _table(prompts, cold, first, warm, disk)
    return 0 if equal and code == 0 else 1


def make_prompts(tokenizer: PreTrainedTokenizerBase, model: Any) -> list[Prompt]:
    """A growing conversation about one source file, and one document with several questions."""
    source = inspect.getsource(textwrap)
    manual = inspect.cleandoc(argparse.__doc__ or "") + "\n\n" + inspect.getsource(argparse)
    prompts = []
    history = _ids(tokenizer, source)[:, :512]
    for number, turn in enumerate(TURNS, 1):
        history = torch.cat([history, _ids(tokenizer, turn)], dim=1)
        prompts.append(Prompt(f"conversation, turn {number}", history))
        answer = model.generate(
            history, attention_mask=torch.ones_like(history), max_new_tokens=ANSWER_TOKENS, do_sample=False
        )
        history = answer
    document = _ids(tokenizer, manual)[:, :DOCUMENT_TOKENS]
    for number, question in enumerate(QUESTIONS, 1):
        ids = torch.cat([document, _ids(tokenizer, "\n\n" + question)], dim=1)
        prompts.append(Prompt(f"document, question {number}", ids))
    return prompts


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    ids: torch.Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    return ids


def _through(model: Any, client: kvstore.Client) -> Callable[[torch.Tensor], Generated]:
    connector = TransformersConnector(model, client)
    return lambda ids: generate(connector.generate, ids, NEW_TOKENS)


def _each(prompts: list[Prompt], run_one: Callable[[torch.Tensor], Generated]) -> list[Generated]:
    results = []
    for number, prompt in enumerate(prompts, 1):
        results.append(run_one(prompt.ids))
        say(f"   {number}/{len(prompts)} {prompt.name}: first token after {results[-1].ttft_seconds * 1e3:.0f} ms")
    return results


def _table(
    prompts: list[Prompt], cold: list[Generated], first: list[Generated], warm: list[Generated], disk: list[Generated]
) -> bool:
    say("")
    say("time to first token [ms]                without  first   warm    warm   tokens   bytes      equal")
    say("prompt                       tokens     store    pass    memory  disk   reused   loaded     tokens")
    all_equal = True
    for prompt, *runs in zip(prompts, cold, first, warm, disk, strict=True):
        report = runs[3].extra[0]
        equal = all(run.tokens == runs[0].tokens for run in runs)
        all_equal &= equal
        times = " ".join(f"{run.ttft_seconds * 1e3:7.0f}" for run in runs)
        say(
            f"{prompt.name:28s} {prompt.ids.shape[1]:6d} {times}   {report.reused_tokens:6d}   "
            f"{format_bytes(report.loaded_bytes):9s}  {'yes' if equal else 'NO'}"
        )
    for name, runs in (("memory", warm), ("disk", disk)):
        ratio = median([w.ttft_seconds / c.ttft_seconds for w, c in zip(runs, cold, strict=True)])
        say(f"warm from {name}: time to first token is {ratio:.2f} of computing it (median of {len(prompts)} prompts)")
    say(f"all tokens equal: {'yes' if all_equal else 'NO'}")
    return all_equal


def say(line: str) -> None:
    """One line of progress, at once."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
