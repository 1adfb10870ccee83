"""Decoding from many threads: no type is met by two of them at once, which crashes msgspec."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FIRST_USE = """
import sys, threading, time
import msgspec, msgspec._utils as utils
learn = utils._get_class_mro_and_typevar_mappings
def slowly(kind):  # other threads run while msgspec learns what a type's fields are
    time.sleep(0.02)
    found = learn(kind)
    time.sleep(0.02)
    return found
from kvstore.decoding import convert, decode_json
from kvstore.spec import KVSpec, Rope
utils._get_class_mro_and_typevar_mappings = slowly
class Inner(msgspec.Struct):
    value: int
class Outer(msgspec.Struct):
    first: Inner
    second: Inner
data = msgspec.json.encode(Outer(Inner(1), Inner(2)))
read = {
    "here": lambda: decode_json(data, Outer),
    "convert": lambda: convert(msgspec.json.decode(data), Outer),
    "plain": lambda: msgspec.json.decode(data, type=Outer),
}[sys.argv[1]]
def use(number):
    time.sleep(number * 0.01)
    assert read() == Outer(Inner(1), Inner(2))
threads = [threading.Thread(target=use, args=(number,)) for number in range(12)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


@pytest.mark.parametrize("how", ["here", "convert"])
def test_the_first_use_of_a_type_may_be_by_many_threads(how: str) -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_USE, how], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_it_the_process_crashes() -> None:
    """So that this module can go when msgspec has been mended."""
    done = subprocess.run([sys.executable, "-c", FIRST_USE, "plain"], capture_output=True, text=True, check=False)
    assert done.returncode != 0


def test_structs_are_decoded_by_nobody_else() -> None:
    for folder in ("kvstore", "codecs", "tiers", "connectors", "service"):
        for path in (ROOT / folder).glob("**/*.py"):
            found = re.findall(r"msgspec\.(?:json|msgpack)\.decode\(.*type=([A-Z_]\w*)", path.read_text())
            assert not found, f"{path.relative_to(ROOT)}: use kvstore.decoding for {found}"
