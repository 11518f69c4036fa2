"""Small arithmetic programs: really run, and made from the worked answers of GSM8K.

A program is plain text, a few lines `name = expression` and a last `print(name)`. What it prints and what it raises are
never guessed: `run` executes it. Only arithmetic can be executed (`check_arithmetic`), so a data file cannot make this
process do anything else.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import io
import keyword
import re
import sys
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from random import Random

SCRIPT_NAME = "main.py"
"""The file name that tracebacks show."""

_CALLS = frozenset({"abs", "float", "int", "max", "min", "print", "round", "sum"})
_NODES = (
    ast.Module, ast.Assign, ast.AugAssign, ast.Expr, ast.Call, ast.Name, ast.Constant, ast.BinOp, ast.UnaryOp, ast.Load, ast.Store,
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.USub, ast.UAdd, ast.List, ast.Tuple,
)  # fmt: skip
_MAX_EXPONENT = 64
_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Execution:
    """What a program printed, and the traceback text it ended with (None where it ended well)."""

    stdout: str
    error: str | None


def run(code: str) -> Execution:
    """Executes an arithmetic program in this process. Raises ValueError where it is anything but arithmetic."""
    stdout = io.StringIO()
    try:
        tree = ast.parse(code)
        check_arithmetic(tree)
        with contextlib.redirect_stdout(stdout):
            exec(compile(tree, SCRIPT_NAME, "exec"), {"__name__": "__main__"})
        failed = False
    except (ArithmeticError, MemoryError, NameError, SyntaxError, TypeError):
        failed = True
    return Execution(stdout.getvalue(), _error(code) if failed else None)


def _error(code: str) -> str:
    """What the interpreter itself prints for a program that fails: run again from a file, whose lines it shows."""
    path = Path(_folder().name, SCRIPT_NAME)
    path.write_text(code, encoding="utf-8")
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, str(path), "exec"), {"__name__": "__main__"})
    except Exception as error:
        below = error.__traceback__.tb_next if error.__traceback__ else None  # without this frame
        with contextlib.redirect_stderr(stderr):
            sys.__excepthook__(type(error), error.with_traceback(below), below)
    return stderr.getvalue().replace(str(path), path.name)


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Where a failing program stands, for as long as this process lives."""
    return tempfile.TemporaryDirectory(prefix="recipe-")


def check_arithmetic(tree: ast.AST) -> None:
    """Raises ValueError on any node that is not assignment, arithmetic on numbers, or one of a few pure calls.

    A name that no one defined may be called: that raises NameError, as it should.
    """
    for node in ast.walk(tree):
        if not isinstance(node, _NODES):
            raise ValueError(f"not arithmetic: {type(node).__name__}")
        if isinstance(node, ast.Name) and node.id not in _CALLS and (hasattr(builtins, node.id) or node.id.startswith("__")):
            raise ValueError(f"not arithmetic: {node.id}")
        if isinstance(node, ast.Call) and (node.keywords or not isinstance(node.func, ast.Name)):
            raise ValueError("not arithmetic: a call of more than a number function")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and not _small_exponent(node.right):
            raise ValueError("not arithmetic: an exponent that is not a small number")


def _small_exponent(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float) and abs(node.value) <= _MAX_EXPONENT


def number_text(text: str) -> str | None:
    """A number as an answer is written ("72.0" and "72" are "72", "0.30000000000000004" is "0.3"); None if it is none."""
    try:
        value = float(text.replace(",", "").strip())
    except ValueError:
        return None
    if value != value or abs(value) > 1e15:
        return None
    rounded = round(value, 6)
    return str(int(rounded)) if rounded == int(rounded) else repr(rounded)


def prints(code: str, answer: str) -> bool:
    """True where the program runs and its whole output is the number `answer`."""
    try:
        done = run(code)
    except ValueError:
        return False
    wanted = number_text(answer)
    return done.error is None and wanted is not None and number_text(done.stdout) == wanted


# ------------------------------------------------------------------ GSM8K's annotated answers


@dataclass(frozen=True, slots=True)
class Step:
    """One line of a program: `name = expression`."""

    name: str
    expression: str


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with a program that prints its answer. `source` names where it comes from."""

    question: str
    steps: tuple[Step, ...]
    answer: str
    source: str

    @property
    def code(self) -> str:
        """The program's text."""
        return "\n".join([*(f"{step.name} = {step.expression}" for step in self.steps), f"print({self.steps[-1].name})"])


_ANNOTATION = re.compile(r"<<([^<>=]*)=([^<>]*)>>([^<\n]*)")
_WORD = re.compile(r"[A-Za-z]+")
_STOPWORDS = frozenset(
    [
        "a",
        "an",
        "the",
        "of",
        "to",
        "in",
        "on",
        "at",
        "for",
        "is",
        "are",
        "was",
        "were",
        "be",
        "been",
        "and",
        "or",
        "so",
        "then",
        "this",
        "that",
        "it",
        "he",
        "she",
        "they",
        "her",
        "his",
        "their",
        "has",
        "have",
        "had",
        "by",
        "per",
        "each",
        "with",
        "from",
        "if",
        "will",
        "as",
        "do",
        "does",
        "did",
        "can",
        "would",
        "now",
        "not",
        "one",
        "you",
        "which",
        "who",
        "we",
        "i",
        "there",
    ]
)
_NUMBER = re.compile(r"(?<![\w.,])\d+(?:,\d{3})*(?:\.\d+)?(?!\w|\.\d|,\d)")
_FINAL = re.compile(r"####\s*(-?[\d,]+(?:\.\d+)?)\s*$")


