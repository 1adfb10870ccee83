"""A pytest plugin that lets SGLang's classes above its GPU kernels be imported on a machine without a GPU.

    pytest -p tests.sglang.without_gpu ...

SGLang imports everything it may need at once, most of which no host-side class uses. What is listed in ABSENT is given
to it as modules whose every name is a class that does nothing, if it is not installed. What the classes under test
really use is installed by run.py. Nothing of SGLang itself is replaced but the allocation of the host pool, which would
register the memory with CUDA.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

ABSENT = (
    "IPython",
    "compressed_tensors",
    "gguf",
    "orjson",
    "pybase64",
    "requests",
    "sentencepiece",
    "starlette",
    "torchvision",
    "traitlets",
    "tvm_ffi",
)
"""Packages that SGLang imports and nothing here calls."""


class _Anything(type):
    """A class that has every attribute, each of them another such class."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {"__init__": _nothing, "__call__": _first})


def _nothing(self: object, *args: object, **kwargs: object) -> None:
    """Make one of anything."""


def _first(self: object, *args: Any, **kwargs: object) -> Any:
    """Used as a decorator: what it decorates, as it is."""
    return args[0] if args else self


class _Hollow(ModuleType):
    """A module that has every name."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {"__init__": _nothing, "__call__": _first})


class _Finder:
    """Finds hollow modules, and modules inside them."""

    def __init__(self, packages: Sequence[str]) -> None:
        self._packages = frozenset(packages)

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """The spec of a module of a package that is absent."""
        if name.partition(".")[0] not in self._packages:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """An empty module."""
        return _Hollow(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: it has every name already."""


def pytest_configure() -> None:
    """Stand in for what is absent, after torch and transformers have seen what is really there."""
    importlib.import_module("torch.utils.data")
    importlib.import_module("transformers")
    absent = [name for name in ABSENT if importlib.util.find_spec(name) is None]
    sys.meta_path.append(_Finder(absent))
