"""GSM8K's worked answers as programs: each `<<48/2=24>>` of the text becomes a line, and the
program must print the answer.

Rows whose annotations make no such program, or one with numbers that no text names, are left out. A
problem can also be written again with other numbers, in the story and in the program alike.
"""

from __future__ import annotations

import ast
import keyword
import re
from fractions import Fraction
from random import Random

from agent.recipe.programs import (
    CALLS,
    Problem,
    Step,
    check_arithmetic,
    exact_value,
    number_text,
    prints,
)

_ANNOTATION = re.compile(r"<<([^<>=]*)=([^<>]*)>>([^<\n]*)")
_WORD = re.compile(r"[A-Za-z]+")
_STOPWORDS = frozenset([
    "a", "an", "the", "of", "to", "in", "on", "at", "for", "is", "are", "was", "were", "be",
    "been", "and", "or", "so", "then", "this", "that", "it", "he", "she", "they", "her", "his",
    "their", "has", "have", "had", "by", "per", "each", "with", "from", "if", "will", "as",
    "do", "does", "did", "can", "would", "now", "not", "one", "you", "which", "who", "we", "i",
    "there",
])  # fmt: skip
_NUMBER = re.compile(r"(?<![\w.,])\d+(?:,\d{3})*(?:\.\d+)?(?!\w|\.\d|,\d)")
_FINAL = re.compile(r"####\s*(-?[\d,]+(?:\.\d+)?)\s*$")


def from_gsm8k(question: str, answer: str) -> Problem | None:
    """A GSM8K row as a problem.

    None if its annotations do not make a program that prints its answer.
    """
    final = _FINAL.search(answer)
    steps = _steps(answer, set(_numbers(question)))
    wanted = number_text(final.group(1)) if final else None
    if not steps or wanted is None:
        return None
    problem = Problem(question.strip(), tuple(steps), wanted, "gsm8k")
    return problem if not _unexplained(problem) and prints(problem.code, wanted) else None


def _numbers(text: str) -> list[float]:
    """The numbers of a text, `20,000` as 20000."""
    return [float(number.replace(",", "")) for number in _NUMBER.findall(text)]


_UNITS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
]  # fmt: skip
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety hundred".split()  # noqa: SIM905
_WORDS = (
    dict(zip(_UNITS, range(20), strict=True))
    | dict(zip(_TENS, range(20, 110, 10), strict=True))
    | {"thousand": 1000}
)

_FACTS = frozenset({0, 1, 2, 7, 12, 24, 30, 52, 60, 100, 365, 1000})
"""Numbers that are likely a fact (days of a week, minutes of an hour), not a quantity of the story.
"""

_SMALL = frozenset({3, 4, 5, 6, 8, 10, 16, 36, 0.1, 0.2, 0.25, 0.5, 0.75, 1.5, 3600, 5280})
"""Numbers a story tells in other words: three, half, feet in a yard."""


def _unexplained(problem: Problem) -> set[float]:
    """Numbers of the program that no text names: worked out in the head, or brought along by a step
    that was not annotated.
    """
    named = set(_numbers(problem.question)) | {
        _WORDS[word] for word in _WORD.findall(problem.question.lower()) if word in _WORDS
    }
    percent = {
        round(value, 6)
        for n in named
        for value in (n / 100, 1 + n / 100, 1 - n / 100, 100 - n, 100 + n)
    }
    used = {n for step in problem.steps for n in _numbers(step.expression)}
    return used - named - percent - _FACTS - _SMALL


def _steps(answer: str, named: set[float]) -> list[Step]:
    """The annotations as steps.

    `named` are the numbers in the question. Empty if one is not arithmetic.
    """
    steps: list[Step] = []
    shown = ""
    values: dict[str, float] = {}
    for match in _ANNOTATION.finditer(answer):
        names = {v: n for n, v in values.items() if v not in named}
        # A number that the question and the step just before both gave is that step's, if the line
        # names it once.
        if (
            steps
            and len(re.findall(rf"(?<![\d.]){re.escape(shown)}(?![\d.])", match.group(1))) == 1
        ):
            names[values[steps[-1].name]] = steps[-1].name
        expression = _expression(match.group(1), names, values)
        value = number_text(match.group(2))
        if expression is None or value is None:
            return []
        if re.fullmatch(r"[\w.]+", expression):
            continue  # `<<5=5>>` says nothing
        line = answer[answer.rfind("\n", 0, match.start()) + 1 : match.start()]
        name = _fresh(_name(match.group(3), line), values)
        steps.append(Step(name, expression))
        values[name], shown = float(value), value
    return steps


def _expression(text: str, names: dict[float, str], values: dict[str, float]) -> str | None:
    """The annotation's left side as Python, earlier results by name.

    None if it is no arithmetic.
    """
    text = text.replace(",", "").replace("$", "").replace("x", "*").strip()
    text = re.sub(r"(\d+(?:\.\d+)?)%", r"\1/100", text)
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)
    try:
        tree = ast.parse(text, mode="eval").body
        check_arithmetic(tree)
        return ast.unparse(_Tidy(names, values).visit(tree))
    except (SyntaxError, ValueError):
        return None


