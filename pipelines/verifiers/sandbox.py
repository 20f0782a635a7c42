"""Where the code of responses runs: a process without network or files of yours, under limits.

rewards/code.py calls `find_sandbox` and `Sandbox.run`. bubblewrap isolates where it is installed,
else util-linux's unshare where the kernel lets this user make namespaces (as root the other way
round: its chroot also forbids user namespaces inside). Each is tried with a program before it is
taken. docs/security.md says what they keep out.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

from ...schemas.errors import InputError

_RUNNER = Path(__file__).with_name("sandbox_runner.py")
_INSIDE = "/sandbox_runner.py"
_MOST_RESULT = 1 << 20  # bytes of a runner's answer
_GRACE_S = 5.0  # of the runner itself, after the program's time
_FOLDER_MIB = 64
_SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64")
_PATH = "/usr/bin:/bin:/usr/sbin:/sbin"
_DEVICES = ("null", "zero", "random", "urandom")
# A sandbox started by root gets a user of its own, or limits on processes would not hold.
_FIRST_UID = 1 << 30
_uids = count(os.getpid() * 1000)


@dataclass(frozen=True)
class Sandbox:
    """name: bubblewrap, unshare or rlimits; command: makes the command line around the runner."""

    name: str
    command: Callable[[str], list[str]]

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """The runner's result, {"late": True} past the deadline, or {"error": text} of a sandbox
        that failed. job: see sandbox_runner.py; `timeout_s` is the program's.
        """
        if self is UNISOLATED and os.getuid():
            # The limit counts all processes of this user.
            job = job | {"processes": job["processes"] + _own_threads()}
        uid = _FIRST_UID + next(_uids) % _FIRST_UID if os.getuid() == 0 else 0
        with _folder(uid) as folder:
            process = subprocess.Popen(
                self.command(folder),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env={"PATH": _PATH, "HOME": "/tmp", "LANG": "C.UTF-8"},  # noqa: S108 - inside
                start_new_session=True,
            )
            late = threading.Event()
            timer = threading.Timer(job["timeout_s"] + _GRACE_S, _kill, [process, late])
            timer.start()
            try:
                return _result(process, json.dumps(job | {"uid": uid}).encode(), late)
            finally:
                timer.cancel()
                _kill(process)
                process.wait()
                if self is UNISOLATED and uid:
                    _kill_user(uid)


def _kill(process: subprocess.Popen, late: threading.Event | None = None) -> None:
    if late is not None:
        late.set()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _kill_user(uid: int) -> None:
    """End what a program left behind in other sessions; namespaces end with their first process."""
    for _ in range(1000):  # a process may fork while the others are killed
        left = [int(process.name) for process in _processes(uid)]
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not left:
            return


def _processes(uid: int) -> Iterator[Path]:
    """Living processes of a user."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            if process.stat().st_uid == uid and state != "Z":
                yield process


def _result(process: subprocess.Popen, job: bytes, late: threading.Event) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdin, process.stdout, process.stderr:
        with suppress(BrokenPipeError):
            process.stdin.write(job)
            process.stdin.close()
        written = process.stdout.read(_MOST_RESULT)
        complaint = b"" if late.is_set() or written else process.stderr.read(2000)
    if late.is_set():
        return {"late": True}
    try:
        result = json.loads(written)
        assert isinstance(result, dict)
    except (ValueError, AssertionError):
        said = " ".join(complaint.decode(errors="replace").split())
        return {"error": f"the sandbox ended without a result ({said[-300:] or 'no message'})"}
    return result


def _own_threads() -> int:
    """Threads of this user on this machine."""
    threads = 0
    for process in _processes(os.getuid()):
        with suppress(OSError):
            threads += sum(1 for _ in (process / "task").iterdir())
    return threads


@contextmanager
def _folder(uid: int) -> Iterator[str]:
    """A private folder, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="trace-opd-", ignore_cleanup_errors=True) as folder:
        if uid:
            os.chown(folder, uid, uid)
        yield folder


@lru_cache(maxsize=2)
def find_sandbox(allow_unisolated: bool) -> Sandbox:
    """The best sandbox that works here.

    Raises:
        InputError: nothing isolates, and that is not allowed.
    """
    faults = []
    for sandbox in isolating():
        fault = _tried(sandbox)
        if fault is None:
            return sandbox
        faults.append(f"{sandbox.name}: {fault}")
    if not shutil.which("bwrap"):
        faults.insert(0, "bubblewrap: is not installed")
    if not allow_unisolated:
        raise InputError(
            f"rewards: code: nothing isolates programs on this machine ({'; '.join(faults)}); "
            "install bubblewrap, or set allow_unisolated=true to run them with your rights and "
            "limits alone (docs/security.md)"
        )
    fault = _tried(UNISOLATED)
    if fault is not None:
        raise InputError(f"rewards: code: a program can't run on this machine ({fault})")
    return UNISOLATED


def isolating() -> list[Sandbox]:
    """The sandboxes whose programs are installed, the best first; they may still not work."""
    found = []
    if shutil.which("bwrap"):
        found.append(Sandbox("bubblewrap", _bubblewrap))
    if shutil.which("unshare") and shutil.which("setpriv"):
        found.append(Sandbox("unshare", _unshare))
    return found[::-1] if os.getuid() == 0 else found


# A program that must pass: it sees its own folder alone and reaches nothing.
_TRIAL = """
import os, socket
open("own", "w").write("x")
"""
_ISOLATED = """
for path in (%r, "/etc/passwd"):
    assert not os.path.exists(path)
