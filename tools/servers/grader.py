"""mathruler's grading in a process of its own: sympy may never finish what a model wrote.

A request is one line of JSON, `[answer, ground_truth]`; the answer is `true` or `false`. If a line
takes too long, the kernel's timer ends the process. The process also ends when its stdin does.

sympy *evaluates* what it parses. mathruler refuses expressions with more than two letters, but does
not count letters of other alphabets that Python reads as latin ones, so that attributes, and with
them any code, could be reached. So answers that still hold an attribute, a string, a comment or a
backslash at that point are compared as text only.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys

GRADE_S = 2.0
"""CPU time for one answer, whatever else the machine does. The geo3k dataset needs milliseconds."""
MEMORY_BYTES = 2 << 30

_NO_EXPRESSION = re.compile(r"""['"`#\\@\n]|__|\.\s*[^\W\d]""")


def grade_expression(answer: str, ground_truth: str) -> bool:
    """`mathruler.grader.grade_answer`; an answer over which it raises is wrong."""
    try:
        return _grade(answer, ground_truth)
    except Exception:
        return False


def _grade(answer: str, ground_truth: str) -> bool:
    from mathruler import grader, math_normalize  # type: ignore[import-untyped]

    read = [grader._normalize(answer), grader._normalize(ground_truth)]
    if any(_NO_EXPRESSION.search(text) for text in read):
        return bool(
            read[0] == read[1]
            or math_normalize.normalize_answer(answer)
            == math_normalize.normalize_answer(ground_truth)
        )
    return bool(grader.grade_answer(answer, ground_truth))


def main() -> None:
    """Answers the lines of stdin until it ends. Writes a first line when it is ready."""
    grade_expression("1", "2")  # its imports take a second: now, not at the first request

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, GRADE_S)
        answer = json.dumps(grade_expression(*json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
