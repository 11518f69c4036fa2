"""Small arithmetic programs, really run.

A program is plain text, a few lines `name = expression` and a last `print(name)`. What it prints
and what it raises are never guessed: `run` executes it. Only arithmetic can be executed
(`check_arithmetic`), so a data file cannot make this process do anything else.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import io
import sys
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path

SCRIPT_NAME = "main.py"
"""The file name that tracebacks show."""

CALLS = frozenset({"abs", "float", "int", "max", "min", "print", "round", "sum"})
"""The functions that a program may call."""

_NODES = (
    ast.Module, ast.Assign, ast.AugAssign, ast.Expr, ast.Call, ast.Name, ast.Constant,
    ast.BinOp, ast.UnaryOp, ast.Load, ast.Store, ast.Add, ast.Sub, ast.Mult, ast.Div,
    ast.FloorDiv, ast.Mod, ast.Pow, ast.USub, ast.UAdd, ast.List, ast.Tuple,
)  # fmt: skip
_MAX_EXPONENT = 64


@dataclass(frozen=True, slots=True)
class Execution:
    """What a program printed, and the traceback text it ended with (None if it ended well)."""

    stdout: str
    error: str | None


def run_arithmetic(code: str) -> Execution:
    """Executes an arithmetic program in this process.

    Raises ValueError if it is anything but arithmetic.
    """
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
    """What the interpreter itself prints for a program that fails: run again from a file, whose
    lines it shows.
    """
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
    """Raises ValueError on any node that is not assignment, arithmetic on numbers, or one of a few
    pure calls.

    A name that no one defined may be called: that raises NameError, as it should.
    """
    for node in ast.walk(tree):
        if not isinstance(node, _NODES):
            raise ValueError(f"not arithmetic: {type(node).__name__}")
        if (
            isinstance(node, ast.Name)
            and node.id not in CALLS
            and (hasattr(builtins, node.id) or node.id.startswith("__"))
        ):
            raise ValueError(f"not arithmetic: {node.id}")
        if isinstance(node, ast.Call) and (node.keywords or not isinstance(node.func, ast.Name)):
            raise ValueError("not arithmetic: a call of more than a number function")
        if (
            isinstance(node, ast.BinOp)
            and isinstance(node.op, ast.Pow)
            and not _small_exponent(node.right)
        ):
            raise ValueError("not arithmetic: an exponent that is not a small number")


def _small_exponent(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Constant)
        and isinstance(node.value, int | float)
        and abs(node.value) <= _MAX_EXPONENT
    )


def number_text(text: str) -> str | None:
    """A number as an answer is written ("72.0" and "72" are "72", "0.30000000000000004" is "0.3").

    None if it is none.
    """
    try:
        value = float(text.replace(",", "").strip())
    except ValueError:
        return None
    if value != value or abs(value) > 1e15:
        return None
    rounded = round(value, 6)
    return str(int(rounded)) if rounded == int(rounded) else repr(rounded)


def prints(code: str, answer: str) -> bool:
    """True if the program runs and its whole output is the number `answer`."""
    try:
        done = run_arithmetic(code)
    except ValueError:
        return False
    wanted = number_text(answer)
    return done.error is None and wanted is not None and number_text(done.stdout) == wanted


# ------------------------------------------------------------------ a problem and its program


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
        return "\n".join(
            [
                *(f"{step.name} = {step.expression}" for step in self.steps),
                f"print({self.steps[-1].name})",
            ]
        )


def exact_value(node: ast.AST, values: dict[str, float]) -> Fraction:
    """The exact value of an expression tree of + - * / // and names."""
    match node:
        case ast.Constant(value=value) if isinstance(value, int | float):
            return Fraction(str(value))
        case ast.Name(id=name) if name in values:
            return Fraction(str(values[name]))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -exact_value(operand, values)
        case ast.BinOp(left=left, op=op, right=right):
            return _apply(op, exact_value(left, values), exact_value(right, values))
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
