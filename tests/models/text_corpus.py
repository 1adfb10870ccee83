"""Text corpus for the small text model, gathered from what a Debian machine with Python carries.

Sources: the Python standard library without its tests, Perl documentation (POD), English manual pages,
and the text files below ``/usr/share/doc`` and a few other documentation folders.  Gathering is
deterministic for a given machine: files are visited in sorted order, paragraphs seen before are removed,
near duplicates are dropped, and a file is held out by a hash of its logical name, so that the split of
the standard library is the same on every machine.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib
import io
import json
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_ONE_IN = 25
SIZE_LIMIT = 300_000
TEXT_SUFFIXES = {"", ".txt", ".md", ".rst", ".pod", ".html"}
SKIP_PARTS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "__pycache__",
    "lib2to3",
    "msilib",
    "turtledemo",
    "changelogs",
}
SKIP_NAME = re.compile(
    r"^(changelog|changes|news|authors|thanks|credits|contributors|gcloud[-_]|cmake|tags|status\.txt|test)|"
    r"test_results|version\d\.txt",
    re.IGNORECASE,
)
FONT = re.compile(r"\\f(\[[^\]]*\]|\([A-Z]{2}|[A-Z0-9])")


@dataclass(frozen=True)
class Document:
    """One cleaned file."""

    source: str
    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the file belongs to the validation split."""
        digest = hashlib.sha256(f"{self.source}/{self.name}".encode()).digest()
        return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def _read(path: Path) -> str | None:
    """Decode a (possibly gzipped) text file, or return None."""
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        if path.suffix == ".py":
            with io.BytesIO(data) as stream:
                encoding = tokenize.detect_encoding(stream.readline)[0]
            return data.decode(encoding)
        return data.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError, SyntaxError):
        return None


def _pod(text: str) -> str:
    """Keep the POD sections of a Perl file, with simple markup removed."""
    keep: list[str] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("=cut"):
            inside = False
        elif re.match(r"=[a-z]", line):
            inside = not line.startswith(("=begin", "=for", "=encoding"))
            line = re.sub(r"^=(head\d|item|over|back|pod|end)\s*\d*\s*", "", line)
        if inside and not line.startswith("=cut"):
            keep.append(re.sub(r"\b[BCEFILX]<+\s?([^<>]*?)\s?>+", r"\1", line))
    return "\n".join(keep)


def _man(text: str) -> str:
    """Turn roff source into rough plain text."""
    keep: list[str] = []
    for line in text.splitlines():
        if line.startswith((".", "'")):
            match = re.match(r"[.'](SH|SS|B|I|BR|IR|BI|IB|RB|RI|IP|TP|Nm|Fl|Ar|Sh)\s+(.*)", line)
            if line.startswith((".PP", ".P", ".LP", ".TP", ".IP", ".sp", ".SH", ".SS", ".Sh", ".Pp")):
                keep.append("")
            if not match:
                continue
            line = match[2].replace('"', "")
        line = FONT.sub("", line)
        for mark, plain in (
            ("\\-", "-"),
            ("\\&", ""),
            ("\\e", "\\"),
            ("\\(aq", "'"),
            ("\\(bu", "*"),
            ("\\(en", "-"),
            ("\\(em", "--"),
            ("\\(lq", '"'),
            ("\\(rq", '"'),
            ("\\ ", " "),
        ):
            line = line.replace(mark, plain)
        keep.append(re.sub(r"\\[*(][^ ]{1,2}|\\s[+-]?\d|\\[|^:/]", "", line))
    return "\n".join(keep)


def _html(text: str) -> str:
    """Drop tags."""
    text = re.sub(r"(?s)<(script|style|head).*?</\1>", "", text)
    text = re.sub(r"<[^>]{1,300}>", "", text)
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&nbsp;", " ").replace("&amp;", "&")


def _walk(root: Path, suffixes: set[str]) -> Iterator[tuple[str, Path]]:
    """Yield (relative name, path) of regular files in sorted order, without changelogs and tests."""
    if not root.is_dir():
        return
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        plain = path.with_suffix("") if path.suffix == ".gz" else path
        if SKIP_PARTS & set(relative.parts) or SKIP_NAME.match(path.name) or path.is_symlink():
            continue
        if plain.suffix.lower() not in suffixes or not path.is_file() or path.stat().st_size > SIZE_LIMIT:
            continue
        yield str(relative), path


