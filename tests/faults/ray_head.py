"""Ray nodes of our own on this machine, with settings of their own, ended by their process groups."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ended(process: subprocess.Popen[bytes]) -> None:
    """Ends a node with all it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def head(folder: Path, *words: str, cpus: int = 0, variables: dict[str, str] | None = None) -> Iterator[dict[str, str]]:
    """A head; yields the environment of processes that use it.

    Args:
        folder: for its log.
        words: more options of `ray start`.
        cpus: that it offers.
        variables: of its environment alone.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "ITPN_"))}
    (folder / "token").write_text("0123456789abcdef0123456789abcdef")
    environment = {
        **kept, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "ITPN_HOME": str(folder),
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }  # fmt: skip
    port = free_port()
    temp = Path("/tmp") / f"ray-{os.getpid()}-{port}"  # short: Unix sockets below it have 107 characters
    command = [
        RAY, "start", "--head", "--block", f"--num-cpus={cpus}", f"--port={port}", "--node-ip-address=127.0.0.1",
        f"--temp-dir={temp}", "--include-dashboard=false", "--object-store-memory=100000000", *words,
    ]  # fmt: skip
    log = folder / "head.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env={**environment, **(variables or {})}, stdout=out, stderr=out, start_new_session=True
        )
    address = f"127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        check = [RAY, "health-check", "--address", address]
        while subprocess.run(check, env=environment, capture_output=True, check=False).returncode:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield {**environment, "RAY_ADDRESS": address}
    finally:
        ended(process)
        shutil.rmtree(temp, ignore_errors=True)


@contextlib.contextmanager
def node(environment: dict[str, str], log: Path, cpus: int, variables: dict[str, str]) -> Iterator[None]:
    """One more node of a head's cluster, with variables of its own."""
    mine = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
    command = [
        RAY, "start", "--block", f"--num-cpus={cpus}", f"--address={environment['RAY_ADDRESS']}",
        "--object-store-memory=100000000",
    ]  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen(command, env={**mine, **variables}, stdout=out, stderr=out, start_new_session=True)
    try:
        yield
    finally:
        ended(process)
