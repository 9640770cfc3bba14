"""PostgreSQL for the local stack: found by name, initialised once, never run as root."""

from __future__ import annotations

import hashlib
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import psycopg2

INSTALL = "install it (on Debian and Ubuntu: apt-get install postgresql), or put its programs on PATH"


class PostgresError(Exception):
    """PostgreSQL is missing or cannot be set up."""


def programs() -> Path:
    """The folder of PostgreSQL's programs: beside `postgres` on PATH, else the newest of Debian's.

    Raises:
        PostgresError: there is none.
    """
    on_path = shutil.which("postgres")
    if on_path and (Path(on_path).resolve().parent / "initdb").exists():
        return Path(on_path).resolve().parent
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    if not found:
        raise PostgresError(f"PostgreSQL is missing: no program `postgres` was found; {INSTALL}")
    return max(found, key=lambda path: [int(number) for number in re.findall(r"\d+", path.parent.name)])


class Server:
    """One database cluster of the stack.

    Args:
        root: the stack's folder.
        port: on 127.0.0.1.
        password: of the database user `itpn`.
    """

    def __init__(self, root: Path, port: int, password: str) -> None:
        self._port = port
        self._password = password
        self._account = None if os.getuid() else _unprivileged()
        # PostgreSQL refuses to run as root, and another account cannot pass through root's home.
        mark = hashlib.sha256(str(root).encode()).hexdigest()[:12]
        self.folder = root / "data" / "postgres" / "cluster" if os.getuid() else Path("/var/lib/itpn-local") / mark

    def user(self) -> dict[str, object]:
        """Arguments of `Popen` that give up root."""
        if self._account is None:
            return {}
        return {"user": self._account.pw_uid, "group": self._account.pw_gid, "extra_groups": [], "cwd": "/"}

    def prepare(self) -> None:
        """Makes the database cluster when there is none.

        Raises:
            PostgresError: the programs are missing or initdb refuses.
        """
        tools = programs()
        if (self.folder / "PG_VERSION").exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        if self._account is not None:
            os.chown(self.folder, self._account.pw_uid, self._account.pw_gid)
        options = {key: value for key, value in self.user().items() if key != "cwd"}
        with tempfile.NamedTemporaryFile("w") as password:  # mode 0600
            password.write(self._password)
            password.flush()
            if self._account is not None:
                os.chown(password.name, self._account.pw_uid, self._account.pw_gid)
            command = [
                str(tools / "initdb"), "-D", str(self.folder), "-U", "itpn", "-A", "scram-sha-256", "-E", "UTF8",
                "--no-locale", f"--pwfile={password.name}",
            ]  # fmt: skip
            done = subprocess.run(  # noqa: S603 -- our own command
                command, text=True, capture_output=True, check=False, cwd="/", **options
            )  # type: ignore[call-overload]
        if done.returncode:
            raise PostgresError(f"initdb failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")

    def command(self) -> list[str]:
        """The server in the foreground."""
        settings = {"listen_addresses": "127.0.0.1", "port": self._port, "unix_socket_directories": ""}
        words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        return [str(programs() / "postgres"), "-D", str(self.folder), *words]

    def ready(self) -> bool:
        """Whether it lets us in."""
        try:
            self._connect().close()
        except psycopg2.OperationalError:
            return False
        return True

    def make_databases(self, *names: str) -> None:
        """Creates databases that are not there."""
        connection = self._connect()
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("SELECT datname FROM pg_database")
            there = {row[0] for row in cursor.fetchall()}
            for name in names:
                if name not in there:
                    cursor.execute(f'CREATE DATABASE "{name}"')
        connection.close()

    def delete(self) -> None:
        """Removes the database cluster."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _connect(self) -> psycopg2.extensions.connection:
        return psycopg2.connect(
            host="127.0.0.1", port=self._port, user="itpn", password=self._password, dbname="postgres",
            connect_timeout=2,
        )  # fmt: skip


def _unprivileged() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise PostgresError("PostgreSQL does not run as root, and there is no account `postgres` or `nobody` to run it")