def _sources() -> Iterator[tuple[str, str, Path, Callable[[str], str]]]:
    """Yield (source, name, path, converter) for every candidate file."""

    def same(text: str) -> str:
        return text

    for name, path in _walk(Path(sysconfig.get_paths()["stdlib"]), {".py", ".txt", ".rst"}):
        if not name.startswith("pydoc_data"):
            yield "stdlib", name, path, same
    share = Path("/usr/share")
    for name, path in _walk(share / "common-licenses", TEXT_SUFFIXES):
        yield "licenses", name, path, same
    for root in sorted(share.glob("perl/[0-9]*")) + sorted(share.glob("perl5")):
        for name, path in _walk(root, {".pod", ".pm"}):
            yield "perl", name, path, _pod
    for section in "1578234":
        for name, path in _walk(share / "man" / f"man{section}", {f".{section}"}):
            yield "man", f"man{section}/{name}", path, _man
    for root in (*sorted(share.glob("cmake-*/Help")), *sorted(share.glob("vim/vim*/doc")), share / "doc"):
        for name, path in _walk(root, TEXT_SUFFIXES):
            yield "doc", f"{root.name}/{name}", path, _html if ".html" in path.suffixes else same


def _raw_files(only: str | None) -> Iterator[tuple[str, str, str]]:
    """Yield (source, name, converted text), with the reference topics of ``pydoc`` after the modules."""
    topics = dict(importlib.import_module("pydoc_data.topics").topics)
    for source, name, path, convert in _sources():
        if source != "stdlib":
            yield from (("stdlib", f"topics/{topic}", topics[topic]) for topic in sorted(topics))
            topics = {}
            if only == "stdlib":
                return
        if only not in (None, source):
            continue
        raw = _read(path)
        if raw is not None and "\0" not in raw:
            yield source, name, convert(raw)


def _tidy(text: str) -> str:
    """Normalise line ends, drop very long lines and rulers, and squeeze blank lines."""
    lines = [line.rstrip() for line in text.expandtabs(8).splitlines() if len(line) <= 300]
    lines = [re.sub(r"([-=*~#_.])\1{15,}", lambda m: m[1] * 16, line) for line in lines]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"


def gather(only: str | None = None) -> list[Document]:
    """Read, clean and deduplicate the corpus (``only`` keeps a single source, such as ``stdlib``).

    The standard library comes first, so restricting the result to it gives the same documents.
    """
    seen_paragraphs: set[int] = set()
    seen_shingles: set[int] = set()
    documents: list[Document] = []
    for source, name, raw in _raw_files(only):
        if only is not None and source != only:
            continue
        text = _tidy(raw)
        if len(text) > SIZE_LIMIT:
            continue
        if sum(not c.isascii() for c in text) > 0.03 * len(text):
            continue
        fresh: list[str] = []
        for paragraph in text.split("\n\n"):
            key = int.from_bytes(hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=8).digest(), "big")
            if len(paragraph) < 80 or key not in seen_paragraphs:
                fresh.append(paragraph)
            seen_paragraphs.add(key)
        kept = "\n\n".join(fresh).strip("\n") + "\n"
        if len(kept) < 400 or len(kept) < 0.4 * len(text):
            continue
        words = kept.split()
        shingles = set()
        for i in range(len(words) - 7):
            digest = hashlib.blake2b(" ".join(words[i : i + 8]).encode(), digest_size=8).digest()
            if digest[0] < 32:
                shingles.add(int.from_bytes(digest, "big"))
        if shingles and len(shingles & seen_shingles) > 0.35 * len(shingles):
            continue
        seen_shingles |= shingles
        documents.append(Document(source, name, kept))
    return documents


def main() -> None:
    """Print the size of the corpus per source."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default=None)
    documents = gather(parser.parse_args().only)
    report: dict[str, dict[str, int]] = {}
    for document in documents:
        row = report.setdefault(document.source, {"files": 0, "bytes": 0, "held_out_files": 0, "held_out_bytes": 0})
        size = len(document.text.encode())
        row["files"] += 1
        row["bytes"] += size
        row["held_out_files"] += document.held_out
        row["held_out_bytes"] += size * document.held_out
    digest = hashlib.sha256("".join(d.text for d in documents).encode()).hexdigest()[:16]
    print(json.dumps({"sources": report, "digest": digest}, indent=1))


if __name__ == "__main__":
    main()
