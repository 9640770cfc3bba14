"""One documented sequence: S3, PostgreSQL, MLflow with login and Ray, started and stopped by infra/local."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import boto3
import psutil
import psycopg2
import pytest
from mlflow import MlflowClient

from tests.support import TINY, write_images

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SERVICES = ("s3", "postgres", "mlflow", "ray")
# Drawn anew: this file travels with the job, and a value that it held would be found in Ray's copy of it.
PLANTED = f"planted-{uuid.uuid4().hex}"
"""A further secret in the environment of Ray and of everything that it starts."""
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


def have_postgres():
    return bool(shutil.which("postgres") or list(Path("/usr/lib/postgresql").glob("*/bin/postgres")))


def clean():
    foreign = ("RAY_", "MLFLOW_", "AWS_", "ITPN_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {**kept, "ITPN_PYTHON": sys.executable, "PATH": f"{BIN}:{kept['PATH']}", "HF_TOKEN": PLANTED}


def free_ports(count):
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class LocalStack:
    """The scripts as a person runs them."""

    def __init__(self, home):
        self.home = home
        self.folder = home / "local"
        names = ("s3", "postgres", "mlflow", "ray", "dashboard")
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))

    def script(self, name, *words):
        return subprocess.run(
            [str(ROOT / "infra" / "local" / name), *words], env={**clean(), "ITPN_HOME": str(self.home)},
            capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip

    def up(self):
        done = self.script("up", *(word for n, port in self.ports.items() for word in (f"--{n}-port", str(port))))
        assert done.returncode == 0, done.stderr
        return done

    def environment(self, exports):
        shown = subprocess.run(
            ["bash", "-c", exports + "\nenv -0"], env=clean(), capture_output=True, text=True, check=True
        ).stdout
        return dict(item.split("=", 1) for item in shown.split("\0") if "=" in item)

    def processes(self):
        shown = {name: (self.folder / "running" / f"{name}.json") for name in SERVICES}
        return {name: path.read_text() for name, path in shown.items() if path.exists()}


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    if not have_postgres():
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    stack = LocalStack(tmp_path_factory.mktemp("stack"))
    try:
        stack.first = stack.up()
        stack.env = stack.environment(stack.first.stdout)
        yield stack
    finally:
        stack.script("down", "--delete-data")


def http_status(url, user=""):
    request = urllib.request.Request(url)
    if user:
        import base64

        request.add_header("Authorization", "Basic " + base64.b64encode(user.encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


def test_ray_runs_with_the_shipped_recovery_settings(stack):
    words = (ROOT / "infra" / "recovery" / "default.env").read_text().splitlines()
    shipped = {line for line in words if line and not line.startswith("#")}
    head = json.loads(stack.processes()["ray"])["pid"]
    assert shipped <= set(Path(f"/proc/{head}/environ").read_text().split("\0"))


def test_up_again_changes_nothing_and_prints_no_secret(stack):
    before = stack.processes()
    again = stack.up()
    assert stack.processes() == before
    assert again.stdout == stack.first.stdout
    assert again.stderr.count("running already") == len(SERVICES)
    for file in (stack.folder / "secrets").iterdir():
        assert file.stat().st_mode & 0o077 == 0
        assert file.read_text() not in again.stdout + again.stderr
    # Command lines are visible to every account.
    shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert not any(file.read_text() in shown for file in (stack.folder / "secrets").iterdir())


def test_every_port_that_ray_does_not_choose_is_on_loopback(stack):
    """Ray's own (GCS, raylet, metrics) are on all interfaces, behind the token; docs/security.md says so."""
    leaders = {name: json.loads(record)["pid"] for name, record in stack.processes().items()}
    found = {name: set() for name in SERVICES}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            for name in [name for name, leader in leaders.items() if os.getsid(process.pid) == leader]:
                listening = [c.laddr for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
                found[name].update((address.ip, address.port) for address in listening)
    loopback = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    for name in SERVICES:
        assert stack.ports[name] in {port for _, port in found[name]}, name
    assert {ip for name in ("s3", "postgres", "mlflow") for ip, _ in found[name]} <= loopback
    assert {ip for ip, port in found["ray"] if port == stack.ports["dashboard"]} <= loopback


def test_what_a_dead_service_left_is_stopped_before_it_starts_again(stack):
    """MLflow's first process is killed; its workers live on and hold the port."""
    leader = json.loads(stack.processes()["mlflow"])["pid"]
    os.kill(leader, signal.SIGKILL)
    again = stack.up()
    assert "mlflow: its first process had died; what it left was stopped" in again.stderr
    assert again.stderr.count("running already") == len(SERVICES) - 1
    assert json.loads(stack.processes()["mlflow"])["pid"] != leader
    assert http_status(f"{stack.env['MLFLOW_TRACKING_URI']}/health") == 200


def test_a_taken_port_is_named_and_nothing_is_stopped(stack, tmp_path):
    other = LocalStack(tmp_path)
    other.ports = stack.ports
    refused = other.script("up", *(word for n, port in stack.ports.items() for word in (f"--{n}-port", str(port))))
    assert refused.returncode == 1
    assert f"port {stack.ports['s3']} of 127.0.0.1 is taken" in refused.stderr
    assert other.script("down").returncode == 0
    assert stack.script("status").stdout.count(": running") == len(SERVICES)


@contextlib.contextmanager
def watched_commands():
    """All command lines that any account can see, from one end of the block to the other."""
    shown, done = set(), threading.Event()

    def look():
        while not done.wait(0.3):
            ps = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
            shown.update(ps.stdout.splitlines())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield shown
    finally:
        done.set()
        thread.join()


def test_shards_training_checkpoints_and_records_on_the_stack(stack, tmp_path):
    env = stack.env
    images = write_images(tmp_path / "images", 40)
    made = subprocess.run(
        [sys.executable, "jobs/make_shards.py", str(images), "s3://itpn/shards/tiny", "--shard-samples", "16",
         "--val-fraction", "0.25"],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    settings = [word for word in TINY if not word.startswith("track.follow")]
    # Settings that hold secrets, in a file of their own: a command line is for everybody to see.
    recipe = tmp_path / "recipe.yaml"
    server = env["MLFLOW_TRACKING_URI"].replace("http://", f"http://admin:{env['MLFLOW_TRACKING_PASSWORD']}@")
    recipe.write_text(f"track:\n  uri: {server}\n  description: asked with {PLANTED}\n")
    submit = [
        str(BIN / "ray"), "job", "submit", "--working-dir", ".", "--", "python", "jobs/pretrain.py", "--recipe",
        str(recipe), *settings, "cluster.workers=2", "run.name=job", "train.epochs=1", "data.source=s3://itpn/shards/tiny",
        "run.storage=s3://itpn/runs", "track.required=true",
    ]  # fmt: skip
    with watched_commands() as shown:
        done = subprocess.run(submit, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "k-NN trained" in done.stdout
    assert any("jobs/pretrain.py" in line for line in shown), "the job was seen"
    assert any("ray::" in line for line in shown), "its workers were seen"
    secrets = [file.read_text() for file in (stack.folder / "secrets").iterdir()]
    assert not [line for line in shown for secret in (*secrets, PLANTED) if secret in line]

    s3 = boto3.client(
        "s3", endpoint_url=env["AWS_ENDPOINT_URL"], region_name="us-east-1",
        aws_access_key_id=env["AWS_ACCESS_KEY_ID"], aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
    )  # fmt: skip
    keys = [item["Key"] for item in s3.list_objects_v2(Bucket="itpn")["Contents"]]
    assert any(key.startswith("runs/job/checkpoints/step-") and key.endswith("COMMITTED.json") for key in keys)
    assert "runs/job/run.json" in keys
    assert any(key.startswith("mlflow/") and key.endswith("config.yaml") for key in keys), "artifacts go through S3"
    assert not list(Path(env.get("HOME", "/")).glob("mlruns"))

    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        os.environ[name] = env[name]
    try:
        client = MlflowClient(env["MLFLOW_TRACKING_URI"])
        experiments = [e.experiment_id for e in client.search_experiments()]
        (run,) = [r for r in client.search_runs(experiments) if r.info.run_name == "job"]
        assert run.info.status == "FINISHED"
        assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
        assert {"config.yaml", "weights"} <= {a.path for a in client.list_artifacts(run.info.run_id)}
    finally:
        del os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]

    password = (stack.folder / "secrets" / "postgres-password").read_text()
    where = {"host": "127.0.0.1", "port": stack.ports["postgres"], "user": "itpn", "dbname": "mlflow"}
    with psycopg2.connect(**where, password=password) as database, database.cursor() as cursor:
        cursor.execute("SELECT status FROM runs WHERE name = 'job'")
        assert cursor.fetchall() == [("FINISHED",)]
    with pytest.raises(psycopg2.OperationalError, match="password"):
        psycopg2.connect(**where, password="wrong")


def files_in(folders):
    """(place, bytes) of all files; Ray lives and may remove one under our hands."""
    for path in (path for folder in folders for path in folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            with contextlib.suppress(FileNotFoundError):
                yield str(path), path.read_bytes()


def everything_in(bucket):
    """(place, bytes) of all objects: run folder, checkpoints, journal, artifacts."""
    for page in bucket.get_paginator("list_objects_v2").paginate(Bucket="itpn"):
        for item in page.get("Contents", []):
            yield f"s3://itpn/{item['Key']}", bucket.get_object(Bucket="itpn", Key=item["Key"])["Body"].read()


def rows_of(stack, name):
    """(place, bytes) of every table of a database."""
    password = (stack.folder / "secrets" / "postgres-password").read_text()
    where = {"host": "127.0.0.1", "port": stack.ports["postgres"], "user": "itpn", "dbname": name}
    with psycopg2.connect(**where, password=password) as database, database.cursor() as cursor:
        cursor.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        for (table,) in cursor.fetchall():
            cursor.execute(f'SELECT t::text FROM "{table}" t')
            yield f"{name}.{table}", "\n".join(row[0] for row in cursor.fetchall()).encode()


def shown_by_ray(stack):
    """(place, bytes) of what anybody may ask who has the token."""
    listed = subprocess.run(
        [str(BIN / "ray"), "job", "list"], env=stack.env, capture_output=True, text=True, timeout=120, check=True
    )
    yield "ray job list", (listed.stdout + listed.stderr).encode()
    token = (stack.folder / "secrets" / "ray-token").read_text()

    def get(path):
        url = f"{stack.env['RAY_API_SERVER_ADDRESS']}{path}"
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.read()

    jobs = get("/api/jobs/")
    yield "/api/jobs/", jobs
    for job in json.loads(jobs):
        if job["submission_id"]:
            yield f"logs of {job['submission_id']}", get(f"/api/jobs/{job['submission_id']}/logs")


def test_no_secret_is_in_anything_that_was_written(stack):
    """Real credentials of the stack, one more in the environment, and settings that hold them (the job's recipe)."""
    bucket = boto3.client(
        "s3", endpoint_url=stack.env["AWS_ENDPOINT_URL"], region_name="us-east-1",
        aws_access_key_id=stack.env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=stack.env["AWS_SECRET_ACCESS_KEY"],
    )  # fmt: skip
    uid = json.loads(bucket.get_object(Bucket="itpn", Key="runs/job/run.json")["Body"].read())["run_uid"]
    session = Path("/tmp") / f"itpn-ray-{os.getuid()}-{stack.ports['ray']}"
    folders = [session, Path("/tmp") / f"itpn-run-{uid}", stack.folder / "logs", stack.folder / "data" / "mlflow"]
    written = {
        **dict(files_in(folders)),
        **dict(everything_in(bucket)),
        **dict(rows_of(stack, "mlflow")),
        **dict(rows_of(stack, "mlflow_auth")),
        **dict(shown_by_ray(stack)),
    }
    # The search finds what is there: in every kind of place, the name of the run or of its model.
    for start, word in (
        (str(session), b"jobs/pretrain.py"), ("/tmp/itpn-run-", b"train/loss"), ("mlflow.", b"train/loss"),
        ("s3://itpn/runs/job/journal", b"train/loss"), ("s3://itpn/runs/job/checkpoints", b"steps_per_epoch"),
        ("ray job list", b"pretrain.py"), ("/api/jobs/", b"pretrain.py"), ("logs of", b"k-NN trained"),
    ):  # fmt: skip
        assert any(word in body for place, body in written.items() if place.startswith(start)), f"{word} in {start}"
    secrets = {file.name: file.read_bytes() for file in (stack.folder / "secrets").iterdir()}
    secrets["HF_TOKEN"] = PLANTED.encode()
    leaks = {
        f"{name} in {place}" for place, body in written.items() for name, value in secrets.items() if value in body
    }
    assert leaks == set()


def test_login_is_demanded_and_the_ui_answers(stack):
    url = stack.env["MLFLOW_TRACKING_URI"]
    api = f"{url}/api/2.0/mlflow/experiments/search?max_results=1"
    good = f"admin:{stack.env['MLFLOW_TRACKING_PASSWORD']}"
    assert http_status(api) == 401
    assert http_status(api, "admin:wrong") == 401
    assert http_status(api, good) == 200
    assert http_status(f"{url}/", good) == 200


def test_wrong_s3_credentials_end_with_one_line_before_any_worker(stack):
    """Within seconds, exit code 2, and no second line."""
    environment = {**stack.env, "AWS_SECRET_ACCESS_KEY": "wrong"}
    settings = [word for word in TINY if not word.startswith("track.follow")]
    command = [sys.executable, "jobs/pretrain.py", *settings, "data.source=s3://itpn/shards/tiny"]
    began = time.monotonic()
    done = subprocess.run(
        [*command, "run.storage=s3://itpn/runs"], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert time.monotonic() - began < 15
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "access refused; check the credentials" in done.stderr


def test_down_stops_what_it_started_and_only_that(stack):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"]) as bystander:
        record = stack.folder / "running" / "ray.json"
        kept = record.read_text()
        # A record whose process number was given to somebody else in the meantime.
        record.write_text(f'{{"pid": {bystander.pid}, "birth": "1", "command": []}}')
        assert "ray: was not running" in stack.script("down").stderr
        assert bystander.poll() is None
        bystander.kill()
    record.write_text(kept)
    assert "ray: stopped" in stack.script("down").stderr
    for port in stack.ports.values():
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0, f"port {port} is still served"
    for name in SERVICES:
        assert (stack.folder / "logs" / f"{name}.log").stat().st_size > 0
