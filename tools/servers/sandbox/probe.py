"""Whether this machine can isolate code, found out by really running something; code is never run where it cannot.

The probe program runs as every other one does, and says for itself what it could see and do. The warm way is taken where
it holds, else the cold one, and it is said why.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from tools.base import SandboxUnavailable
from tools.servers.sandbox.cold import Cold
from tools.servers.sandbox.isolation import isolations
from tools.servers.sandbox.languages import Language, candidates
from tools.servers.sandbox.memory import working_groups
from tools.servers.sandbox.program import Launcher
from tools.servers.sandbox.runner import Sandbox, run_code
from tools.servers.sandbox.warm import Warm
from tools.servers.sandbox.wire import RunCodeRequest, RunCodeResponse

# Every line is a fact that makes the isolation; one that does not hold is an AssertionError with its name.
_PROBE = """
import os, resource
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
def must(fact, name):
    if not fact:
        raise AssertionError(name)
must(os.getuid() == os.geteuid() == 65534, "it is nobody")
must(int(status["CapEff"], 16) == 0 and status["NoNewPrivs"].strip() == "1", "it has no rights and can gain none")
must(status["Seccomp"].strip() == "2", "its system calls are filtered")
must(all(int(pid) < 20 for pid in os.listdir("/proc") if pid.isdigit()), "it sees no process of the machine")
must([line.split(":")[0].strip() for line in open("/proc/net/dev") if ":" in line] == ["lo"], "it has no network")
must(set(os.listdir("/etc")) <= {"passwd", "group", "hosts", "ld.so.cache", "alternatives"}, "it sees no file of the machine's own")
must(not os.access("/", os.W_OK) and not os.access("/usr/bin", os.W_OK), "it cannot write")
must(resource.getrlimit(resource.RLIMIT_NPROC)[1] <= 64, "its processes are limited")
must(resource.getrlimit(resource.RLIMIT_AS)[1] == 512 << 20, "its memory is limited")
print("isolated")
"""

_PYTHON = next(candidates())
_UNGROUPED = (
    "no memory cgroup can be made here, so the memory of a program's processes in sum is only watched, ten times a second; "
    "run as root with a writable /sys/fs/cgroup, or under systemd-run --user -p Delegate=yes, for a firm limit"
)
_INSTEAD = "or set sandbox_fusion_url to a SandboxFusion server of your own"

_REMEDIES = {
    "namespace": "allow user namespaces (sysctl kernel.unprivileged_userns_clone=1 or kernel.apparmor_restrict_unprivileged_userns=0; "
    "docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined)",
    "uid map": "allow user namespaces (sysctl kernel.apparmor_restrict_unprivileged_userns=0)",
    "proc": "let the container mount /proc (docker run --security-opt systempaths=unconfined)",
    "Permission denied": "install Python and bubblewrap where every user may read them",
}


@dataclass(frozen=True, slots=True)
class Working:
    """What this machine offers. `notes` say, one line each, what it lacks, with the remedy."""

    sandbox: Sandbox
    languages: dict[str, Language]
    packages: tuple[str, ...]
    is_warm: bool
    notes: tuple[str, ...]


async def working_sandbox(packages: Sequence[str] = (), *, cold: bool = False) -> Working:
    """The best sandbox of this machine, or the best `cold` one. Raises SandboxUnavailable, with the cause and the remedy.

    Programs see the installed `packages`; ToolConfigError where one is not installed.
    For a process that is the sandbox server's alone: as root it leaves for a mount namespace of its own. Elsewhere ask
    `embedded.sandbox.check()`.
    """
    causes = []
    for isolation in isolations(packages):
        groups = await working_groups(isolation.identity)
        notes = [] if groups.parent else [_UNGROUPED]
        for make in (Cold,) if cold else (Warm, Cold):
            launcher: Launcher = make(isolation)
            sandbox = Sandbox(launcher, groups)
            if (cause := await _what_is_wrong(sandbox)) is None:
                return Working(
                    sandbox, await _languages(sandbox), tuple(packages), make is Warm, tuple(notes)
                )
            await launcher.close()
            causes.append(cause)
            notes.append(f"programs start cold, which takes longer: {cause}")
        await groups.close()
    if not causes:
        raise SandboxUnavailable(
            f"cannot isolate code: there is no bubblewrap; pip install 'turntrace[sandbox]', {_INSTEAD}"
        )
    remedy = next(
        (remedy for sign, remedy in _REMEDIES.items() if sign in causes[-1]),
        "run on a machine with user namespaces",
    )
    raise SandboxUnavailable(f"cannot isolate code: {causes[-1]}; {remedy}, {_INSTEAD}")


async def _what_is_wrong(sandbox: Sandbox) -> str | None:
    request = RunCodeRequest(code=_PROBE, language="python", run_timeout=20, memory_limit_MB=512)
    response = await run_code(sandbox, _PYTHON, request)
    if response.run_result and response.run_result.stdout == "isolated\n":
        return None
    return _cause(response)


async def _languages(sandbox: Sandbox) -> dict[str, Language]:
    """Those whose first program prints what it should."""
    tried = await asyncio.gather(*(_works(sandbox, language) for language in candidates()))
    return {
        language.name: language
        for language, works in zip(candidates(), tried, strict=True)
        if works
    }


async def _works(sandbox: Sandbox, language: Language) -> bool:
    response = await run_code(
        sandbox, language, RunCodeRequest(code=language.tried, language=language.name)
    )
    return response.run_result is not None and response.run_result.stdout == "1\n"


def _cause(response: RunCodeResponse) -> str:
    lines = response.message.splitlines()
    if result := response.run_result:
        lines = (result.stderr or "").splitlines() or [
            f"the probe ended with {result.status}, exit code {result.return_code}"
        ]
    return lines[-1] if lines else "the probe said nothing"
