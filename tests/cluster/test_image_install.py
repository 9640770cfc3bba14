"""The image's install script in a clean Debian, made by debootstrap: everything of the Dockerfile but the container."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUITE = "bookworm"
TLS_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(7200)]


def pip_settings():
    """This host's way to the package index, as environment variables, and the places that they name."""
    pip = [sys.executable, "-m", "pip", "config", "list"]
    shown = subprocess.run(pip, capture_output=True, text=True, check=True).stdout
    found = {}
    for line in shown.splitlines():
        name, value = line.split("=", 1)
        found[f"PIP_{name.rsplit('.', 1)[1].upper().replace('-', '_')}"] = value.strip("'\"")
    found |= {key: value for key, value in os.environ.items() if key.lower().endswith("_proxy")}
    words = " ".join(found.values()).replace("file://", "").split()
    places = [Path(word) for word in words if word.startswith("/") and Path(word).exists()]
    # An index on this disk (".../simple") names its files relative to itself: they lie beside it.
    return found, [place.parent if place.name == "simple" else place for place in places]


def enter(root, binds, environment, *command):
    """A command inside the root, in mount and process namespaces of its own: nothing of it stays behind."""
    lines = [
        "set -e",
        f"mount -t proc proc {root}/proc",
        f"mount --rbind /dev {root}/dev",
        f"mount -t tmpfs tmpfs {root}/tmp",
        # What a container's runtime does for name resolution.
        f"cp --dereference /etc/resolv.conf {root}/etc/resolv.conf",
    ]
    for path in binds:
        target = root / path.relative_to("/")
        target.mkdir(parents=True, exist_ok=True) if path.is_dir() else target.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_dir():
            target.touch()
        lines.append(f"mount --bind {path} {target}")
    words = [f"{name}={value}" for name, value in environment.items()]
    lines.append('exec chroot "$@"')
    inside = ["/usr/bin/env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", *words, *command]
    own = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    return subprocess.run(
        [*own, "bash", "-c", "\n".join(lines), "enter", str(root), *inside],
        capture_output=True, text=True, check=False, timeout=7000,
    )  # fmt: skip


@pytest.fixture
def clean_debian(tmp_path):
    if os.getuid() or not shutil.which("debootstrap"):
        pytest.skip("needs root and debootstrap (apt-get install debootstrap)")
    root = tmp_path / "debian"
    made = subprocess.run(
        ["debootstrap", "--variant=minbase", SUITE, str(root)], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    yield root
    shutil.rmtree(root, ignore_errors=True)


def test_the_install_script_makes_a_clean_debian_train(clean_debian):
    dockerfile = (ROOT / "infra" / "image" / "Dockerfile").read_text()
    assert "FROM debian:12" in dockerfile
    assert "RUN infra/image/install.sh" in dockerfile
    for line in dockerfile.splitlines():
        if line.startswith("COPY"):
            *sources, target = line.split()[1:]
            for source in sources:
                place = clean_debian / "opt" / "itpn" / target / (source if target == "./" else "")
                place.parent.mkdir(parents=True, exist_ok=True)
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, place)
    environment, binds = pip_settings()
    if TLS_BUNDLE.exists():
        # The bundle that pip reads would otherwise be replaced when ca-certificates is installed.
        bundle = clean_debian / "etc" / "itpn-ca.crt"
        shutil.copy(TLS_BUNDLE, bundle)
        environment["PIP_CERT"] = "/etc/itpn-ca.crt"
        binds = [path for path in binds if path != TLS_BUNDLE]
    done = enter(clean_debian, binds, environment, "/opt/itpn/infra/image/install.sh", "cuda")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "checks passed" in done.stdout
    print(done.stdout[-3000:])
    refused = enter(clean_debian, binds, {}, "/opt/itpn/infra/image/install.sh", "gpu")
    assert refused.returncode == 2
    assert "usage" in refused.stderr
