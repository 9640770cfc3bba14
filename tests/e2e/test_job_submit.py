"""The README's road to a cluster: a Ray head with token authentication, and the unchanged job submitted to it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.support import TINY, write_shards

ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return reply.status < 500
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)  # it is there and asks for the token
    except OSError:
        return False


@pytest.fixture
def head(tmp_path):
    """A Ray head of our own, ended by its process group."""
    port, dashboard = free_port(), free_port()
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    environment = {
        **clean,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "ITPN_HOME": str(tmp_path / "home"),
        "PATH": f"{Path(sys.executable).parent}:{clean['PATH']}",
    }
    temp = Path("/tmp") / f"ray-test-{os.getpid()}"  # short: Unix sockets below it have 107 characters
    words = [
        "start", "--head", "--block", "--num-cpus=2", f"--port={port}", "--node-ip-address=127.0.0.1",
        f"--dashboard-port={dashboard}", f"--temp-dir={temp}", "--include-dashboard=true",
        # Ray's defaults, which another head on this machine may hold: jobs would wait for an agent for ever.
        f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}",
    ]  # fmt: skip
    with (
        (tmp_path / "head.log").open("w") as log,
        subprocess.Popen([RAY, *words], env=environment, stdout=log, stderr=log, start_new_session=True) as process,
    ):
        url = f"http://127.0.0.1:{dashboard}"
        deadline = time.monotonic() + 120
        while not answers(f"{url}/api/version"):
            assert process.poll() is None, (tmp_path / "head.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield url, environment
        os.killpg(process.pid, signal.SIGKILL)
    shutil.rmtree(temp, ignore_errors=True)


def test_submitted_job_runs_and_lands_in_the_same_mlflow(head, tmp_path):
    url, environment = head
    home = Path(environment["ITPN_HOME"])
    (home / "data").mkdir(parents=True)
    Path(write_shards(tmp_path / "made", per_class=40)).rename(home / "data" / "fashion-mnist")
    settings = [word for word in TINY if not word.startswith("track.follow")]
    submit = [
        RAY, "job", "submit", "--address", url, "--working-dir", ".", "--",
        "python", "jobs/pretrain.py", *settings, "cluster.workers=2", "run.name=job", "train.epochs=1",
    ]  # fmt: skip
    done = subprocess.run(submit, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "k-NN trained" in done.stdout
    record = json.loads((home / "runs" / "job" / "run.json").read_text())
    assert record["finished"] is True
    assert (home / "runs" / "mlflow.db").exists()

    wrong = {**environment, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "wrong")}
    (tmp_path / "wrong").write_text("f" * 32)
    refused = subprocess.run(submit, cwd=ROOT, env=wrong, capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 1
