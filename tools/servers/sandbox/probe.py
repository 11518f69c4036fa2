"""Whether this machine can isolate code, tested by running a probe; code never runs if it cannot.

The probe runs as every program does, and checks what it can see and do. The warm way is used if the
probe passes there, else the cold one, with a note that says why.
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

# Each line checks one part of the isolation; a failure is an AssertionError with its name.
_PROBE = """
import os, resource
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
def must(fact, name):
    if not fact:
        raise AssertionError(name)
must(os.getuid() == os.geteuid() == 65534, "it is nobody")
must(int(status["CapEff"], 16) == 0, "it has no rights")
must(status["NoNewPrivs"].strip() == "1", "it can gain no rights")
must(status["Seccomp"].strip() == "2", "its system calls are filtered")
pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
must(max(pids) < 20, "it sees no process of the machine")
devices = [line.split(":")[0].strip() for line in open("/proc/net/dev") if ":" in line]
must(devices == ["lo"], "it has no network")
visible = {"passwd", "group", "hosts", "ld.so.cache", "alternatives"}
must(set(os.listdir("/etc")) <= visible, "it sees no file of the machine's own")
must(not os.access("/", os.W_OK), "it cannot write to /")
must(not os.access("/usr/bin", os.W_OK), "it cannot write to /usr/bin")
must(resource.getrlimit(resource.RLIMIT_NPROC)[1] <= 64, "its processes are limited")
must(resource.getrlimit(resource.RLIMIT_AS)[1] == 512 << 20, "its memory is limited")
print("isolated")
"""

_PYTHON = next(candidates())
_UNGROUPED = (
    "no memory cgroup can be made here, so the memory of a program's processes together is only "
    "watched, ten times a second; for a firm limit run as root with a writable /sys/fs/cgroup, or "
    "under systemd-run --user -p Delegate=yes"
)
_INSTEAD = "or set sandbox_fusion_url to a SandboxFusion server of your own"

_REMEDIES = {
    "namespace": "allow user namespaces (sysctl kernel.unprivileged_userns_clone=1 or "
    "kernel.apparmor_restrict_unprivileged_userns=0; docker run --security-opt seccomp=unconfined "
    "--security-opt apparmor=unconfined)",
    "uid map": "allow user namespaces (sysctl kernel.apparmor_restrict_unprivileged_userns=0)",
    "proc": "let the container mount /proc (docker run --security-opt systempaths=unconfined)",
    "Permission denied": "install Python and bubblewrap where every user may read them",
}


@dataclass(frozen=True, slots=True)
class Working:
    """What this machine offers. `notes` say what it lacks, one line each, with the remedy."""

    sandbox: Sandbox
    languages: dict[str, Language]
    packages: tuple[str, ...]
    is_warm: bool
    notes: tuple[str, ...]


async def working_sandbox(packages: Sequence[str] = (), *, cold: bool = False) -> Working:
    """The best sandbox of this machine, or the best `cold` one.

    packages: installed ones that programs see

    Only for the sandbox server's own process, which as root enters a mount namespace of its own;
    elsewhere call `embedded.sandbox.check()`. Raises SandboxUnavailable with cause and remedy, and
    ToolConfigError if a package is not installed.
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
            "cannot isolate code: there is no bubblewrap; "
            f"pip install 'turntrace[sandbox]', {_INSTEAD}"
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
    """The languages whose first program prints what it should."""
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
