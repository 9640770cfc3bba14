"""Hosts of a cluster as Linux namespaces of this machine, joined by a bridge that lives in a namespace too.

A host has its own network, processes, IPC and host name, its own empty /tmp, /var/tmp, /dev/shm, /run and home, and
sees the rest of this machine read-only. So hosts share nothing they could write but the network between them. Nothing
is made in the machine's own network, and everything ends with the processes that hold it: they die with the thread that
made them.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BOOT = Path(__file__).with_name("boot.sh")
# Shown read-only in every host: this repository, the environment, and the Python that the environment was made from.
KEPT = (ROOT, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve())
NETWORK = "10.77.0"
CLONE_NEWNET = 0x40000000
NEW = ("unshare", "-n", "-m", "-p", "-i", "-u", "-f", "--mount-proc")
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")


def missing() -> str:
    """What this machine lacks for such hosts; "" when nothing."""
    if os.geteuid():
        return "network namespaces need root"
    lacking = [tool for tool in ("ip", "unshare", "nsenter", "setpriv") if not shutil.which(tool)]
    if lacking:
        return f"{', '.join(lacking)} not found (apt-get install iproute2 util-linux)"
    tried = subprocess.run(
        [*NEW, "ip", "link", "add", "name", "br", "type", "bridge"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f"no namespaces or bridges here: {tried.stderr.strip()}" if tried.returncode else ""


def command(*words: object) -> str:
    """Runs a command of this machine that must succeed; returns what it printed."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def until(ready: Callable[[], Any], seconds: float, what: str, every: float = 0.2) -> Any:
    """Waits for a true answer and returns it."""
    deadline = time.monotonic() + seconds
    while not (answer := ready()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {seconds:.0f} s still not: {what}")
        time.sleep(every)
    return answer


class Wire:
    """The bridge between hosts. Closing it, or the end of this process, ends every host."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.hosts: list[Host] = []
        self._holder = subprocess.Popen([*DIES_WITH_US, "unshare", "-n", "--", "sleep", "infinity"])
        until(lambda: namespace(self._holder.pid) != namespace(os.getpid()), 10, "a namespace for the bridge", 0.01)
        self.ip("link", "add", "name", "wire", "type", "bridge")
        self.ip("link", "set", "wire", "up")

    def ip(self, *words: object) -> str:
        """`ip WORDS` in the bridge's namespace."""
        return command("nsenter", "-t", self._holder.pid, "-n", "ip", *words)

    def plug(self, port: str, pid: int) -> None:
        """A cable from the bridge to eth0 of a namespace."""
        self.ip("link", "add", "name", port, "type", "veth", "peer", "name", "eth0", "netns", pid)
        self.ip("link", "set", port, "master", "wire", "up")

    def host(self, name: str) -> Host:
        """A new host, running."""
        host = Host(self, name, f"{NETWORK}.{len(self.hosts) + 1}")
        self.hosts.append(host)
        host.boot()
        return host

    def close(self) -> None:
        """Ends everything; the bridge and its cables go with the last process in their namespaces."""
        for host in self.hosts:
            host.kill()
        self._holder.kill()
        self._holder.wait()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Host:
    """One host; `boot` after `kill` brings it back empty, with the same name and address."""

    def __init__(self, wire: Wire, name: str, address: str) -> None:
        self.wire, self.name, self.address = wire, name, address
        self.pid = 0
        """Of the host's first process as this machine counts; 0 while it is off."""
        self._boots = 0
        self._shell: subprocess.Popen[bytes] | None = None
        self._started: list[subprocess.Popen[bytes]] = []

    @property
    def files(self) -> Path:
        """The host's own view of its files, for the test to look at or to put things into."""
        return Path(f"/proc/{self.pid}/root")

    def boot(self) -> None:
        """Switches the host on."""
        assert not self.pid, f"{self.name} is on"
        self._boots += 1
        with (self.wire.logs / f"{self.name}-boot-{self._boots}.log").open("wb") as log:
            self._shell = subprocess.Popen(
                [*DIES_WITH_US, *NEW, "--kill-child=KILL", "--", str(BOOT), self.name, self.address, str(Path.home()),
                 *map(str, KEPT)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self.pid = until(lambda: child(self._shell.pid), 20, f"{self.name} has a first process", 0.01)
        until(lambda: (self.files / "run" / "booted").exists(), 30, f"{self.name} has booted; see {log.name}", 0.05)
        self.wire.plug(self.port, self.pid)
        inside = ("nsenter", "-t", self.pid, "-n", "ip")
        command(*inside, "link", "set", "lo", "up")
        command(*inside, "address", "add", f"{self.address}/24", "dev", "eth0")
        command(*inside, "link", "set", "eth0", "up")
        command(*inside, "route", "add", "default", "dev", "eth0")

    @property
    def port(self) -> str:
        """The bridge's end of the cable; a new cable per boot, for the old one's end is not immediate."""
        return f"{self.name}.{self._boots}"

    def kill(self) -> None:
        """Switches the host off: its first process dies, and with it every other. Harmless when it is off."""
        if not self.pid:
            return
        pid, self.pid = self.pid, 0
        os.kill(pid, signal.SIGKILL)
        self._shell.wait()
        for process in self._started:  # they enter the host's namespaces and end with what they run there
            process.wait(30)
        self._started.clear()

    def cut(self) -> None:
        """The network takes nothing from this host and brings nothing to it; neither side is told."""
        self.wire.ip("link", "set", self.port, "nomaster")

    def mend(self) -> None:
        """Ends a `cut`."""
        self.wire.ip("link", "set", self.port, "master", "wire")

    def start(self, log: str, words: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Starts a process of the host in the repository's folder; its output is appended to `<logs>/<log>`."""
        with (self.wire.logs / log).open("ab") as out:
            process = subprocess.Popen(
                [*DIES_WITH_US, *self._inside(words)], env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        self._started.append(process)
        return process

    def run(
        self, words: list[str], environment: dict[str, str], seconds: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command of the host to its end."""
        return subprocess.run(
            self._inside(words), env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=seconds, check=False,
        )  # fmt: skip

    def _inside(self, words: list[str]) -> list[str]:
        return ["nsenter", "-t", str(self.pid), "-n", "-m", "-p", "-i", "-u", "--", "env", "-C", str(ROOT), *words]

    def processes(self, name: str) -> int:
        """How many processes of the host have this in their command line."""
        own = namespace(self.pid, "pid")
        return sum(
            name in arguments(pid)
            for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
            if namespace(pid, "pid") == own
        )

    def caller(self) -> ThreadPoolExecutor:
        """A thread in the host's network: what it connects to, it reaches as the host would."""

        def enter() -> None:
            with Path(f"/proc/{self.pid}/ns/net").open() as file:
                if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"cannot enter the network of {self.name}")

        return ThreadPoolExecutor(max_workers=1, initializer=enter, thread_name_prefix=f"net-{self.name}")


def namespace(pid: int, kind: str = "net") -> str:
    """Identity of a process' namespace; "" when the process is gone."""
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    except OSError:
        return ""


def child(pid: int) -> int:
    """The first child of a process, 0 while it has none."""
    try:
        return int((Path(f"/proc/{pid}/task/{pid}/children").read_text().split() or ["0"])[0])
    except OSError:
        return 0


def arguments(pid: int) -> str:
    """Command line of a process, "" when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
