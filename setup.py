"""Builds the C++ kernels. Everything else about the package is in pyproject.toml.

Without a C++ compiler the install succeeds and kvstore runs on its NumPy kernels, saying so when it starts.
"""

from __future__ import annotations

from setuptools import Extension, setup

# The folders as the package sees them (kvstore/codecs is a link), so that a source archive holds each file once.
CORE = "kvstore/native"
CODECS = "kvstore/codecs/native"
TIERS = "kvstore/tiers/native"
EXPONENTS = ("python", "loops", "fixed", "planes")
LADDER = ("python", "avx512", "decode", "encode", "loops", "output")
R32 = ("python", "decode", "encode", "pack", "dispatch", "scalar", "avx2", "avx512", "avx512_digits", "neon")

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
                *(f"{CODECS}/exponents_{part}.cpp" for part in EXPONENTS),
                *(f"{CODECS}/ladder_{part}.cpp" for part in LADDER),
                *(f"{CODECS}/r32_{part}.cpp" for part in R32),
                f"{TIERS}/chunk_table.cpp",
                f"{TIERS}/chunk_table_python.cpp",
            ],
            depends=[
                f"{CORE}/glue.h",
                f"{CORE}/xxh3.h",
                f"{CORE}/pieces.h",
                f"{CODECS}/planes.h",
                f"{CODECS}/exponents.h",
                *(f"{CODECS}/exponents_{part}.h" for part in ("blocks", "loops", "python")),
                f"{CODECS}/ladder.h",
                *(f"{CODECS}/ladder_{part}.h" for part in ("avx512", "decode", "loops", "plan", "python")),
                f"{CODECS}/r32.h",
                *(
                    f"{CODECS}/r32_{part}.h"
                    for part in ("avx512_digits", "digits", "kernels", "python", "step", "threads")
                ),
                f"{TIERS}/chunk_table.h",
                f"{TIERS}/chunk_table_python.h",
            ],
            include_dirs=[CORE, CODECS, TIERS],
            # Without contraction of a*b+c a number is the same on every processor, and NumPy's.
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",
                "-fvisibility=hidden",
                "-ffp-contract=off",
                "-Wall",
                "-Wextra",
            ],
            language="c++",
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
