"""Problems of reasoning-gym's `gsm_symbolic`, each with a program that prints its answer.

The generators compute their answer in a nested function, `generate_from_variables(...)`. Its own
statements are the program: the story's numbers it uses, then the steps the answer depends on. What
they evaluated to is read off the running function, and every program is executed before it is kept,
so a generator that changes costs examples, never correctness.
"""

from __future__ import annotations

import ast
import copy
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

from agent.recipe.programs import Problem, Step, check_arithmetic, prints

HELD_OUT_SEEDS = range(1_000_000)
"""`gsm_symbolic` seeds that are never trained on; evaluation draws from them."""

FIRST_TRAINING_SEED = 1_000_000_000

_INNER = "generate_from_variables"

_WRITTEN_OUT = {
    "generate_66": "other_minutes = (2 * hour1 + hour2 + 2 * hour3) * 60 + min2\n"
    "num_wed_episodes = round((total_hours * 60 - other_minutes) / min1)",
}
"""Steps of a generator that draws its answer first and never computes it."""


@dataclass(frozen=True, slots=True)
class _Derivation:
    """How one generator computes: its arguments, its assignments in order, and the expression of
    its answer.
    """

    arguments: frozenset[str]
    assignments: tuple[tuple[str, ast.expr], ...]
    answer: ast.expr


def drawn(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """`count` of the dataset's own rows, drawn from `seed` on: `question`, `answer` and more."""
    from reasoning_gym import create_dataset

    dataset = create_dataset("gsm_symbolic", size=count, seed=seed)
    return (dataset[index] for index in range(count))


def problems(count: int, seed: int = FIRST_TRAINING_SEED) -> Iterator[Problem]:
    """`count` problems drawn from `seed` on.

    Those without a program that prints the answer are left out.
    """
    from reasoning_gym import create_dataset

    dataset = create_dataset("gsm_symbolic", size=count, seed=seed)
    generators = dataset.generators
    for index in range(count):
        with _Watch() as watch:
            row = dataset[index]
        problem = _problem(generators[dataset.task_indices[index]], row, watch.seen)
        if problem is not None:
            yield problem


class _Watch:
    """Keeps the local variables of the generator's nested function at its return."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def __enter__(self) -> _Watch:
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _event(self, frame: Any, event: str, _: Any) -> None:
        if event == "return" and frame.f_code.co_name == _INNER:
            self.seen = dict(frame.f_locals)


def _problem(
    generator: Callable[..., Any], row: dict[str, Any], seen: dict[str, Any]
) -> Problem | None:
    question = row["question"]
    try:
        steps = _steps(_derivation(generator), seen, question)
    except ValueError:
        return None
    problem = Problem(question, tuple(steps), row["answer"], "gsm_symbolic")
    return problem if prints(problem.code, row["answer"]) else None


@cache
def _derivation(generator: Callable[..., Any]) -> _Derivation:
    tree = ast.parse(textwrap.dedent(inspect.getsource(generator)))
    inner = next(
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == _INNER
    )
    body = [*inner.body, *ast.parse(_WRITTEN_OUT.get(generator.__name__, "")).body]
    assignments = tuple(
        (node.targets[0].id, node.value)
        for node in body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    )
    arguments = frozenset(argument.arg for argument in inner.args.args)
    result = next(node.value for node in inner.body if isinstance(node, ast.Return))
    if not isinstance(result, ast.Dict):
        raise ValueError("the generator returns no dict")
    answer = next(
        value for key, value in zip(result.keys, result.values, strict=True) if _is(key, "answer")
    )
    return _Derivation(arguments, assignments, _bare(answer))


def _is(node: ast.expr | None, text: str) -> bool:
    return isinstance(node, ast.Constant) and node.value == text


def _bare(node: ast.expr) -> ast.expr:
    """The number under `format_number(...)`, `str(...)`, `float(...)` or an f-string."""
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("format_number", "str", "float")
    ):
        return _bare(node.args[0])
    if (
        isinstance(node, ast.JoinedStr)
        and len(node.values) == 1
        and isinstance(node.values[0], ast.FormattedValue)
    ):
        return _bare(node.values[0].value)
    return node


def _steps(derivation: _Derivation, seen: dict[str, Any], question: str) -> list[Step]:
    """The program's lines: story numbers first, then the steps the answer needs, in the generator's
    order.
    """
    needed = _names(derivation.answer)
    lines: list[Step] = []
    if not isinstance(derivation.answer, ast.Name):
        lines.append(Step("answer", ast.unparse(derivation.answer)))
    for name, assigned in reversed(derivation.assignments):
        value = _Plain(seen).visit(copy.deepcopy(assigned))
        inputs = _names(value)
        if (
            name not in needed
            or name in inputs
            or _hidden(name, inputs & derivation.arguments, seen, question)
        ):
            continue  # not used, or a story number in another spelling
        needed = (needed - {name}) | inputs
        check_arithmetic(value)
        lines.insert(0, Step(name, ast.unparse(value)))
    order = [name for name in seen if name in needed]
    if len(order) != len(needed) or not lines:
        raise ValueError("no derivation of the answer from numbers of the story")
    return [*(Step(name, _told(seen[name], question)) for name in order), *lines]


def _hidden(name: str, arguments: set[str], seen: dict[str, Any], question: str) -> bool:
    """True if the question gives a step's result and not the numbers it was computed from."""
    untold = any(_literal(seen[argument], question) is None for argument in arguments)
    return untold and _literal(seen.get(name), question) is not None


def _names(node: ast.expr) -> set[str]:
    called = {
        call.func.id
        for call in ast.walk(node)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
    }
    return {item.id for item in ast.walk(node) if isinstance(item, ast.Name)} - called


class _Plain(ast.NodeTransformer):
    """`Fraction(a, b)` as a / b, `eval(x)` and `Fraction(x)` as x, and `a if ... else b` as what it
    was for this story.
    """

    def __init__(self, seen: dict[str, Any]) -> None:
        self.seen = seen

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id in ("Fraction", "eval"):
            return (
                ast.BinOp(node.args[0], ast.Div(), node.args[1])
                if len(node.args) == 2
                else node.args[0]
            )
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        chosen: ast.expr = (
            node.body
            if eval(ast.unparse(node.test), {"__builtins__": {}}, self.seen)
            else node.orelse
        )
        simpler: ast.expr = self.visit(chosen)
        return simpler


_WORDS = {0.5: "half", 2: "twice", 3: "three", 4: "four", 5: "five", 1: "one", 0.25: "quarter"}
_RATIO = re.compile(r"\d+/\d+")


def _told(value: Any, question: str) -> str:
    """The literal of a number the question tells.

    Raises ValueError if it does not, or if it is not a number.
    """
    literal = _literal(value, question)
    if literal is None:
        raise ValueError(f"{value!r} is not in the question")
    return literal


def _literal(value: Any, question: str) -> str | None:
    if isinstance(value, Fraction):
        return f"{value.numerator} / {value.denominator}"
    if isinstance(value, str):
        return value.replace("/", " / ") if _RATIO.fullmatch(value) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    text = repr(int(value)) if value == int(value) else repr(value)
    rounded = repr(round(value, 6))
    forms = {text, rounded, f"{value:,}", f"{value:.2f}", f"{value:.0%}"}
    if any(re.search(rf"(?<![\d.]){re.escape(form)}(?!\d)", question) for form in forms):
        return text if text in question else rounded if value != int(value) else text
    return text if _WORDS.get(value, "\0") in question else None
