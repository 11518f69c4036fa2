"""CPU of reading a hermes turn, beside that of an earlier commit: the two in turn, in one run.

    git worktree add /tmp/before COMMIT
    python -m tests.bench.turn_reading /tmp/before

`parse` is the parser alone, `read` all that the loop does to read a turn. Microseconds, the least
of three rounds. Each side runs in a process of its own, in its own tree, on this Python.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers import ROOT

CHILD = '''
import json, time
from transformers import AutoTokenizer
from agent.model.base import base_model_dir
from conversations.template import ChatTemplate
try:
    from conversations.formats import hermes
except ImportError:  # before there were other formats
    from conversations import hermes

schema = {"name": "calc", "description": "d", "parameters": {"type": "object", "properties": {}}}
tools, user = [{"type": "function", "function": schema}], {"role": "user", "content": "x"}
template = ChatTemplate(AutoTokenizer.from_pretrained(base_model_dir()))
if hasattr(template, "read"):
    read = lambda raw: template.read(raw, tools, after=user)
else:
    read = lambda raw: hermes.parse(raw, in_think=template.opens_think)
call = """Let me compute this step by step, first the sum of both.
<tool_call>
{"name": "calc", "arguments": {"expression": "12 * (3 + 4) - 5", "precision": 2}}
</tool_call>"""
text = "The answer is 79, as computed above. " * 6

def us(function, raw):
    best = 1.0
    for _ in range(7):
        started = time.process_time()
        for _ in range(4000):
            function(raw)
        best = min(best, (time.process_time() - started) / 4000)
    return best * 1e6

sides = {"parse": hermes.parse, "read": read}
turns = {"call": call, "text": text}
print(json.dumps({f"{a} {b}": us(f, raw) for a, f in sides.items() for b, raw in turns.items()}))
'''


def measured(tree: Path) -> dict[str, float]:
    """Microseconds by what is read, in a tree."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        cwd=tree,
        env={"PYTHONPATH": str(tree), "PATH": "/usr/bin:/bin", "HOME": str(Path.home())},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    before = Path(sys.argv[1]).resolve()
    rounds = [(measured(before), measured(ROOT)) for _ in range(3)]
    print(f"{'':12}{'before us':>10}{'now us':>10}")
    for name in rounds[0][0]:
        old, new = (min(each[side][name] for each in rounds) for side in (0, 1))
        print(f"{name:12}{old:10.2f}{new:10.2f}")


if __name__ == "__main__":
    main()
