"""What is proven of each chat template that packages ship: `python -m tests.formats_matrix`.

Prints the table of conversations/formats/README.md; `--write` puts it there.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from conversations.errors import ConversationsError
from conversations.template import ChatTemplate
from conversations.tokens import TOOL, USER
from tests.conversations.shipped_templates import NPM, npm_template, trl_names, trl_template

README = Path(__file__).parent.parent / "conversations" / "formats" / "README.md"
BEGIN, END = "<!-- matrix -->", "<!-- end of matrix -->"
_HEAD = ("template", "call format", "tool turns", "user turns", "reason")


def main() -> None:
    """Prints the matrix, or writes it."""
    table = "\n".join(lines())
    if "--write" not in sys.argv:
        print(table)
        return
    text = README.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    README.write_text(f"{head}{BEGIN}\n{table}\n{END}{tail}", encoding="utf-8")


def lines() -> Iterator[str]:
    """The rows of the table, in Markdown."""
    yield f"| {' | '.join(_HEAD)} |"
    yield "|---" * len(_HEAD) + "|"
    for name in trl_names():
        yield _row(f"trl {name}", trl_template, name)
    for name in NPM:
        yield _row(f"npm {name}", npm_template, name)


def _row(title: str, load: Callable[[str], ChatTemplate], name: str) -> str:
    try:
        template = load(name)
    except ConversationsError as error:
        return _cells(title, "", "no", "no", _without_name(str(error)))
    tool, user = _problem(template, TOOL), _problem(template, USER)
    report = template.format_report()
    form = f"{report.name}, {report.how}" if report.is_proven else "none"
    reasons = dict.fromkeys(reason for reason in (report.problem, tool, user) if reason)
    marks = ("no" if problem else "proven" for problem in (tool, user))
    return _cells(title, form, *marks, _without_name("; ".join(reasons)))


def _without_name(reason: str) -> str:
    """The reason without the template's own name, which for npm is a path."""
    reason = re.sub(r"\S*/models: ", "", reason)
    return re.sub(r"(the chat template of )?\S*(/models|trl:\w+):? ?", "it ", reason)


def _problem(template: ChatTemplate, kind: str) -> str:
    try:
        template.require(kind, with_tools=kind == TOOL)
    except ConversationsError as error:
        return str(error)
    return ""


def _cells(*cells: str) -> str:
    shown = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(shown)} |"


if __name__ == "__main__":
    main()