class _Tidy(ast.NodeTransformer):
    """Puts names where a number is an earlier result, and `//` where a division is exact."""

    def __init__(self, names: dict[float, str], values: dict[str, float]) -> None:
        self.names = names
        self.values = values

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if not isinstance(node.value, int | float):
            raise ValueError("not a number")
        name = self.names.get(float(node.value))
        return ast.Name(name, ast.Load()) if name else node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.op, ast.Div) and self._exact(node):
            node.op = ast.FloorDiv()
        return node

    def _exact(self, node: ast.BinOp) -> bool:
        try:
            left, right = (exact_value(side, self.values) for side in (node.left, node.right))
            return (
                right != 0
                and left.denominator == right.denominator == (left / right).denominator == 1
            )
        except ValueError:
            return False


def _name(after: str, before: str) -> str:
    """A variable name from the words after the result ("24 clips in May" is clips_in_may), else
    from those before.
    """
    sentence = re.split(r"[.,;:!?()=+*/]|\s-\s", re.sub(r"^\W*[\d,.]*\d%?", "", after))[0]
    words = [word.lower() for word in _WORD.findall(sentence.replace("'s", ""))]
    words = _trim(_trim(words)[:4])
    if not words:
        words = _trim(
            [word.lower() for word in _WORD.findall(re.split(r"\d", before.replace("'s", ""))[0])][
                -4:
            ]
        )
    name = "_".join(words)
    return name if name and not keyword.iskeyword(name) and name not in CALLS else "result"


def _trim(words: list[str]) -> list[str]:
    while words and words[0] in _STOPWORDS:
        words = words[1:]
    while words and words[-1] in _STOPWORDS:
        words = words[:-1]
    return words


def _fresh(name: str, taken: dict[str, float]) -> str:
    if name not in taken:
        return name
    return next(f"{name}_{i}" for i in range(2, 99) if f"{name}_{i}" not in taken)


# ------------------------------------------------------------------ the same problem with other
# numbers


def with_other_numbers(problem: Problem, rng: Random, tries: int = 40) -> Problem | None:
    """The problem with the whole numbers of its story redrawn, in the question and in the program
    alike.

    What was whole stays whole and what was positive stays positive, in every step. None if no
    draw does that.
    """
    used = {n for step in problem.steps for n in _numbers(step.expression)}
    named = _numbers(problem.question)
    free = sorted(
        {
            int(n)
            for n in named
            if n in used and n == int(n) and n not in _FACTS and n < 1e7 and named.count(n) <= 2
        }
    )
    if not free or used - set(named) - _FACTS - _SMALL:
        return None  # nothing to redraw, or a number that would go stale
    before = _values(problem.steps)
    for _ in range(tries):
        mapping = {n: _redraw(n, rng) for n in free}
        steps = tuple(Step(step.name, _replace(step.expression, mapping)) for step in problem.steps)
        after = _values(steps)
        if before and after and all(_alike(a, b) for a, b in zip(before, after, strict=True)):
            answer = number_text(str(float(after[-1])))
            changed = Problem(
                _replace(problem.question, mapping),
                steps,
                answer or "",
                problem.source + "+numbers",
            )
            if answer and answer != problem.answer and prints(changed.code, answer):
                return changed
    return None


def _redraw(n: int, rng: Random) -> int:
    unit = (
        next(unit for unit in (1000, 100, 50, 10, 5, 1) if n % unit == 0 and n > unit)
        if n > 1
        else 1
    )
    low, high = max(1, n // (2 * unit)), max(3, 2 * n // unit)
    return unit * rng.randint(low, high)


def _replace(text: str, mapping: dict[int, int]) -> str:
    def one(match: re.Match[str]) -> str:
        number = match.group().replace(",", "")
        if "." in number or int(number) not in mapping:
            return match.group()
        value = mapping[int(number)]
        return f"{value:,}" if "," in match.group() else str(value)

    return _NUMBER.sub(one, text)


def _values(steps: tuple[Step, ...]) -> list[Fraction]:
    """Each step's exact value, [] if one cannot be known."""
    values: dict[str, float] = {}
    exact: list[Fraction] = []
    try:
        for step in steps:
            tree = ast.parse(step.expression.replace("//", "/"), mode="eval").body
            exact.append(exact_value(tree, values))
            values[step.name] = float(exact[-1])
    except (ValueError, OverflowError):
        return []
    return exact


def _alike(before: Fraction, after: Fraction) -> bool:
    whole = before.denominator == 1
    return (
        (after.denominator == 1) == whole
        and (after > 0) == (before > 0)
        and (whole or (after * 1000).denominator == 1)
    )
