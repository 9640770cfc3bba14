"""What ran: code identity, package versions, hardware. Unknown is said, never invented."""

from __future__ import annotations

import getpass
import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

UNKNOWN: Final = "unknown"
_ROOT: Final = Path(__file__).resolve().parents[2]
_SHIPPED: Final = ("itpn_core", "orchestrator", "jobs")
_SUFFIXES: Final = frozenset({".py", ".yaml"})
_PACKAGES: Final = (
    "torch", "torchvision", "timm", "ray", "webdataset", "mlflow", "omegaconf", "numpy", "safetensors", "obstore",
    "simplejpeg", "pillow", "optuna", "matplotlib",
)  # fmt: skip
_DIFF_LIMIT: Final = 1 << 20


@dataclass(frozen=True)
class CodeIdentity:
    """Which code ran.

    Attributes:
        commit: git commit, or "unknown".
        state: "clean", "dirty (N files)" or "unknown".
        source: SHA-256 over the shipped Python and recipe files; always known, equal wherever the same code runs.
        diff: changes against the commit ("" when clean or unknown).
    """

    commit: str
    state: str
    source: str
    diff: str = ""


def source_hash(root: Path = _ROOT) -> str:
    """SHA-256 of the code that is on this machine: relative names and contents of our packages, sorted."""
    digest = hashlib.sha256()
    for package in _SHIPPED:
        for path in sorted((root / package).rglob("*")):
            if path.suffix in _SUFFIXES and path.is_file():
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"{path.relative_to(root).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def code_identity(given_commit: str = "", root: Path = _ROOT) -> CodeIdentity:
    """The identity of the code below `root`.

    Args:
        given_commit: commit named by whoever shipped the code (GIT_COMMIT of a submitted job, whose copy has no
            repository); a repository at `root` knows better and wins.
        root: directory that holds our packages.
    """
    source = source_hash(root)
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "HEAD") if top and Path(top).resolve() == root.resolve() else None
    if not commit:
        return CodeIdentity(given_commit or UNKNOWN, UNKNOWN, source)
    changed = (_git(root, "status", "--porcelain") or "").splitlines()
    if not changed:
        return CodeIdentity(commit, "clean", source)
    diff = _git(root, "diff", "HEAD", "--no-color") or ""
    return CodeIdentity(commit, f"dirty ({len(changed)} files)", source, diff[:_DIFF_LIMIT])


def _git(root: Path, *words: str) -> str | None:
    """Output of a git command; None where there is no git, no repository, or no answer."""
    program = shutil.which("git")
    if program is None:
        return None
    command = [program, "-C", str(root), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603 (fixed words)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip("\n") if done.returncode == 0 else None


def driver_facts(environ: Mapping[str, str] = os.environ, root: Path = _ROOT) -> dict[str, str]:
    """Tags that only the driver can know: who started what, from which code (the border reads the environment here).

    The names with `mlflow.` are those that the UI shows in its columns.
    """
    code = code_identity(environ.get("GIT_COMMIT", ""), root)
    facts = {
        "mlflow.user": _user(),
        "mlflow.source.name": Path(sys.argv[0]).name or UNKNOWN,
        "mlflow.source.type": "JOB"
        if environ.get("RAY_JOB_ID") or environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
        else "LOCAL",
        "git.commit": code.commit,
        "git.state": code.state,
        "source.sha256": code.source,
        "image": environ.get("CONTAINER_IMAGE", UNKNOWN),
    }
    if code.commit != UNKNOWN:
        facts["mlflow.source.git.commit"] = code.commit
    return facts


def working_diff(root: Path = _ROOT) -> str:
    """Changes against the commit, for the artifact `git.diff`; "" when there are none or no repository."""
    return code_identity(root=root).diff


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a passwd entry
        return UNKNOWN


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def hardware() -> dict[str, Any]:
    """This host: name, system, processors, memory, accelerators."""
    import psutil
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "host": socket.gethostname(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "accelerators": devices,
        "cuda": torch.version.cuda or "none",
    }


def _processor() -> str:
    """The model name that Linux gives; platform.processor() is empty there."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine() or UNKNOWN


def environment_text() -> str:
    """Versions and hardware of this host for a person to read: the artifact `environment.txt`."""
    rows = [*hardware().items(), ("", ""), *versions().items()]
    shown = [(name, ", ".join(value) or "none" if isinstance(value, list) else str(value)) for name, value in rows]
    return "\n".join(f"{name:<14} {value}".rstrip() for name, value in shown) + "\n"
