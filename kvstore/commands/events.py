"""`kvstore events`: print what enters and leaves a daemon's tiers, a line an event."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime

from kvstore.client import Client
from kvstore.commands.target import add_target, connect_target
from kvstore.config import unknown_name
from kvstore.errors import ConfigError
from kvstore.events import KINDS, Event
from kvstore.sse import to_json

SUMMARY = "print what enters and leaves the tiers of a running daemon, as it happens"

KEY_CHARACTERS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the flags."""
    add_target(parser)
    parser.add_argument("--tier", action="append", default=[], metavar="NAME", help="only this tier; may be repeated")
    parser.add_argument("--kind", action="append", default=[], choices=KINDS, help="only events of this kind")
    parser.add_argument("--after", type=int, metavar="SEQ", help="start after the event of this number, not from now")
    parser.add_argument("--count", type=int, default=0, metavar="N", help="end after so many events; 0: do not")
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="S", help="end after so many seconds")
    parser.add_argument("--json", action="store_true", help="print each event as JSON")
    parser.add_argument(
        "--publish",
        metavar="ENDPOINT",
        help="do not print: publish over ZeroMQ in vLLM's form, e.g. at tcp://127.0.0.1:5557 (events extra)",
    )
    parser.add_argument("--replay", default="", metavar="ENDPOINT", help="with --publish: where listeners ask again")
    parser.add_argument("--topic", default="", help="with --publish: first part of every message")


def run(arguments: argparse.Namespace) -> int:
    """Print events until the count, the time, or the daemon has ended; the exit code is 1 in the last case."""
    if arguments.count < 0 or not arguments.seconds > 0:
        raise ConfigError("--count must not be negative, and --seconds must be positive")
    if arguments.publish:
        return publish(arguments)
    if arguments.replay or arguments.topic:
        raise ConfigError("--replay and --topic go with --publish")
    with connect_target(arguments) as client:
        return follow(arguments, client, arguments.after, lambda event: _print(arguments, event))


def follow(
    arguments: argparse.Namespace, client: Client, after: int | None, take: Callable[[Event], int | None]
) -> int:
    """Hand events to `take` until it answers an exit code, or the count, the time or the daemon has ended.

    Raises:
        ConfigError: the daemon has no tier of a name that is asked for.
    """
    tiers = client.stats().get("tiers", {}) if arguments.tier else {}
    for name in arguments.tier:
        if tiers and name not in tiers:
            raise unknown_name("tier", name, tiers)
    left = arguments.count or math.inf
    with client.events(
        after=after, tiers=arguments.tier, kinds=arguments.kind, deadline_ms=arguments.seconds * 1000
    ) as stream:
        for event in stream:
            code = take(event)
            left -= 1
            if code is not None or left <= 0:
                return code or 0
        position = stream.position
    if arguments.seconds < math.inf:
        return 0
    print(f"kvstore: the daemon ended the stream or refused it; go on with --after {position}", file=sys.stderr)
    return 1


def publish(arguments: argparse.Namespace) -> int:
    """Publish events over ZeroMQ until the count, the time, or the daemon has ended; 1 in the last case.

    Without --after everything that the daemon remembers comes first, behind an event that clears what listeners know.

    Raises:
        ConfigError: pyzmq is missing, or an endpoint cannot be bound.
    """
    try:
        from kvstore.connectors.kv_events_zmq import KVEventPublisher
    except ImportError as error:
        raise ConfigError(f'--publish needs pyzmq ({error}); pip install "kvstore-tiered[events]"') from error
    with (
        connect_target(arguments) as client,
        KVEventPublisher(arguments.publish, replay_endpoint=arguments.replay, topic=arguments.topic) as publisher,
    ):
        print(f"publishing at {publisher.endpoint} {publisher.replay_endpoint}".rstrip(), file=sys.stderr, flush=True)

        def take(event: Event) -> int | None:
            if publisher.publish(event):
                return None
            print("kvstore: the publisher does not keep up; start again", file=sys.stderr)
            return 1

        return follow(arguments, client, arguments.after or 0, take)


def _print(arguments: argparse.Namespace, event: Event) -> int | None:
    try:
        print(to_json(event).decode() if arguments.json else line(event), flush=True)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return None


def line(event: Event) -> str:
    """An event as one line for a person."""
    when = datetime.fromtimestamp(event.unix_seconds, UTC).isoformat(timespec="milliseconds")
    if event.kind == "lost":
        return f"{when} {event.seq} lost {'an unknown number of' if event.lost is None else event.lost} events"
    parts = [when, str(event.seq), event.kind, event.tier, event.key.hex()[:KEY_CHARACTERS], f"{event.nbytes} bytes"]
    if event.tokens is not None:
        parts.append(f"{event.tokens} tokens")
    if event.parent is not None:
        parts.append(f"parent {event.parent.hex()[:KEY_CHARACTERS]}")
    if event.reason is not None:
        parts.append(str(event.reason))
    if event.detail:
        parts.append(f"({event.detail})")
    return " ".join(parts)
