"""BM25 over a corpus, by tantivy: built once, kept with its documents, opened read-only.

A query is plain words, not tantivy's query language: it goes through the documents' analyzer, and
each resulting word is looked up. So every query is answered.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tantivy

from tools.base import SearchUnavailable
from tools.cache import build_folder, cache_dir
from tools.servers.search.corpus import Corpus, JsonlCorpus, WikipediaLeads

MANIFEST = "turntrace-index.json"
_FORMAT = 1
"""Increases when the form of an index changes."""

ANALYZER = "english"
FIELDS = ("title", "text")
"""Both are searched. A title is short, so a word in it counts for more without a boost."""

# How much of a query is used. A question has fifty words; each costs a walk through documents.
MAX_QUERY_CHARS = 10_000
MAX_QUERY_TERMS = 128

_HEAP_BYTES = 256_000_000
_PROGRESS_EVERY = 1000

OnProgress = Callable[[float], None]
"""Called now and then with the indexed share of a corpus, 0 to 1. An exception ends the build."""


def _silent(_: float) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Hit:
    """`document` is JSON, `{"id": ..., "contents": ...}`; `score` is BM25 of title and text."""

    document: bytes
    score: float


def find_corpus(path: Path | None) -> Corpus:
    """The corpus of a JSONL file; None: the Wikipedia leads."""
    return WikipediaLeads() if path is None else JsonlCorpus(path)


def index_of(path: Path | None, progress: OnProgress = _silent) -> Path:
    """The index folder of a corpus: `path` if it is one, else in the cache, rebuilt if outdated.

    Raises SearchUnavailable.
    """
    if path is not None and path.is_dir():
        read_index_manifest(path)
        return path.resolve()
    target = default_folder(path)
    build_index(find_corpus(path), target, progress)
    return target


def default_folder(path: Path | None) -> Path:
    """The place of a corpus' index in the cache: a new index of a file replaces the old one."""
    if path is None:
        return cache_dir() / "search" / "wikipedia-leads"
    return (
        cache_dir()
        / "search"
        / f"{path.stem}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    )


def build_index(corpus: Corpus, folder: Path, progress: OnProgress = _silent) -> bool:
    """Makes `folder` the index of `corpus`. Returns whether it was built.

    Raises SearchUnavailable.
    """
    origin = corpus.fingerprint()
    if folder.resolve() == Path.cwd():
        raise SearchUnavailable(
            f"{folder} is the working folder, which an index would replace; choose another place"
        )
    if (
        folder.exists()
        and not (folder / MANIFEST).is_file()
        and (not folder.is_dir() or any(folder.iterdir()))
    ):
        raise SearchUnavailable(
            f"{folder} is there and is not a search index; choose another place"
        )
    try:
        return build_folder(
            folder,
            is_good=lambda target: _is_of(target, origin),
            write=lambda target: _write(corpus, origin, target, progress),
            while_waiting=lambda: progress(0.0),
        )
    except (OSError, ValueError) as error:  # tantivy only says that a worker failed
        raise SearchUnavailable(
            f"{folder}: the index cannot be written ({error}); free disk space, or set "
            "TURNTRACE_CACHE to a folder that can be written"
        ) from error


def read_index_manifest(folder: Path) -> dict[str, Any]:
    """An index's format, origin, name, license, documents. Raises SearchUnavailable."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise SearchUnavailable(
            f"{folder} is not a search index; make one with `turntrace index CORPUS --out {folder}`"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("format") != _format():
        raise SearchUnavailable(
            f"{folder} was made by another version; "
            f"make it again with `turntrace index CORPUS --out {folder}`"
        )
    return manifest


def staleness(folder: Path) -> str | None:
    """Why an index is outdated; None if it is up to date, or if its file is gone."""
    origin = read_index_manifest(folder)["origin"]
    path = Path(origin.get("path", ""))
    if not path.is_file() or JsonlCorpus(path).fingerprint() == origin:
        return None
    again = f"turntrace index {path} --out {folder}"
    return f"{path} has changed since {folder} was made of it; run `{again}`"


class SearchIndex:
    """An open index; several threads may query it. Raises SearchUnavailable if it cannot open."""

    def __init__(self, folder: Path) -> None:
        self.manifest = read_index_manifest(folder)
        try:
            index = tantivy.Index.open(str(folder))
            index.config_reader("manual", 0)  # the served index stays the one that was opened
            self._searcher = index.searcher()
        except (OSError, ValueError) as error:
            raise SearchUnavailable(
                f"{folder} cannot be opened: {error}; make it again with `turntrace index`"
            ) from error
        self._analyzer = _analyzer()
        self._schema = index.schema

    def search(self, query: str, topk: int) -> list[Hit]:
        """The `topk` best documents, the best first; none if no word of the query is known.

        A word in most documents says little (Robertson's idf is negative from half of them on) and
        costs most of the time: such words are looked up only if the others find too few documents.
        """
        terms = self._terms(query)
        telling = [
            term
            for term in terms
            if 2 * self._searcher.doc_freq("text", term) <= self._searcher.num_docs
        ]
        found = self._search(telling, topk)
        return (
            self._search(terms, topk) if len(found) < topk and len(telling) < len(terms) else found
        )

    def _search(self, terms: list[str], topk: int) -> list[Hit]:
        lookups = [
            tantivy.Query.term_query(self._schema, field, term, "freq")
            for term in terms
            for field in FIELDS
        ]
        asked = tantivy.Query.boolean_query([(tantivy.Occur.Should, lookup) for lookup in lookups])
        found = self._searcher.search(asked, topk, count=False).hits
        return [
            Hit(bytes(self._searcher.doc(address)["document"][0]), score)
            for score, address in found
        ]

    def _terms(self, query: str) -> list[str]:
        text = query[:MAX_QUERY_CHARS].encode("utf-8", errors="replace").decode()
        return list(dict.fromkeys(self._analyzer.analyze(text)))[:MAX_QUERY_TERMS]


def _write(corpus: Corpus, origin: dict[str, Any], folder: Path, progress: OnProgress) -> None:
    folder.mkdir()
    index = tantivy.Index(_schema(), str(folder))
    index.register_tokenizer(ANALYZER, _analyzer())
    # One thread: the same corpus makes the same index, ties between documents included.
    writer = index.writer(_HEAP_BYTES, 1)
    try:
        count = _add_all(writer, corpus, progress)
        writer.commit()
    except BaseException:
        with contextlib.suppress(ValueError):  # the writer itself failed
            writer.rollback()  # its thread stops writing: the folder can be removed
        raise
    writer.wait_merging_threads()
    manifest = {
        "format": _format(),
        "origin": origin,
        "name": corpus.name,
        "license": corpus.license,
        "documents": count,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def _add_all(writer: tantivy.IndexWriter, corpus: Corpus, progress: OnProgress) -> int:
    count = 0
    for count, (document, done) in enumerate(corpus.documents(), 1):
        fields = {"title": document.title, "text": document.text, "document": document.to_json()}
        writer.add_document(tantivy.Document(**fields))
        if count % _PROGRESS_EVERY == 0:
            progress(done)
    if not count:
        raise SearchUnavailable(f"{corpus.name} holds no document")
    return count


def _is_of(folder: Path, origin: dict[str, Any]) -> bool:
    try:
        return bool(read_index_manifest(folder)["origin"] == origin)
    except SearchUnavailable:
        return False


def _schema() -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    for field in FIELDS:
        builder.add_text_field(field, tokenizer_name=ANALYZER, index_option="freq")
    builder.add_bytes_field("document", stored=True)
    return builder.build()


def _analyzer() -> tantivy.TextAnalyzer:
    builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
    for step in (
        tantivy.Filter.remove_long(64),
        tantivy.Filter.lowercase(),
        tantivy.Filter.ascii_fold(),
        tantivy.Filter.stemmer("english"),
    ):
        builder = builder.filter(step)
    return builder.build()


def _format() -> str:
    return f"{_FORMAT}, tantivy {importlib.metadata.version('tantivy')}"
