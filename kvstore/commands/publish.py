"""`kvstore events --publish`: a daemon's events for listeners that know vLLM's."""

from __future__ import annotations

import argparse
import math
import sys

from kvstore.commands.target import connect_target
from kvstore.errors import ConfigError


def publish(arguments: argparse.Namespace) -> int:
    """Publish events until the count, the time, or the daemon has ended; the exit code is 1 in the last case.

    Without --after everything that the daemon remembers comes first, behind an event that clears what listeners know.

    Raises:
        ConfigError: pyzmq is missing, or an endpoint cannot be bound.
    """
    try:
        from kvstore.connectors.kv_events_zmq import KVEventPublisher
    except ImportError as error:
        raise ConfigError(f'--publish needs pyzmq ({error}); pip install "kvstore-tiered[events]"') from error
    left = arguments.count or math.inf
    with (
        connect_target(arguments) as client,
        KVEventPublisher(arguments.publish, replay_endpoint=arguments.replay, topic=arguments.topic) as publisher,
        client.events(
            after=arguments.after or 0,
            tiers=arguments.tier,
            kinds=arguments.kind,
            deadline_ms=arguments.seconds * 1000,
        ) as stream,
    ):
        print(f"publishing at {publisher.endpoint} {publisher.replay_endpoint}".rstrip(), file=sys.stderr, flush=True)
        for event in stream:
            if not publisher.publish(event):
                print("kvstore: the publisher does not keep up; start again", file=sys.stderr)
                return 1
            left -= 1
            if left <= 0:
                return 0
        position = stream.position
    if arguments.seconds < math.inf:
        return 0
    print(f"kvstore: the daemon ended the stream or refused it; go on with --after {position}", file=sys.stderr)
    return 1