assert sorted(os.listdir("/sys") if os.path.isdir("/sys") else []) == []
try:
    socket.create_connection(("127.0.0.1", %d), 1)
except OSError:
    pass
else:
    raise AssertionError("reaches this machine's network")
"""


def _tried(sandbox: Sandbox) -> str | None:
    """Why a sandbox does not work here; None if it does."""
    import socket

    job = {"cases": [], "entry_point": "", "tests": "", "timeout_s": 20.0, "memory_mib": 1024}
    job |= {"processes": 16, "file_mib": 1, "stop": True}
    with socket.create_server(("127.0.0.1", 0)) as server:
        isolated = _ISOLATED % (str(_RUNNER), server.getsockname()[1])
        trial = _TRIAL + ("" if sandbox is UNISOLATED else isolated)
        result = sandbox.run(job | {"program": trial})
    if result.get("passed") == 1:
        return None
    what = result.get("error") or result.get("stderr") or "it gave no result in time"
    return " ".join(str(what).split())[-300:]


def _python() -> list[str]:
    return [os.path.realpath(sys.executable), "-I", "-S", "-B"]


def _bound() -> list[str]:
    """Folders that a Python program needs, read-only inside."""
    prefix = os.path.realpath(sys.base_prefix)
    inside = prefix == "/usr" or prefix.startswith("/usr/")
    return [path for path in _SYSTEM if Path(path).is_dir()] + ([] if inside else [prefix])


def _bubblewrap(folder: str) -> list[str]:
    command = [
        shutil.which("bwrap") or "bwrap",
        "--unshare-ipc",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-uts",
    ]
    command += ["--unshare-cgroup-try", "--die-with-parent", "--new-session"]
    if os.getuid() == 0:
        # The runner needs these to become a user of its own, which takes them from it.
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--cap-drop", "ALL"]
        command += ["--disable-userns"] if _knows(command[0], "--disable-userns") else []
    for path in _bound():
        # Folders above it, which bubblewrap would close to others where they are closed outside.
        for above in reversed(Path(path).parents[:-1]):
            command += ["--perms", "0755", "--dir", str(above)]
        command += ["--ro-bind", path, path]
    command += ["--ro-bind", str(_RUNNER), _INSIDE, "--proc", "/proc", "--dev", "/dev"]
    size = ["--size", str(_FOLDER_MIB << 20)] if _knows(command[0], "--size") else []
    command += ["--perms", "1777", *size, "--tmpfs", "/tmp"]  # noqa: S108
    return [*command, "--remount-ro", "/", "--chdir", "/tmp", *_python(), _INSIDE]  # noqa: S108


@lru_cache(maxsize=8)
def _knows(bwrap: str, option: str) -> bool:
    """Whether this version has an option."""
    told = subprocess.run([bwrap, "--help"], capture_output=True, text=True, check=False)
    return option in told.stdout


def _unshare(folder: str) -> list[str]:
    """A root of its own, made in new namespaces as bubblewrap makes it, then no privileges."""
    root = shlex.quote(f"{folder}/root")
    lines = [
        "set -e",
        f"mkdir {root}",
        f"mount -t tmpfs -o size={_FOLDER_MIB}m,mode=755,nosuid,nodev tmpfs {root}",
        f"cd {root}",
        "mkdir proc dev tmp",
        "chmod 1777 tmp",
        f"touch .{_INSIDE} " + " ".join(f"dev/{name}" for name in _DEVICES),
        *(f"mount --bind /dev/{name} dev/{name}" for name in _DEVICES),
        f"mount --bind {shlex.quote(str(_RUNNER))} .{_INSIDE}",
        f"mount -o remount,bind,ro,nosuid,nodev .{_INSIDE}",
    ]
    for path in _bound():
        there = shlex.quote(f".{path}")
        lines += [
            f"mkdir -p {there}",
            f"mount --bind {shlex.quote(path)} {there}",
            f"mount -o remount,bind,ro,nosuid,nodev {there}",
        ]
    lines += [
        "mount -t proc -o nosuid,nodev,noexec proc proc",
        # Its own /tmp, so that the root itself can be read-only.
        f"mount -t tmpfs -o size={_FOLDER_MIB}m,mode=1777,nosuid,nodev tmpfs tmp",
        "mount -o remount,bind,ro,nosuid,nodev .",
    ]
    caps = "--bounding-set=-all,+setuid,+setgid" if os.getuid() == 0 else "--bounding-set=-all"
    inner = shlex.join(["setpriv", "--no-new-privs", "--inh-caps=-all", caps, *_python(), _INSIDE])
    lines.append(f"exec chroot . /bin/sh -c {shlex.quote(f'cd /tmp && exec {inner}')}")
    user = [] if os.getuid() == 0 else ["--user", "--map-root-user"]
    spaces = ["--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child=KILL"]
    return [
        shutil.which("unshare") or "unshare",
        *user,
        *spaces,
        "--",
        "/bin/sh",
        "-c",
        "\n".join(lines),
    ]


UNISOLATED = Sandbox("rlimits", lambda folder: [*_python(), str(_RUNNER)])
