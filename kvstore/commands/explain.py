"""`kvstore explain`: why a prompt would hit or miss in a running daemon, chunk by chunk."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import msgspec

from kvstore.client import Client
from kvstore.commands.target import add_target, connect_target
from kvstore.errors import ConfigError, ServiceError
from kvstore.explaining import Explanation, Why, explain_prompt
from kvstore.keys import DEFAULT_CHUNK_TOKENS, KeyScheme
from kvstore.protocol import parse_keys

SUMMARY = "say for each chunk of a prompt in which tiers it is, or why it is nowhere"

KEY_CHARACTERS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the flags."""
    add_target(parser)
    parser.add_argument("--keys", nargs="+", metavar="KEY", help="the chain's keys, 64 hexadecimal characters each")
    parser.add_argument("--tokens", metavar="FILE", help="file with a JSON array of the prompt's token ids")
    parser.add_argument("--fingerprint", default="", metavar="HEX", help="of the model; needed with --tokens")
    parser.add_argument("--chunk-tokens", type=int, default=DEFAULT_CHUNK_TOKENS, help="default %(default)s")
    parser.add_argument("--salt", default="", metavar="HEX", help="of the tenant")
    parser.add_argument("--json", action="store_true", help="print the explanations as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print one line a chunk; the exit code is 1 if the prompt does not hit whole."""
    if (arguments.keys is None) == (not arguments.tokens):
        raise ConfigError("give either --keys, or --tokens with --fingerprint")
    with connect_target(arguments) as client:
        explained = _of_keys(client, arguments) if arguments.keys is not None else _of_tokens(client, arguments)
    if arguments.json:
        print(msgspec.json.encode([{**msgspec.structs.asdict(e), "key": e.key.hex()} for e in explained]).decode())
    else:
        print("\n".join(lines(explained)))
    return 0 if all(chunk.why is Why.PRESENT for chunk in explained) else 1


def lines(explained: Sequence[Explanation]) -> list[str]:
    """The explanations for a person: a line a chunk, and what that means for the prompt."""
    found = []
    for index, chunk in enumerate(explained):
        tail = f": {chunk.detail}" if chunk.detail else ""
        where = f" in {', '.join(chunk.tiers)}, {chunk.nbytes} bytes" if chunk.tiers else ""
        found.append(f"{index} {chunk.key.hex()[:KEY_CHARACTERS]} {chunk.why}{where}{tail}")
    usable = next((i for i, chunk in enumerate(explained) if chunk.why is not Why.PRESENT), len(explained))
    return [*found, f"{usable} of {len(explained)} chunks can be fetched now"]


def _of_keys(client: Client, arguments: argparse.Namespace) -> list[Explanation]:
    keys = parse_keys(arguments.keys, "--keys")
    explained = client.explain(keys)
    if len(explained) != len(keys):
        raise ServiceError("the daemon did not answer; try again")
    return explained


def _of_tokens(client: Client, arguments: argparse.Namespace) -> list[Explanation]:
    fingerprint = _bytes(arguments.fingerprint, "--fingerprint")
    salt = _bytes(arguments.salt, "--salt")
    try:
        tokens = msgspec.json.decode(Path(arguments.tokens).read_bytes(), type=list[int])
    except OSError as error:
        raise ConfigError(f"--tokens {arguments.tokens}: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"--tokens {arguments.tokens}: {error}; write a JSON array of token ids") from error

    def scheme_of(chunk_tokens: int) -> KeyScheme:
        return KeyScheme(fingerprint, chunk_tokens=chunk_tokens, salt=salt)

    scheme_of(arguments.chunk_tokens)  # what is wrong with the flags is said before what is wrong with the tokens
    if len(tokens) < arguments.chunk_tokens:
        raise ConfigError(f"{len(tokens)} tokens do not fill a chunk of {arguments.chunk_tokens}; see --chunk-tokens")
    explained = explain_prompt(client, tokens, arguments.chunk_tokens, scheme_of)
    if not explained:
        raise ServiceError("the daemon did not answer; try again")
    return explained


def _bytes(text: str, flag: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise ConfigError(f"{flag} is {text!r:.80}; write bytes as hexadecimal characters") from error
