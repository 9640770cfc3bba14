"""The house's arrows: jobs -> orchestrator -> itpn_core, and one door per third-party name."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("itpn_core", "orchestrator", "jobs")
CORE_ALLOWED = {"torch", "timm", "numpy", "safetensors", "itpn_core"} | set(sys.stdlib_module_names)

# Third-party name -> the folders that may import it.
DOORS = {
    "ray": ("orchestrator/launch", "orchestrator/sweep"),
    "mlflow": ("orchestrator/track",),
    "webdataset": ("orchestrator/data",),
    "obstore": ("orchestrator/data",),
    "omegaconf": ("orchestrator/config",),
    "yaml": ("orchestrator/config",),
    "optuna": ("orchestrator/sweep",),
    "onnxscript": ("orchestrator/export",),
    "onnxruntime": ("orchestrator/export",),
}


def files(package):
    return sorted((ROOT / package).rglob("*.py"))


def imported(path):
    """(line, full module name) of every import in a file, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.lineno, node.module


@pytest.mark.parametrize(
    "path", [p for package in PACKAGES for p in files(package)], ids=lambda p: str(p.relative_to(ROOT))
)
def test_arrows_point_one_way(path):
    place = path.relative_to(ROOT).as_posix()
    room = place.split("/", maxsplit=1)[0]
    for line, module in imported(path):
        top = module.split(".")[0]
        if room == "itpn_core":
            # The benchmark may time dense libraries that are there, but never needs them.
            assert top in CORE_ALLOWED, f"{place}:{line}: itpn_core imports {module}"
        if room == "orchestrator":
            assert top != "jobs", f"{place}:{line}: orchestrator imports {module}"
        if top in DOORS:
            assert place.startswith(DOORS[top]), f"{place}:{line}: {module} belongs in {', '.join(DOORS[top])}"


@pytest.mark.parametrize("path", files("jobs"), ids=lambda p: p.name)
def test_jobs_are_thin(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80


def test_the_scan_sees_imports():
    """The arrows would pass on an empty list too."""
    seen = {module.split(".")[0] for package in PACKAGES for path in files(package) for _, module in imported(path)}
    assert {"ray", "mlflow", "webdataset", "obstore", "omegaconf", "torch", "timm"} <= seen
