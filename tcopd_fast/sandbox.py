"""Runs one untrusted Python program with nothing but a folder of its own.

The child limits itself before it becomes the program, in ways that cannot be undone and need no privileges:

    rlimits    CPU seconds, address space, file size, open files, no core dumps
    Landlock   reads the Python installation and system libraries; writes its own folder; nothing else exists
    no rights  no capabilities, not even root's, and none to be gained
    seccomp    no sockets, no new processes (threads are fine), no signals, no ptrace, no io_uring, no keyrings

This file is also the child's entry: it is run as a script by `python -I -S`, so it imports only the standard library.
Linux on x86-64 or arm64, kernel 5.13 or later; anywhere else `run` refuses.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

PREPARED = 97  # exit status of a child that could not confine itself
READABLE = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/urandom", "/dev/null", "/dev/zero")
MAX_OUTPUT_BYTES = 16 << 20

# Landlock rights by the ABI version that introduced them: execute, read_file, read_dir are the readable ones.
READ = 1 << 0 | 1 << 2 | 1 << 3
WRITE_BY_ABI = {1: sum(1 << bit for bit in (1, *range(4, 13))), 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
CAPABILITY_VERSION = 0x20080522
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 38, 22

# (audit architecture, clone, clone3, capset, refused calls): process creation is decided by clone's flags.
SYSCALLS = {
    "x86_64": (0xC000003E, 56, 435, 126, {
        "socket": 41, "fork": 57, "vfork": 58, "kill": 62, "ptrace": 101, "rt_sigqueueinfo": 129, "tkill": 200,
        "tgkill": 234, "keyctl": 250, "add_key": 248, "request_key": 249, "unshare": 272, "setns": 308,
        "process_vm_readv": 310, "process_vm_writev": 311, "bpf": 321, "userfaultfd": 323, "mount": 165,
        "pidfd_send_signal": 424, "io_uring_setup": 425, "pidfd_getfd": 438, "execveat": 322,
    }),
    "aarch64": (0xC00000B7, 220, 435, 91, {
        "socket": 198, "kill": 129, "ptrace": 117, "rt_sigqueueinfo": 138, "tkill": 130, "tgkill": 131,
        "keyctl": 219, "add_key": 217, "request_key": 218, "unshare": 97, "setns": 268, "process_vm_readv": 270,
        "process_vm_writev": 271, "bpf": 280, "userfaultfd": 282, "mount": 40, "pidfd_send_signal": 424,
        "io_uring_setup": 425, "pidfd_getfd": 438, "execveat": 281,
    }),
}  # fmt: skip
CLONE_THREAD = 0x00010000
EPERM, ENOSYS = 1, 38


@dataclass(frozen=True)
class Limits:
    """wall_s and cpu_s in seconds, memory in bytes of address space."""

    wall_s: float = 10.0
    cpu_s: int = 10
    memory_bytes: int = 1 << 30


@dataclass(frozen=True)
class Outcome:
    """How a program ended: exit status (negative: signal; None: out of time), and what it printed."""

    status: int | None
    stdout: str
    stderr: str


def obstacle() -> str | None:
    """Why programs cannot be confined on this machine, or None."""
    if sys.platform != "linux" or platform.machine() not in SYSCALLS:
        return f"it needs Linux on x86-64 or arm64, this is {sys.platform} on {platform.machine()}"
    if _landlock_abi() < 1:
        return "the kernel has no Landlock (5.13 or later, and `landlock` in /sys/kernel/security/lsm)"
    return None


def run(program: str, stdin: str = "", limits: Limits | None = None) -> Outcome:
    """Run Python source (standard library only) in a confined child. Raises RuntimeError if that is impossible."""
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="tcopd-sandbox-") as folder:
        home = Path(folder)
        (home / "program.py").write_text(program)
        (home / "stdin").write_text(stdin)
        command = [sys.executable, "-I", "-S", __file__, folder, str(limits.cpu_s), str(limits.memory_bytes)]
        with (
            (home / "stdin").open("rb") as source,
            (home / "stdout").open("wb") as out,
            (home / "stderr").open("wb") as err,
        ):
            child = subprocess.Popen(
                command, stdin=source, stdout=out, stderr=err, env={"PATH": "/usr/bin"}, cwd=folder,
                start_new_session=True, close_fds=True,
            )  # fmt: skip
            try:
                status: int | None = child.wait(limits.wall_s)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                status = None
        outcome = Outcome(status, _text(home / "stdout"), _text(home / "stderr"))
    if outcome.status == PREPARED:
        raise RuntimeError(f"sandbox: the child could not confine itself: {outcome.stderr.strip()}")
    return outcome


def _text(file: Path) -> str:
    with file.open("rb") as opened:
        return opened.read(MAX_OUTPUT_BYTES).decode(errors="replace")


def _landlock_abi() -> int:
    return ctypes.CDLL(None, use_errno=True).syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)


def confine(folder: str, cpu_s: int, memory_bytes: int) -> None:
    """Limit this process for good. Raises OSError when the kernel refuses any part."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    _landlock(libc, folder)
    for what, value in (
        (resource.RLIMIT_CPU, cpu_s), (resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_FSIZE, MAX_OUTPUT_BYTES),
        (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        resource.setrlimit(what, (value, value))
    if libc.syscall(SYSCALLS[platform.machine()][3], struct.pack("<Ii", CAPABILITY_VERSION, 0), bytes(24)):
        raise OSError(ctypes.get_errno(), "capset")
    _seccomp(libc)


def _landlock(libc: ctypes.CDLL, folder: str) -> None:
    abi = _landlock_abi()
    write = sum(rights for version, rights in WRITE_BY_ABI.items() if version <= abi)
    # Handled rights: files; TCP from version 4; from version 6 abstract sockets and signals to the outside.
    attributes = struct.pack("<QQQ", READ | write, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    rules = libc.syscall(LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), 0)
    if rules < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    for path, rights in [(folder, READ | write), *((p, READ) for p in (*READABLE, sys.base_prefix, __file__))]:
        if not os.path.exists(path):
            continue
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = rights if os.path.isdir(path) else rights & (1 << 0 | 1 << 1 | 1 << 2)
        rule = struct.pack("<Qi", allowed, descriptor)
        if libc.syscall(LANDLOCK_ADD, rules, 1, rule, 0):
            raise OSError(ctypes.get_errno(), f"landlock_add_rule {path}")
        os.close(descriptor)
    if libc.syscall(LANDLOCK_RESTRICT, rules, 0):
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    os.close(rules)


def _seccomp(libc: ctypes.CDLL) -> None:
    """Classic BPF over struct seccomp_data {int nr; u32 arch; u64 ip; u64 args[6]}."""
    architecture, clone, clone3, _, refused = SYSCALLS[platform.machine()]
    load, equal, bits, give = 0x20, 0x15, 0x45, 0x06
    allow, kill, error = 0x7FFF0000, 0x80000000, 0x00050000
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    if platform.machine() == "x86_64":
        program += [(0x35, 0, 1, 0x40000000), (give, 0, 0, kill)]  # the x32 numbers alias the others
    for number in sorted(refused.values()):
        program += [(equal, 0, 1, number), (give, 0, 0, error | EPERM)]
    program += [(equal, 0, 1, clone3), (give, 0, 0, error | ENOSYS)]  # the C library falls back to clone
    program += [(equal, 0, 4, clone), (load, 0, 0, 16), (bits, 1, 0, CLONE_THREAD), (give, 0, 0, error | EPERM)]
    program += [(give, 0, 0, allow), (give, 0, 0, allow)]
    code = b"".join(struct.pack("<HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    filters = struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(buffer))
    if libc.prctl(PR_SET_SECCOMP, 2, filters, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def _main() -> None:
    folder, cpu_s, memory_bytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a trainer that is asked to stop still wants its verdicts
    try:
        confine(folder, cpu_s, memory_bytes)
    except OSError as error:
        print(error, file=sys.stderr)
        os._exit(PREPARED)
    os.execv(sys.executable, [sys.executable, "-I", "-S", os.path.join(folder, "program.py")])


if __name__ == "__main__":
    _main()
