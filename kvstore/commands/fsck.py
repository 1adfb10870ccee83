"""`kvstore fsck`: checks the files of an nvme tier, or, through a running daemon, a tier that is in use."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import msgspec

from kvstore.commands.target import connect_target
from kvstore.errors import ConfigError
from kvstore.sizes import parse_bytes
from kvstore.verifying import STEP_BYTES_DEFAULT, BadChunk, Verified, at_rate

if TYPE_CHECKING:
    from kvstore.tiers.fsck import Report

SUMMARY = "check an nvme tier, its files or in a running daemon; exit code 1 if there are problems"
SCHEMES = ("unix:", "http:", "https:")
RATE_DEFAULT = "100MiB"
PROBLEMS_MAX = 1000
"""Bad chunks that the report on a running tier lists; all are counted."""


class OnlineReport(msgspec.Struct):
    """What the check of a running tier has found. With repair, what was bad has left the tier."""

    url: str
    tier: str = ""
    chunks: int = 0
    verified_bytes: int = 0
    problem_count: int = 0
    repaired: bool = False
    problems: list[str] = []

    @property
    def clean(self) -> bool:
        """True if nothing was wrong, or all that was has been repaired."""
        return not self.problem_count or self.repaired

    def add(self, step: Verified) -> None:
        """Count what one step has seen."""
        self.chunks += step.chunks
        self.verified_bytes += step.nbytes
        self.problem_count += len(step.bad)
        room = PROBLEMS_MAX - len(self.problems)
        self.problems += [f"chunk {chunk.key.hex()[:12]}: {chunk.detail}" for chunk in step.bad[:room]]

    def text(self) -> str:
        """The report for a person."""
        head = f"{self.url} tier {self.tier}: {self.chunks} chunks, {self.verified_bytes} bytes verified"
        more = self.problem_count - len(self.problems)
        found = f"{self.problem_count} problems{' (removed)' if self.repaired else ''}"
        tail = found if self.problem_count else "clean"
        return "\n".join([head, *self.problems, *([f"... and {more} more"] if more else []), tail])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the flags."""
    parser.add_argument("url", metavar="TARGET", help="directory of the tier; or unix:/path, http://host:port")
    parser.add_argument("--repair", action="store_true", help="drop bad entries")
    parser.add_argument("--shallow", action="store_true", help="files: check the catalog only, not every chunk's bytes")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--rate", metavar="SIZE", help=f"daemon: bytes a second to read at most; {RATE_DEFAULT}")
    parser.add_argument("--tier", default="", metavar="NAME", help="daemon: which tier; the first that can be checked")
    parser.add_argument("--token-file", default="", metavar="FILE", help="daemon: file with the bearer token")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; the exit code is 1 if there are problems left."""
    report = _online(arguments) if arguments.url.startswith(SCHEMES) else _offline(arguments)
    print(msgspec.json.format(msgspec.json.encode(report)).decode() if arguments.json else report.text())
    return 0 if report.clean else 1


def _offline(arguments: argparse.Namespace) -> Report:
    from kvstore.tiers import fsck

    for flag in ("rate", "tier", "token_file"):
        if getattr(arguments, flag):
            raise ConfigError(f"--{flag.replace('_', '-')} is for a running daemon; {arguments.url} is a directory")
    return fsck.check(arguments.url, deep=not arguments.shallow, repair=arguments.repair)


def _online(arguments: argparse.Namespace) -> OnlineReport:
    if arguments.shallow:
        raise ConfigError("--shallow is for the files of a tier; a running daemon has its catalog in memory")
    rate = parse_bytes(arguments.rate or RATE_DEFAULT, "--rate")
    if rate <= 0:
        raise ConfigError(f"--rate is {arguments.rate!r}; it must be positive")
    from kvstore.connectors.remote import RemoteClient

    report = OnlineReport(arguments.url, repaired=arguments.repair)
    with connect_target(arguments) as client:
        assert isinstance(client, RemoteClient), "the schemes are those of a daemon"

        def step(start: int) -> Verified:
            reply = client.verify(start, tier=arguments.tier, bytes_max=STEP_BYTES_DEFAULT, repair=arguments.repair)
            report.tier = reply.tier
            bad = [BadChunk(bytes.fromhex(entry.key), entry.detail) for entry in reply.bad]
            return Verified(reply.chunks, reply.nbytes, bad, reply.next_start)

        for verified in at_rate(step, min(rate, 1 << 40)):
            report.add(verified)
    return report
