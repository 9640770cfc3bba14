"""The Dockerfile, built by buildah on a clean Debian made by debootstrap, and what the image does as its own user."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUITE = "bookworm"
TLS_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
IMAGE, BASE = "localhost/itpn-orchestrator:test", "localhost/debian:clean"
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]

TRAIN = """
set -e
cd /opt/itpn
export ITPN_HOME=/tmp/itpn
python - <<'PYTHON'
from pathlib import Path
import numpy as np
from PIL import Image
rng = np.random.default_rng(0)
for label in range(4):
    folder = Path(f"/tmp/pictures/class-{label}")
    folder.mkdir(parents=True)
    for number in range(24):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
PYTHON
python jobs/make_shards.py /tmp/pictures /tmp/shards --shard-samples 16 --val-fraction 0.25
python jobs/pretrain.py --recipe jobs/recipes/first_run.yaml data.source=/tmp/shards run.name=image train.epochs=1 \
  eval.bank=32 eval.queries=16 eval.k=5 train.global_batch=16
"""


def pip_settings():
    """This host's way to the package index as a pip.conf, and the places on this disk that it names."""
    pip = [sys.executable, "-m", "pip", "config", "list"]
    shown = subprocess.run(pip, capture_output=True, text=True, check=True).stdout
    found = {}
    for line in shown.splitlines():
        name, value = line.split("=", 1)
        found[name.rsplit(".", 1)[1]] = value.strip("'\"")
    words = " ".join(found.values()).replace("file://", "").split()
    places = [Path(word) for word in words if word.startswith("/") and Path(word).exists()]
    # An index on this disk (".../simple") names its files relative to itself: they lie beside it.
    return found, {place.parent if place.name == "simple" else place for place in places}


class Buildah:
    """Images in a folder of the test's own, built in chroots: no daemon, nothing else on the machine is touched."""

    def __init__(self, place):
        self.words = ["buildah", "--root", str(place / "store"), "--runroot", str(place / "run")]
        self.words += ["--storage-driver", "overlay"]

    def __call__(self, *words, code=0):
        done = subprocess.run([*self.words, *words], capture_output=True, text=True, check=False, timeout=3000)
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout.strip()

    def run(self, container, *command, code=0):
        """What a command in a container prints, as the image's user."""
        return self("run", "--isolation", "chroot", container, "--", *command, code=code)


@pytest.fixture(scope="module")
def buildah(tmp_path_factory):
    lacking = [name for name in ("debootstrap", "buildah") if not shutil.which(name)]
    if os.getuid() or lacking:
        pytest.skip(f"needs root, debootstrap and buildah (apt-get install debootstrap buildah); missing: {lacking}")
    place = tmp_path_factory.mktemp("images")
    tool = Buildah(place)
    yield tool
    tool("rm", "--all")
    tool("rmi", "--all", "--force")
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def volumes(buildah, tmp_path_factory):
    """Makes the base image, with this host's way to the package index; returns the places that it needs."""
    debian = tmp_path_factory.mktemp("base") / "debian"
    made = subprocess.run(
        ["debootstrap", "--variant=minbase", SUITE, str(debian)], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    settings, places = pip_settings()
    settings.pop("constraint", None)  # the image has its own
    if TLS_BUNDLE.exists():
        # The bundle that pip reads would otherwise be replaced when ca-certificates is installed.
        shutil.copy(TLS_BUNDLE, debian / "etc" / "host-ca.crt")
        settings["cert"] = "/etc/host-ca.crt"
    lines = [f"{name} = {value}" for name, value in settings.items()]
    (debian / "etc" / "pip.conf").write_text("\n".join(["[global]", *lines, ""]))
    container = buildah("from", "scratch")
    buildah("add", container, str(debian), "/")
    buildah("commit", "--rm", container, BASE)
    shutil.rmtree(debian)
    return [f"--volume={place}:{place}:ro" for place in places if place not in (TLS_BUNDLE, TLS_BUNDLE.parent)]


def build(buildah, volumes, variant, code=0):
    """`docker build` as the Dockerfile's head says it, but for the base image, which no registry is asked for."""
    return buildah(
        "bud", "--isolation", "chroot", "--pull-never", "--from", BASE, "--file", f"{ROOT}/infra/image/Dockerfile",
        "--ignorefile", f"{ROOT}/infra/image/Dockerfile.dockerignore", "--build-arg", f"VARIANT={variant}",
        "--tag", IMAGE, *volumes, str(ROOT), code=code,
    )  # fmt: skip


def test_the_dockerfile_makes_an_image_that_trains(buildah, volumes):
    assert "FROM debian:12" in (ROOT / "infra" / "image" / "Dockerfile").read_text()
    assert "checks passed" in build(buildah, volumes, "cuda")
    container = buildah("from", "--pull-never", IMAGE)
    assert buildah.run(container, "id", "--user") == "1000"
    assert "finished" in buildah.run(container, "bash", "-c", TRAIN + "grep -o finished /tmp/itpn/runs/image/run.json")
    # What else the image is for: nodes of Ray, an MLflow server with accounts, the drain before a node is taken.
    assert "ray, version" in buildah.run(container, "ray", "--version")
    buildah.run(container, "python", "-c", "import mlflow.server.auth, psycopg2")
    buildah.run(container, "test", "-x", "infra/image/drain")
    buildah.run(container, "wget", "--version")


def test_an_unknown_variant_builds_nothing(buildah, volumes):
    build(buildah, volumes, "gpu", code=2)
