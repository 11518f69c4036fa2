"""Hostile programs, by name: the code, how its run may end, and its exit code if that matters.

A program that gets out prints ESCAPED, or is seen by a witness of the test. In the code, `PORT` is
the server's own port, `VICTIM` the id of a process of the machine, and `NAME` a name that the
attacks of one round share.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

ENDED, KILLED, STOPPED = "Finished", "TimeLimitExceeded", "Error"
ANY = (ENDED, KILLED, STOPPED)


@dataclass(frozen=True, slots=True)
class Attack:
    code: str
    ends: tuple[str, ...] = (ENDED,)
    exit_code: int | None = None

    @property
    def full(self) -> str:
        """The code with its helpers; if it only attempts things, it prints at last that it did."""
        return HEAD + textwrap.dedent(self.code) + ("\nprint('tried')\n" if self.attempts else "\n")

    @property
    def attempts(self) -> bool:
        return self.ends == (ENDED,) and ("attempt(" in self.code or "system(" in self.code)


HEAD = '''
import ctypes, mmap, os, platform, resource, signal, socket, struct, subprocess, sys
import threading, time
libc = ctypes.CDLL(None, use_errno=True)
X86 = platform.machine() == 'x86_64'
def attempt(name, call):
    """A call that must fail; what it returned is an escape."""
    try:
        got = call()
    except (OSError, ValueError, subprocess.SubprocessError):
        return
    print('ESCAPED by', name, repr(got)[:100])
def system(name, number, *args):
    ctypes.set_errno(0)
    args = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    if libc.syscall(ctypes.c_long(number), *args) >= 0:
        print('ESCAPED by', name)
'''

_USUAL: dict[str, Attack] = {
    "infinite loop": Attack("while True: pass", (KILLED,)),
    "sleep": Attack("time.sleep(60)", (KILLED,)),
    "ignored signals": Attack((
        "[signal.signal(s, signal.SIG_IGN) for s in range(1, 32) if s not in "
        "(9, 19)]\n"
        "time.sleep(60)"
    ), (KILLED,)),
    "fork bomb": Attack("while True:\n    try: os.fork()\n    except OSError: pass", (KILLED,)),
    "thread bomb": Attack((
        "while True:\n"
        "    try: threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "    except RuntimeError: pass"
    ), (KILLED,)),
    "memory bomb": Attack("x = []\nwhile True: x.append(bytearray(1 << 20))"),
    "memory bomb of many": Attack((
        "for _ in range(16):\n"
        "    if os.fork() == 0: x = bytearray(100 << 20); time.sleep(60)\n"
        "time.sleep(60)"
    ), ANY),
    "scratch bomb": Attack("for i in range(99): open(f'/tmp/{i}', 'wb').write(bytes(20 << 20))"),
    "shared memory bomb": Attack(
        "open('/dev/shm/x', 'wb').write(bytes(100 << 20)); print('ESCAPED')"
    ),
    "inode bomb": Attack(
        "for i in range(10 ** 6): open(f'/tmp/{i}', 'w').close()", (ENDED, KILLED)
    ),
    "endless stdout": Attack("while True: print('x' * 100000)", (STOPPED,)),
    "endless stderr": Attack("while True: sys.stderr.write('x' * 100000)", (STOPPED,)),
    "deep recursion": Attack((
        "sys.setrecursionlimit(10 ** 6)\n"
        "def f(n): return [f(n + 1)]\n"
        "f(0)"
    ), (ENDED, KILLED)),
    "network": Attack(
        """
        attempt('tcp', lambda: socket.create_connection(('1.1.1.1', 80), timeout=1))
        attempt('loopback', lambda: socket.create_connection(('127.0.0.1', PORT), timeout=1))
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        attempt('udp', lambda: udp.sendto(b'x', ('8.8.8.8', 53)))
        for family in (16, 17, 38, 40, 29, 30):  # netlink, packet, alg, vsock, can, tipc
            attempt(f'family {family}', lambda: socket.socket(family, socket.SOCK_RAW))
            pair = lambda: socket.socketpair(family, socket.SOCK_DGRAM)
            attempt(f'family {family} in pairs', pair)
        attempt('raw', lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
        """
    ),
    "files of the machine": Attack(
        """
        for path in ('/etc/shadow', '/root/.bashrc', '/root/.ssh', '/home', '/var', '/work',
                     '/proc/1/root', '/proc/1/cwd', '/proc/kcore', '/sys', '/mnt', '/srv'):
            read = os.listdir if os.path.isdir(path) else lambda path: open(path, 'rb').read(10)
            attempt(path, lambda: read(path))
        attempt('parent environment', lambda: open('/proc/1/environ').read())
        if 'TURNTRACE' in str(os.environ): print('ESCAPED, environment', os.environ)
        """
    ),
    "writes outside": Attack(
        """
        for path in ('/turntrace-escape', '/etc/passwd', '/usr/bin/turntrace-escape',
                     '/opt/zygote.py', '/dev/turntrace-escape', os.__file__, sys.executable,
                     '/proc/sys/kernel/hostname', '/proc/sysrq-trigger', '/proc/1/mem',
                     '/proc/1/oom_score_adj'):
            attempt(path, lambda: open(path, 'a'))
        os.symlink('/usr', '/tmp/usr')
        attempt('symlink', lambda: open('/tmp/usr/turntrace-escape', 'w'))
        attempt('hard link', lambda: os.link('/usr/bin/env', '/tmp/env'))
        attempt('chmod', lambda: os.chmod('/usr/bin/env', 0o777))
        attempt('rename', lambda: os.rename('/opt/zygote.py', '/opt/x'))
        """
    ),
    "kill everybody": Attack(
        "attempt('all', lambda: os.kill(-1, 9))\n"
        "attempt('victim', lambda: os.kill(VICTIM, 9))"
    ),
    "kill the group": Attack("os.kill(0, 9)", exit_code=137),
    "kill init": Attack((
        "for s in range(1, 65):\n"
        "    try: os.kill(1, s)\n"
        "    except OSError: pass\n"
        "print('alive')"
    ), ANY),
    "kernel doors": Attack(
        """
        system('unshare', 272 if X86 else 97, 0x10000000)
        system('unshare mounts', 272 if X86 else 97, 0x20000)
        system('setns', 308 if X86 else 268, os.open('/proc/self/ns/net', 0), 0)
        system('mount', 165 if X86 else 40, b'none', b'/tmp', b'tmpfs', 0, None)
        system('ptrace', 101 if X86 else 117, 16, os.getppid(), 0, 0)
        system('clone', 56 if X86 else 220, 0x10000000 | 17, 0, 0, 0, 0)
        system('clone3', 435, bytes(88), 88)
        """
    ),
    "daemons": Attack(
        "for _ in range(30):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        if os.fork() == 0: time.sleep(60)\n"
        "        os._exit(0)"
    ),
    "daemon that holds stdout": Attack(
        "if os.fork() == 0:\n"
        "    os.setsid(); time.sleep(60)\n"
        "print('done')"
    ),
    "segfault": Attack("ctypes.string_at(0)", exit_code=139),
    "abort": Attack("os.abort()", exit_code=134),
    "close everything": Attack("os.closerange(0, 1024); time.sleep(60)", (KILLED,)),
    "what was there before": Attack(
        """
        import re
        names = os.listdir('/tmp') + os.listdir('/dev/shm')
        if names != ['main.py']: print('ESCAPED', names)
        me = open('/proc/self/maps').read()
        heap = open('/proc/self/mem', 'rb')
        for line in me.splitlines():
            if 'rw-p' in line and 'stack' not in line:
                start, end = (int(part, 16) for part in line.split()[0].split('-'))
                heap.seek(start)
                if re.search(rb'honest[-]secret-', heap.read(end - start)):
                    print('ESCAPED, memory', line)
        """
    ),
}  # fmt: skip

_OUR_OWN: dict[str, Attack] = {
    "forged exit": Attack(
        """
        for fd in range(3, 1024):
            try: os.write(fd, b'{"exit": 0, "error": "forged"}')
            except OSError: continue
            print('ESCAPED by descriptor', fd)
        attempt('descriptors of init', lambda: os.listdir('/proc/1/fd'))
        print('tried', flush=True)
        os._exit(3)
        """,
        exit_code=3,
    ),
    "limits of init": Attack(
        """
        attempt('prlimit', lambda: resource.prlimit(1, resource.RLIMIT_CPU, (0, 0)))
        for which in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE,
                      resource.RLIMIT_FSIZE, resource.RLIMIT_CPU):
            soft, hard = resource.getrlimit(which)
            attempt('own limit', lambda: resource.setrlimit(which, (hard + 1, hard + 1)))
        def score(process, value):
            return os.write(os.open(f'/proc/{process}/oom_score_adj', os.O_WRONLY), value)
        attempt('oom', lambda: score('self', b'-1000'))
        attempt('oom of init', lambda: score('1', b'1000'))
        attempt('nice', lambda: os.nice(-5))
        realtime = os.SCHED_FIFO, os.sched_param(1)
        attempt('realtime', lambda: os.sched_setscheduler(0, *realtime))
        """
    ),
    "memory outside of processes": Attack(
        """
        attempt('memfd', lambda: os.memfd_create('x'))
        system('shmget', 29 if X86 else 194, 0, 1 << 30, 0o1600)
        system('msgget', 68 if X86 else 186, 0, 0o1600)
        pairs = []
        try:
            while True:
                pairs.append(socket.socketpair()); pairs[-1][0].setblocking(False)
                while True: pairs[-1][0].send(bytes(1 << 16))
        except BlockingIOError: pass
        except OSError: pass
        time.sleep(60)
        """,
        (KILLED,),
    ),
    "rarer kernel doors": Attack(
        """
        calls = [
            ('io_uring', 425, 425), ('bpf', 321, 280), ('perf', 298, 241),
            ('userfaultfd', 323, 282), ('keyctl', 250, 219), ('add_key', 248, 217),
            ('vm_readv', 310, 270), ('kexec', 246, 104), ('fsopen', 430, 430),
            ('mount_setattr', 442, 442), ('pidfd_getfd', 438, 438), ('handle', 304, 265),
            ('fanotify', 300, 262), ('chroot', 161, 51), ('pivot', 155, 41),
            ('memfd_secret', 447, 447), ('newer', 457, 457), ('far newer', 9999, 9999),
            ('personality', 135, 92),
        ]
        for name, x86, arm in calls:
            system(name, x86 if X86 else arm, 0, 0, 0, 0, 0, 0)
        """
    ),
    "the other tables of calls": Attack(
        """
        system('x32', 0x40000000 + 272, 0x10000000)
        code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        code.write(bytes.fromhex('53b81400000031dbcd805bc3'))  # getpid of i386, by int 0x80
        call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
        print('tried', flush=True)
        if X86: print('ESCAPED by int 0x80', call())
        os.kill(0, signal.SIGSYS)
        """,
        exit_code=128 + 31,
    ),
    "descriptors under way": Attack(
        """
        import array
        fds, keep = array.array('i', [0] * 250), []
        try:
            while True:
                a, b = socket.socketpair(); keep += (a, b)
                a.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        except OSError: pass
        time.sleep(60)
        """,
        (KILLED,),
    ),
    "meeting, who waits": Attack(
        """
        open('/dev/shm/NAME', 'w').close(); open('/tmp/NAME', 'w').close()
        unix = socket.socket(socket.AF_UNIX); unix.bind('\\0NAME'); unix.listen()
        tcp = socket.create_server(('127.0.0.1', 45555))
        tcp.settimeout(1.2)
        attempt('visit', lambda: tcp.accept())
        """
    ),
    "meeting, who comes": Attack(
        """
        def at_unix():
            unix = socket.socket(socket.AF_UNIX); unix.connect('\\0NAME')
        for _ in range(20):
            attempt('unix', at_unix)
            tcp = ('127.0.0.1', 45555)
            attempt('tcp', lambda: socket.create_connection(tcp, timeout=0.1))
            attempt('shared memory', lambda: open('/dev/shm/NAME'))
            attempt('scratch', lambda: open('/tmp/NAME'))
            time.sleep(0.05)
        """
    ),
    "rights by a program": Attack(
        """
        quiet = {'check': True, 'capture_output': True, 'stdin': subprocess.DEVNULL}
        for command in (['su', '-c', 'id'], ['mount', '-t', 'tmpfs', 'x', '/tmp'],
                        ['unshare', '-r', 'id'], ['chsh', '-s', '/bin/sh'], ['sudo', 'id']):
            attempt(command[0], lambda: subprocess.run(command, timeout=5, **quiet))
        attempt('setuid', lambda: os.setuid(0))
        attempt('groups', lambda: os.setgroups([0]))
        attempt('device', lambda: os.mknod('/tmp/sda', 0o60666, 0x800))
        """
    ),
    "stopped for ever": Attack((
        "os.kill(os.getppid(), signal.SIGSTOP); os.kill(os.getpid(), "
        "signal.SIGSTOP)"
    ), (KILLED,)),
    "orphans without end": Attack(
        (
            "while True:\n"
            "    try:\n"
            "        if os.fork() == 0:\n"
            "            if os.fork() == 0: os._exit(0)\n"
            "            os._exit(0)\n"
            "        os.wait()\n"
            "    except OSError: pass"
        ),
        (KILLED,),
    ),
    "no end of a path": Attack(
        """
        try:
            while True: os.mkdir('d'); os.chdir('d')
        except OSError: pass
        """,
        (ENDED, KILLED),
    ),
    "bytes that are no text": Attack(
        "sys.stdout.buffer.write(bytes(range(256)) * 100 + "
        "b'\\x1b]0;x\\x07\\0')"
    ),
    "a broken interpreter": Attack(
        """
        import atexit, builtins, gc
        atexit.register(lambda: os._exit(9)); gc.collect = None; sys.stdout = None
        sys.modules.clear(); vars(builtins).clear()
        """
    ),
    "exit that never ends": Attack("import atexit\natexit.register(time.sleep, 60)", (KILLED,)),
    "an object that never dies": Attack((
        "class A:\n"
        "    def __del__(self):\n"
        "        while True: pass\n"
        "a = A()"
    ), (KILLED,)),
    "sparse and special files": Attack(
        """
        attempt('sparse', lambda: open('/tmp/sparse', 'w').truncate(1 << 40))
        os.mkfifo('/tmp/fetched')
        os.symlink('/proc/1/environ', '/tmp/fetched2')
        os.symlink('/dev/zero', '/tmp/fetched3')
        os.symlink('.', '/tmp/fetched4')
        """
    ),
}  # fmt: skip

ATTACKS: dict[str, Attack] = {**_USUAL, **_OUR_OWN}
