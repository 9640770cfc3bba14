"""A Ray cluster on namespace hosts: one for S3, one for the head without CPUs, and workers of one CPU each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from tests.cluster.hosts import ROOT, Host, Wire, until
from tests.support import TINY, write_images

BIN = Path(sys.executable).parent
TOKEN = "0123456789abcdef0123456789abcdef"
KEYS = {"AWS_ACCESS_KEY_ID": "cluster", "AWS_SECRET_ACCESS_KEY": "cluster-secret", "AWS_REGION": "us-east-1"}
SHARDS, RUNS = "s3://itpn/shards/tiny", "s3://itpn/runs"
STORE = 80 * 1024 * 1024


def profile(name: str) -> dict[str, str]:
    """The recovery settings of `infra/recovery/NAME.env`, as a node would be given them."""
    lines = (ROOT / "infra" / "recovery" / f"{name}.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


class Cluster:
    """Hosts, storage and Ray; the test itself stands outside and looks in."""

    def __init__(self, wire: Wire, workers: int = 3, recovery: str = "test") -> None:
        self.wire = wire
        self.recovery = profile(recovery)
        self.storage = wire.host("storage")
        self.head = wire.host("head")
        self.workers = [wire.host(f"worker{number}") for number in range(1, workers + 1)]
        self.jobs = 0
        self.caller = self.storage.caller()
        self.s3: Any = None

    def environment(self, host: Host) -> dict[str, str]:
        """What every process of a host finds, secrets too."""
        foreign = ("RAY_", "MLFLOW_", "AWS_", "ITPN_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        return {
            **kept,
            **KEYS,
            **self.recovery,
            "PATH": f"{BIN}:{kept['PATH']}",
            "PYTHONPATH": str(ROOT),
            "AWS_ENDPOINT_URL": f"http://{self.storage.address}:8333",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": "/run/ray-token",
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": "/tmp",
        }

    # -- start ------------------------------------------------------------------------------------------------------

    def up(self) -> None:
        """Starts storage, the head and the workers, and makes the shards."""
        self._start_storage()
        self.start_ray(self.head)
        check = ["ray", "health-check", "--address", self.gcs]
        head = self.environment(self.head)
        until(lambda: self.head.run(check, head).returncode == 0, 90, "the head answers", 1)
        for worker in self.workers:
            self.start_ray(worker)
        self._make_shards()
        until(lambda: len(self.nodes()) == 1 + len(self.workers), 120, "all hosts are in the cluster", 1)

    @property
    def gcs(self) -> str:
        """Where nodes join."""
        return f"{self.head.address}:6379"

    @property
    def dashboard(self) -> str:
        """Where jobs are submitted."""
        return f"http://{self.head.address}:8265"

    def _start_storage(self) -> None:
        address = self.storage.address
        self.storage.start(
            "storage.log",
            ["weed", "mini", "-dir=/tmp", f"-ip={address}", f"-ip.bind={address}", "-webdav=false", "-admin.ui=false",
             "-s3.port.iceberg=0", "-s3.port.lance=0", "-bucket", "itpn"],
            self.environment(self.storage),
        )  # fmt: skip
        self.s3 = self.caller.submit(
            boto3.client, "s3", endpoint_url=f"http://{address}:8333", region_name="us-east-1",
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"], aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
            config=Config(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=20),
        ).result()  # fmt: skip

        def bucket() -> bool:
            try:
                return bool(self.call("head_bucket", Bucket="itpn"))
            except Exception:  # not there yet, in whichever way
                return False

        until(bucket, 60, "the object store answers")

    def start_ray(self, host: Host) -> None:
        """Starts the Ray node of a host."""
        (host.files / "run" / "ray-token").write_text(TOKEN)
        (host.files / "run" / "ray-token").chmod(0o600)
        words = ["ray", "start", "--block", f"--node-ip-address={host.address}", f"--object-store-memory={STORE}"]
        if host is self.head:
            words += [
                "--head",
                "--port=6379",
                "--num-cpus=0",
                f"--dashboard-host={host.address}",
                "--disable-usage-stats",
            ]
        else:
            words += [f"--address={self.gcs}", "--num-cpus=1"]
        host.start(f"{host.name}-ray.log", words, self.environment(host))

    def restart(self, host: Host) -> None:
        """Brings a host back that was killed: empty, and a new node to Ray."""
        host.boot()
        self.start_ray(host)

    def heal(self) -> None:
        """Switches on what is off, mends what is cut, and waits until every host is in the cluster."""
        for host in self.workers:
            if not host.pid:
                self.restart(host)
        for host in self.workers:
            host.mend()
        here = set(self.nodes())
        for host in self.workers:
            if host.address not in here:  # after a long cut Ray's node has given up
                host.kill()
                self.restart(host)
        until(lambda: len(self.nodes()) == 1 + len(self.workers), 120, "all hosts are in the cluster", 1)

    def nodes(self) -> dict[str, str]:
        """Node ids of the hosts that Ray counts as alive, by address, as `ray list nodes` on the head sees them."""
        words = ["ray", "list", "nodes", "--format=json", "--filter", "state=ALIVE", f"--address={self.dashboard}"]
        done = self.head.run(words, self.environment(self.head))
        if done.returncode:
            return {}
        return {node["node_ip"]: node["node_id"] for node in json.loads(done.stdout)}

    def drain(self, host: Host, seconds: int) -> None:
        """What the preStop hook of a preemptible pool runs in its pod before the host is taken away."""
        host.start("drain.log", ["infra/image/drain", str(seconds)], self.environment(host))

    def _make_shards(self) -> None:
        made = write_images(self.wire.logs / "images", per_class=240)
        shutil.copytree(made, self.head.files / "tmp" / "images")
        words = [
            sys.executable, "jobs/make_shards.py", "/tmp/images", SHARDS, "--shard-samples", "64",
            "--val-fraction", "0.25",
        ]  # fmt: skip
        done = self.head.run(words, self.environment(self.head), 300)
        assert done.returncode == 0, done.stderr

    # -- storage, seen from the storage's own host ---------------------------------------------------------------------

    def call(self, name: str, **arguments: Any) -> Any:
        """One S3 request, made in the storage host's network."""
        return self.caller.submit(lambda: getattr(self.s3, name)(**arguments)).result()

    def keys(self, prefix: str) -> list[str]:
        """Object names below a prefix."""
        return [item["Key"] for item in self.call("list_objects_v2", Bucket="itpn", Prefix=prefix).get("Contents", [])]

    def json(self, key: str) -> Any:
        """An object's JSON."""
        return json.loads(
            self.caller.submit(lambda: self.s3.get_object(Bucket="itpn", Key=key)["Body"].read()).result()
        )

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def submit(self, script: str, *settings: str, variables: dict[str, str] | None = None, token: str = "") -> Job:
        """`ray job submit` on the head; `token` is the path of another token there."""
        self.jobs += 1
        environment = self.environment(self.head)
        if token:
            environment["RAY_AUTH_TOKEN_PATH"] = token
        words = [
            "ray", "job", "submit", "--address", self.dashboard, "--submission-id", f"job-{self.jobs}",
            "--working-dir", ".", "--runtime-env-json", json.dumps({"env_vars": variables or {}}),
            "--", "python", script, *settings,
        ]  # fmt: skip
        log = f"job-{self.jobs}.log"
        return Job(self, f"job-{self.jobs}", self.wire.logs / log, self.head.start(log, words, environment))

    def pretrain(
        self, name: str, *settings: str, pace_s: float = 0.0, token: str = "", variables: dict[str, str] | None = None
    ) -> Job:
        """The pre-training job on the tiny data, its samples recorded (`recorded.py`)."""
        common = [word for word in TINY if not word.startswith("train.epochs")]
        places = [f"data.source={SHARDS}", f"run.storage={RUNS}", f"run.name={name}", "train.log_every=1"]
        return self.submit(
            "tests/cluster/recorded.py", *common, *places, *settings,
            variables={
                "ITPN_TEST_RECORDS": f"s3://itpn/recorded/{name}", "ITPN_TEST_PACE_S": str(pace_s), **(variables or {}),
            },
            token=token,
        )  # fmt: skip

    def committed(self, name: str) -> int:
        """Step of a run's newest committed checkpoint, -1 without one."""
        keys = self.keys(f"runs/{name}/checkpoints/")
        return max(
            (int(key.split("/")[3].removeprefix("step-")) for key in keys if key.endswith("COMMITTED.json")), default=-1
        )

    def hosts_in_use(self) -> list[Host]:
        """Hosts on which training processes live."""
        return [host for host in self.workers if host.pid and host.processes("RayTrainWorker")]

    def controller_log(self) -> list[dict[str, Any]]:
        """What Ray Train's controllers logged on the head, in order of time."""
        folder = self.head.files / "tmp" / "ray" / "session_latest" / "logs" / "train"
        folder = Path(str(folder).replace("session_latest", os.readlink(folder.parents[1]).rsplit("/", 1)[-1]))
        lines = [line for path in folder.glob("*controller*.log") for line in path.read_text().splitlines()]
        records = [json.loads(line) for line in lines if line.startswith("{")]
        return sorted(records, key=lambda record: record["timestamp_ns"])

    def close(self) -> None:
        """Ends the test's own thread; the hosts end with the wire."""
        self.caller.shutdown(wait=False, cancel_futures=True)


class Job:
    """A submitted job as its submitter sees it."""

    def __init__(self, cluster: Cluster, name: str, log: Path, process: subprocess.Popen[bytes]) -> None:
        self.cluster, self.name, self.log, self._process = cluster, name, log, process

    @property
    def text(self) -> str:
        """What was printed so far."""
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float) -> int:
        """Waits for the end; returns the exit code of `ray job submit`."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.name} has not ended after {seconds:.0f} s:\n{self.text[-3000:]}") from None

    def stop(self) -> None:
        """`ray job stop`."""
        words: Sequence[str] = ["ray", "job", "stop", "--address", self.cluster.dashboard, "--no-wait", self.name]
        done = self.cluster.head.run(list(words), self.cluster.environment(self.cluster.head))
        assert done.returncode == 0, done.stdout + done.stderr

    @property
    def running(self) -> bool:
        """Whether the submitter still waits."""
        return self._process.poll() is None
