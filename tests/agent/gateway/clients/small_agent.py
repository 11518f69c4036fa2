"""A small agent program with nothing but the standard library: does what its words say."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

PROMPT = sys.argv[1]


def ask(text: str) -> str:
    body = json.dumps({"messages": [{"role": "user", "content": text}]}).encode()
    url = f"{os.environ['OPENAI_BASE_URL']}/chat/completions"
    key = {"authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"}
    with urllib.request.urlopen(urllib.request.Request(url, body, key)) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def reaches(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


what, _, rest = PROMPT.partition(":")
if what == "silent":
    sys.exit(3)
print(ask(f"say {rest}"))
if what == "files":
    print("left", os.listdir())
    os.makedirs("deep/er")
    with open("deep/er/note.txt", "w") as file:
        file.write(rest)
    with open("big", "wb") as file:
        file.truncate(17 << 20)
    os.symlink("/etc/passwd", "link")
if what == "leaves":
    os.mkfifo("pipe")
    subprocess.Popen(["sleep", "20"], start_new_session=True)
if what == "hang":
    subprocess.Popen(["sleep", "1000"])
    time.sleep(1000)
if what == "noisy":
    sys.stdout.write("x" * (3 << 20))
    print("end")
    sys.exit(7)
if what == "look":
    port = int(rest)
    found = {
        "gateway": reaches("127.0.0.1", int(os.environ["OPENAI_BASE_URL"].split(":")[2][:-3])),
        "other port": reaches("127.0.0.1", port),
        "home": os.path.exists(os.path.expanduser("~root/.bashrc")),
        "secret": os.environ.get("A_SECRET"),
        "work": os.getcwd(),
    }
    with open("found.json", "w") as file:
        json.dump(found, file)
