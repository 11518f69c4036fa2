"""mathruler's grading in a process of its own that may be killed: sympy can take forever over a line that a model wrote.

A request is one line of JSON, `[answer, ground_truth]`; the answer is `true` or `false`. A line over the time limit is
not answered: the kernel's timer ends the process, whatever it is busy with. It ends when its stdin does.

sympy *evaluates* what it parses, and mathruler's check lets through whatever has two letters; letters of other alphabets
that Python takes for latin ones count as none, so that attributes, and by them anything, can be reached. Answers that
hold an attribute, a string, a comment or a backslash when they get that far are compared as text alone.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys

GRADE_S = 2.0
"""CPU time for one answer, so that a busy machine is nobody's fault; those of the geo3k dataset take milliseconds."""
MEMORY_BYTES = 2 << 30

_NO_EXPRESSION = re.compile(r"""['"`#\\@\n]|__|\.\s*[^\W\d]""")


def grade(answer: str, ground_truth: str) -> bool:
    """Whether an answer is right, as `mathruler.grader.grade_answer` has it; what it chokes on is wrong."""
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
    """Answers the lines of stdin until it ends. The first line written says that it is ready."""
    grade("1", "2")  # what is imported for it takes a second: now, not at the first request

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, GRADE_S)
        answer = json.dumps(grade(*json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
