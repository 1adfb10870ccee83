"""The flags that name a store, and the client they mean."""

from __future__ import annotations

import argparse

from kvstore.client import Client
from kvstore.connect import connect


def add_target(parser: argparse.ArgumentParser) -> None:
    """Define the flags."""
    parser.add_argument("--url", required=True, help="unix:/path or http://host:port")
    parser.add_argument("--token-file", default="", metavar="FILE", help="file with the bearer token")


def connect_target(arguments: argparse.Namespace) -> Client:
    """A client of the store that the flags name. Raises what `kvstore.connect` raises."""
    token = None
    if arguments.token_file:
        from kvstore.service.auth import read_token

        token = read_token(arguments.token_file, "--token-file")
    return connect(arguments.url, token=token)
