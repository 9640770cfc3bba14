"""The hosts share nothing but the network: else a cluster test could pass by cheating."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.hosts import ROOT, until

pytestmark = pytest.mark.cluster
ENVIRONMENT = dict(os.environ)
WRITABLE = ("/tmp", "/var/tmp", "/dev/shm", "/run", str(Path.home()))


@pytest.fixture(scope="module")
def pair(wire):
    return wire.host("one"), wire.host("two")


def sh(host, script):
    return host.run(["sh", "-c", script], ENVIRONMENT)


def test_a_file_of_one_host_is_not_seen_by_another_nor_by_this_machine(pair):
    one, two = pair
    for folder in WRITABLE:
        path = f"{folder}/left-by-one-{os.getpid()}"
        assert sh(one, f"echo here > {path} && cat {path}").stdout == "here\n"
        assert sh(two, f"test ! -e {path}").returncode == 0, f"{path} is seen by the other host"
        assert not os.path.exists(path), f"{path} is seen by this machine"


def test_everything_else_is_read_only(pair):
    places = [
        ROOT,
        Path(sys.prefix).resolve(),
        Path(sys.base_prefix).resolve(),
        "/etc",
        "/usr",
        "/var",
        "/dev",
        "/sys/fs/cgroup",
    ]
    for place in places:
        refused = sh(pair[0], f"touch {place}/written")
        assert refused.returncode != 0, f"{place} can be written to"
        assert "Read-only file system" in refused.stderr
    # No other mount can be written to either, whatever this machine has mounted.
    mounts = sh(pair[0], "cat /proc/self/mountinfo").stdout.splitlines()
    top = {fields[4]: fields[5] for fields in map(str.split, mounts)}
    hidden = ("/proc", "/dev/pts")
    writable = [
        point for point, options in top.items() if options.split(",")[0] == "rw" and not point.startswith(hidden)
    ]
    assert sorted(writable) == sorted(WRITABLE)


def test_processes_names_and_sockets_are_its_own(pair):
    one, two = pair
    sleeper = one.start("sleeper.log", ["sleep", "4321"], ENVIRONMENT)
    until(lambda: one.processes("sleep 4321"), 10, "the process is there")
    assert "sleep 4321" not in sh(two, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '").stdout
    assert [sh(host, "hostname").stdout.strip() for host in pair] == ["one", "two"]
    with socket.socket() as here:
        here.bind(("127.0.0.1", 0))
        here.listen()
        reached = one.run(
            [
                sys.executable,
                "-c",
                f"import socket; socket.create_connection(('127.0.0.1', {here.getsockname()[1]}), 3)",
            ],
            ENVIRONMENT,
        )
    assert "ConnectionRefusedError" in reached.stderr
    assert sleeper.poll() is None


SERVE = """
import socket
server = socket.create_server(("0.0.0.0", 9000))
print("up", flush=True)
while True:
    server.accept()[0].sendall(b"hello")
"""
ASK = "import socket, sys; print(socket.create_connection((sys.argv[1], 9000), 3).recv(9))"


def test_the_network_joins_them_until_it_is_cut(pair):
    one, two = pair
    two.start("serve.log", [sys.executable, "-c", SERVE], ENVIRONMENT)
    until(lambda: (two.wire.logs / "serve.log").read_text(), 20, "the server is up")
    ask = [sys.executable, "-c", ASK, two.address]
    assert one.run(ask, ENVIRONMENT).stdout == "b'hello'\n"
    two.cut()
    assert "TimeoutError" in one.run(ask, ENVIRONMENT).stderr
    two.mend()
    assert one.run(ask, ENVIRONMENT).stdout == "b'hello'\n"


def test_a_killed_host_comes_back_empty_at_the_same_address(pair):
    two = pair[1]
    running = two.start("killed.log", ["sleep", "4321"], ENVIRONMENT)
    sh(two, "touch /tmp/before")
    until(lambda: two.processes("sleep 4321"), 10, "the process is there")
    two.kill()
    assert running.wait(10) != 0
    two.boot()
    assert two.processes("sleep 4321") == 0
    assert "before" not in sh(two, "ls -A /tmp").stdout.split()
    assert sh(two, "hostname").stdout == "two\n"
    assert two.address in sh(two, "ip -4 -o address show eth0").stdout


def test_this_machines_network_is_as_before(wire, pair):
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    assert "wire" not in links
    assert not any(host.port in links for host in pair)
    assert all(host.port in wire.ip("-o", "link") for host in pair)
