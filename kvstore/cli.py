"""The `kvstore` command: serve, fsck, config, info, stats, events, explain, calibrate, gate, bench."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import msgspec

import kvstore
from kvstore import config as configuration
from kvstore.commands import calibrate, events, explain, fsck, gate
from kvstore.commands.target import connect_target
from kvstore.errors import KVStoreError


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaint about an unknown flag names the nearest one."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

    def parse_strictly(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parsed arguments; exits with one line about the first that is unknown."""
        arguments, unknown = self.parse_known_args(argv)
        if unknown:
            leaf: argparse.ArgumentParser = arguments.leaf
            flags = [flag for flag in leaf._option_string_actions if flag.startswith("--")]
            leaf.error(str(configuration.unknown_name("flag", unknown[0].partition("=")[0], flags)))
        return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; answers its exit code. An error is one line on stderr and exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["bench"]:
        from kvstore.bench import cli as bench

        return _guarded(lambda: bench.main(argv[1:]))
    arguments = _parser().parse_strictly(argv)
    return _guarded(lambda: int(arguments.run(arguments)))


def _guarded(run: Callable[[], int]) -> int:
    """What `run` answers; one line and an exit code for what people and the system do to it."""
    before = None
    with suppress(ValueError):  # not in the main thread: signals are somebody else's
        # Ended by SIGTERM as by Ctrl-C, a command takes away its temporary files and the daemons that it started.
        before = signal.signal(signal.SIGTERM, _terminated)
    try:
        code = run()
        sys.stdout.flush()
        return code
    except KVStoreError as error:
        print(f"kvstore: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output has seen enough
        _give_up_output()
        return 0
    except OSError as error:
        print(f"kvstore: {error}", file=sys.stderr)
        _give_up_output()
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _give_up_output() -> None:
    """Let go of what cannot be written to standard output, so that the interpreter does not complain at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminated(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def _parser() -> _Parser:
    parser = _Parser(prog="kvstore", description="A tiered store for the KV cache of LLM inference.")
    parser.add_argument("--version", action="version", version=f"kvstore {kvstore.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    serve = _command(commands, "serve", _serve, "run the daemon")
    _add_config_flags(serve)

    show = _command(commands, "config", _config, "print the resolved configuration and where each value came from")
    show.add_argument("action", choices=["show"])
    _add_config_flags(show)

    fsck.add_arguments(_command(commands, "fsck", fsck.run, fsck.SUMMARY))

    _command(commands, "info", _info, "print version, kernels, codecs and tier kinds of this installation")

    stats = _command(commands, "stats", _stats, "print the statistics of a running daemon as JSON")
    stats.add_argument("url", help="unix:/path or http://host:port")
    stats.add_argument("--token-file", default="", help="file with the bearer token")

    events.add_arguments(_command(commands, "events", events.run, events.SUMMARY))
    explain.add_arguments(_command(commands, "explain", explain.run, explain.SUMMARY))
    calibrate.add_arguments(_command(commands, "calibrate", calibrate.run, calibrate.SUMMARY))
    gate.add_arguments(_command(commands, "gate", gate.run, gate.SUMMARY))

    commands.add_parser("bench", help="storage and service benchmarks; see kvstore bench --help", add_help=False)
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> _Parser:
    parser: _Parser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
    )
    parser.set_defaults(run=run, leaf=parser)
    return parser


def _add_config_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="TOML file; default $KVSTORE_CONFIG")
    parser.add_argument("--dram", metavar="SIZE", help="capacity of a dram tier, e.g. 4GiB")
    parser.add_argument("--nvme", metavar="SIZE", help="capacity of an nvme tier, e.g. 100GiB; needs --path")
    parser.add_argument("--path", metavar="DIR", help="directory of the nvme tier")
    parser.add_argument("--host", help="address to listen on")
    parser.add_argument("--port", type=int, help="TCP port; 0: any, -1: none")
    parser.add_argument("--socket", metavar="PATH", help="UNIX socket to listen on")
    parser.add_argument("--token-file", metavar="FILE", help="file with the bearer token that TCP requests need")
    parser.add_argument("--set", metavar="NAME=VALUE", action="append", default=[], help="any other setting, dotted")


def _load_config(arguments: argparse.Namespace) -> tuple[configuration.Config, dict[str, str]]:
    flags: dict[str, Any] = {}
    for flag, setting in (
        ("dram", "tiers.dram.capacity"),
        ("nvme", "tiers.nvme.capacity"),
        ("path", "tiers.nvme.path"),
        ("host", "service.host"),
        ("port", "service.port"),
        ("socket", "service.socket"),
        ("token_file", "service.token_file"),
    ):
        if getattr(arguments, flag) is not None:
            flags[setting] = getattr(arguments, flag)
    for assignment in arguments.set:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise kvstore.ConfigError(f"--set {assignment!r}: write NAME=VALUE")
        flags[name] = value
    return configuration.load(arguments.config, flags=flags)


def _serve(arguments: argparse.Namespace) -> int:
    config, _ = _load_config(arguments)
    logging.basicConfig(level=config.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    from kvstore.compose import open_store
    from kvstore.service.server import serve

    return serve(open_store(config), config.service, config.tenants)


def _config(arguments: argparse.Namespace) -> int:
    config, origins = _load_config(arguments)
    for name, value in _flatten(msgspec.to_builtins(config)):
        origin = next((o for key, o in origins.items() if key == name or name.startswith(key + ".")), "default")
        print(f"{name} = {json.dumps(value)}  # {origin}")
    return 0


def _flatten(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [item for name, child in value.items() for item in _flatten(child, f"{path}.{name}" if path else name)]
    return [(path, value)]


def _info(_: argparse.Namespace) -> int:
    from kvstore import kernels
    from kvstore.codecs import registry as codecs
    from kvstore.tiers import registry as tiers

    print(f"kvstore {kvstore.__version__}")
    print(f"kernels: {kernels.NAME}")
    print(f"codecs:  {', '.join(codecs.available())}")
    print(f"tiers:   {', '.join(tiers.available())}")
    return 0


def _stats(arguments: argparse.Namespace) -> int:
    with connect_target(arguments) as client:
        print(json.dumps(client.stats(), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