def from_gsm8k(question: str, answer: str) -> Problem | None:
    """A GSM8K row as a problem; None where its annotations do not make a program that prints its answer."""
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
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety hundred".split()  # noqa: SIM905
_WORDS = dict(zip(_UNITS, range(20), strict=True)) | dict(zip(_TENS, range(20, 110, 10), strict=True)) | {"thousand": 1000}

_FACTS = frozenset({0, 1, 2, 7, 12, 24, 30, 52, 60, 100, 365, 1000})
"""Numbers that are likely a fact (days of a week, minutes of an hour), not a quantity of the story."""

_SMALL = frozenset({3, 4, 5, 6, 8, 10, 16, 36, 0.1, 0.2, 0.25, 0.5, 0.75, 1.5, 3600, 5280})
"""Numbers a story tells in other words: three, half, feet in a yard."""


def _unexplained(problem: Problem) -> set[float]:
    """Numbers of the program that no one told: worked out in the head, or brought along by a step that was not annotated."""
    told = set(_numbers(problem.question)) | {_WORDS[word] for word in _WORD.findall(problem.question.lower()) if word in _WORDS}
    percent = {round(value, 6) for n in told for value in (n / 100, 1 + n / 100, 1 - n / 100, 100 - n, 100 + n)}
    used = {n for step in problem.steps for n in _numbers(step.expression)}
    return used - told - percent - _FACTS - _SMALL


def _steps(answer: str, told: set[float]) -> list[Step]:
    """The annotations as steps; `told` are the numbers the question names. Empty where one is no arithmetic."""
    steps: list[Step] = []
    shown = ""
    values: dict[str, float] = {}
    for match in _ANNOTATION.finditer(answer):
        names = {v: n for n, v in values.items() if v not in told}
        # A number that the question and the step just before both gave is that step's, if the line names it once.
        if steps and len(re.findall(rf"(?<![\d.]){re.escape(shown)}(?![\d.])", match.group(1))) == 1:
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
    """The annotation's left side as Python, earlier results by name; None where it is no arithmetic."""
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
            left, right = (evaluate(side, self.values) for side in (node.left, node.right))
            return right != 0 and left.denominator == right.denominator == (left / right).denominator == 1
        except ValueError:
            return False


def evaluate(node: ast.AST, values: dict[str, float]) -> Fraction:
    """The exact value of an expression tree of + - * / // and names."""
    match node:
        case ast.Constant(value=value) if isinstance(value, int | float):
            return Fraction(str(value))
        case ast.Name(id=name) if name in values:
            return Fraction(str(values[name]))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -evaluate(operand, values)
        case ast.BinOp(left=left, op=op, right=right):
            return _apply(op, evaluate(left, values), evaluate(right, values))
    raise ValueError("not an exact expression")


def _apply(op: ast.operator, left: Fraction, right: Fraction) -> Fraction:
    match op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div() if right:
            return left / right
        case ast.FloorDiv() if right:
            return Fraction(left // right)
    raise ValueError("not an exact operation")


def _name(after: str, before: str) -> str:
    """A variable name from the words after the result ("24 clips in May" is clips_in_may), else from those before."""
    sentence = re.split(r"[.,;:!?()=+*/]|\s-\s", re.sub(r"^\W*[\d,.]*\d%?", "", after))[0]
    words = [word.lower() for word in _WORD.findall(sentence.replace("'s", ""))]
    words = _trim(_trim(words)[:4])
    if not words:
        words = _trim([word.lower() for word in _WORD.findall(re.split(r"\d", before.replace("'s", ""))[0])][-4:])
    name = "_".join(words)
    return name if name and not keyword.iskeyword(name) and name not in _CALLS else "result"


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


# ------------------------------------------------------------------ the same problem with other numbers


def with_other_numbers(problem: Problem, rng: Random, tries: int = 40) -> Problem | None:
    """The problem with the whole numbers of its story redrawn, in the question and in the program alike.

    What was whole stays whole and what was positive stays positive, in every step. None where no draw does that.
    """
    used = {n for step in problem.steps for n in _numbers(step.expression)}
    told = _numbers(problem.question)
    free = sorted({int(n) for n in told if n in used and n == int(n) and n not in _FACTS and n < 1e7 and told.count(n) <= 2})
    if not free or used - set(told) - _FACTS - _SMALL:
        return None  # nothing to redraw, or a number that would go stale
    before = _values(problem.steps)
    for _ in range(tries):
        mapping = {n: _redraw(n, rng) for n in free}
        steps = tuple(Step(step.name, _replace(step.expression, mapping)) for step in problem.steps)
        after = _values(steps)
        if before and after and all(_alike(a, b) for a, b in zip(before, after, strict=True)):
            answer = number_text(str(float(after[-1])))
            changed = Problem(_replace(problem.question, mapping), steps, answer or "", problem.source + "+numbers")
            if answer and answer != problem.answer and prints(changed.code, answer):
                return changed
    return None


def _redraw(n: int, rng: Random) -> int:
    unit = next(unit for unit in (1000, 100, 50, 10, 5, 1) if n % unit == 0 and n > unit) if n > 1 else 1
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
    """Each step's exact value, [] where one cannot be told."""
    values: dict[str, float] = {}
    exact: list[Fraction] = []
    try:
        for step in steps:
            tree = ast.parse(step.expression.replace("//", "/"), mode="eval").body
            exact.append(evaluate(tree, values))
            values[step.name] = float(exact[-1])
    except (ValueError, OverflowError):
        return []
    return exact


def _alike(before: Fraction, after: Fraction) -> bool:
    whole = before.denominator == 1
    return (after.denominator == 1) == whole and (after > 0) == (before > 0) and (whole or (after * 1000).denominator == 1)
