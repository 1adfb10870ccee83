"""`kvstore calibrate`: fit a codec profile to a model and write it to a file."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from kvstore.errors import ConfigError

SUMMARY = "run a model over text and write the codec profile that fits it"

TOKENS_DEFAULT = 65536
BAR_WIDTH = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the flags."""
    parser.add_argument("--model", required=True, metavar="PATH", help="directory of a transformers model")
    parser.add_argument(
        "--text", required=True, nargs="+", metavar="FILE", help="text like that of the prompts to come"
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="where the profile goes; a directory, one of KVSTORE_PROFILES say, names it by its id",
    )
    parser.add_argument(
        "--profile",
        default="layer",
        metavar="KIND",
        help="what is transformed together: x0, head, layer, group:N or all (default %(default)s)",
    )
    parser.add_argument("--tokens", type=int, default=TOKENS_DEFAULT, help="text to use at most (default %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Calibrate and write the profile; prints its id."""
    if arguments.tokens < 1:
        raise ConfigError(f"--tokens is {arguments.tokens}; it must be at least 1")
    target = Path(arguments.out)
    if not target.is_dir() and not target.parent.is_dir():
        raise ConfigError(f"--out {target}: the directory {target.parent} does not exist; make it first")
    try:
        from kvstore.connectors.calibrate import calibrate_path
    except ImportError as error:
        raise ConfigError(f"calibrate needs torch and transformers ({error}); install the extra [torch]") from error
    from kvstore.codecs import profiles
    from kvstore.codecs.profile import parse_profile

    progress = _Progress()
    found = calibrate_path(arguments.model, arguments.text, arguments.profile, arguments.tokens, progress.show)
    progress.end()
    path = profiles.save(found.blob, target) if target.is_dir() else profiles.save_as(found.blob, target)
    profile = parse_profile(found.blob)
    print(f"profile {profile.id.hex()}: {len(found.blob)} bytes from {found.tokens} tokens, in {path}")
    return 0


class _Progress:
    """A bar on stderr, when that is a terminal."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._started = time.monotonic()

    def show(self, done: int, total: int) -> None:
        """Draw the bar."""
        if self._shown:
            filled = BAR_WIDTH * done // max(1, total)
            rate = done / max(1e-9, time.monotonic() - self._started)
            bar = "#" * filled + "." * (BAR_WIDTH - filled)
            print(f"\r[{bar}] {done}/{total} tokens, {rate:.0f}/s", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the bar's line."""
        if self._shown:
            print(file=sys.stderr)
