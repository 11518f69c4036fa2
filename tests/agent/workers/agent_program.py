"""An agent program for runs with workers: asks for a turn, then does what its words say.

`kill:NOTE` ends its worker's process, and `linger:NOTE` stays until it is ended itself; both end at
once if their note is there already.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

what, _, rest = sys.argv[1].partition(":")
body = json.dumps({"messages": [{"role": "user", "content": sys.argv[1]}]}).encode()
url = f"{os.environ['OPENAI_BASE_URL']}/chat/completions"
key = {"authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"}
with urllib.request.urlopen(urllib.request.Request(url, body, key)) as answer:
    print(json.load(answer)["choices"][0]["finish_reason"])
Path("deep").mkdir()
Path("deep/note.txt").write_text(rest)
if what in ("kill", "linger") and not Path(rest).exists():
    if what == "linger":
        child = subprocess.Popen(["sleep", "1000"])
        Path(rest).write_text(f"{os.getpid()} {child.pid}")
        time.sleep(1000)
    while not list(Path(rest).parent.glob("linger*")):
        time.sleep(0.02)
    Path(rest).touch()
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1000)
