"""Builds the C++ kernels. Everything else about the package is in pyproject.toml.

Without a C++ compiler the install succeeds and kvstore runs on its NumPy kernels, saying so when it starts.
"""

from __future__ import annotations

from setuptools import Extension, setup

# The folders as the package sees them (kvstore/codecs is a link), so that a source archive holds each file once.
CORE = "kvstore/native"
CODECS = "kvstore/codecs/native"

setup(
    ext_modules=[
        Extension(
            "kvstore._native",
            sources=[
                f"{CORE}/module.cpp",
                f"{CORE}/xxh3.cpp",
                f"{CORE}/stripes.cpp",
                f"{CORE}/pieces.cpp",
                f"{CODECS}/planes.cpp",
            ],
            depends=[f"{CORE}/xxh3.h", f"{CORE}/pieces.h", f"{CODECS}/planes.h"],
            include_dirs=[CORE, CODECS],
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"],
            language="c++",
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
