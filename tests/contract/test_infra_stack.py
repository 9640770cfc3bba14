"""Image, compose file, alerts and dashboard: checked by the tools that read them, and against what the code exports."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from orchestrator.launch import metrics

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
BIN = Path(sys.executable).parent
IMAGE, COMPOSE = INFRA / "image", INFRA / "compose" / "compose.yaml"
SERVICES = yaml.safe_load(COMPOSE.read_text())["services"]


def run(*command, env=None):
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, cwd=ROOT, env=env
    )


# -- image ----------------------------------------------------------------------------------------------------------


def test_dockerfile_passes_its_linter(tmp_path):
    done = run(BIN / "hadolint", "--failure-threshold", "style", IMAGE / "Dockerfile")
    assert done.returncode == 0, done.stdout
    bad = tmp_path / "Dockerfile"
    bad.write_text((IMAGE / "Dockerfile").read_text().replace("debian:12.12-slim", "debian:latest"))
    assert run(BIN / "hadolint", bad).returncode != 0


def test_image_is_made_by_one_script_and_runs_without_root():
    lines = (IMAGE / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("RUN")] == [
        "RUN useradd --uid 1000 --create-home itpn",
        'RUN infra/image/install.sh "$VARIANT"',
    ]
    assert lines[-1] == "USER 1000"
    script = (IMAGE / "install.sh").read_text()
    assert not re.search(r"(curl|wget)[^\n]*\|", script)
    assert script.rstrip().splitlines()[-2].startswith("python jobs/doctor.py")
    assert os.access(IMAGE / "install.sh", os.X_OK)
    assert os.access(IMAGE / "drain", os.X_OK)


def test_the_image_gets_what_it_copies_and_nothing_else():
    copied = set()
    for line in (IMAGE / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            copied |= set(line.split()[1:-1])
    ignore = (IMAGE / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignore if line.startswith("!")} == copied
    assert "*" in ignore
    assert all((ROOT / source).exists() for source in copied)


def test_install_refuses_an_unknown_variant():
    done = run("bash", IMAGE / "install.sh", "gpu")
    assert done.returncode == 2
    assert "cuda|cpu" in done.stderr


# -- compose --------------------------------------------------------------------------------------------------------


def test_compose_reads_the_file(tmp_path):
    done = run(BIN / "docker-compose", "--file", COMPOSE, "config", "--format", "json")
    assert done.returncode == 0, done.stderr
    services = json.loads(done.stdout)["services"]
    assert set(services) == {"s3", "postgres", "mlflow", "ray", "prometheus", "grafana"}
    assert services["ray"]["environment"]["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "900"
    bad = tmp_path / "compose.yaml"
    bad.write_text(COMPOSE.read_text().replace("mem_limit: 512m", "memory_limit: 512m"))
    refused = run(BIN / "docker-compose", "--file", bad, "config", "--quiet")
    assert refused.returncode != 0
    assert "memory_limit" in refused.stderr


def test_compose_passes_its_linter():
    done = run(BIN / "compose-lint", "check", "--format", "json", "--fail-on", "low", COMPOSE)
    rules = set(re.findall(r'"(CL-\d+)"', done.stdout))
    # Digests of images are for the one who deploys: this file was never pulled.
    assert rules == {"CL-0019"}, done.stdout


def test_compose_publishes_on_loopback_and_runs_without_root():
    for name, service in SERVICES.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["user"].split(":")[0] not in ("root", "0"), name
        assert service["cap_drop"] == ["ALL"], name
        assert service["read_only"] is True or name == "grafana", name


def test_compose_demands_logins():
    assert "--app-name basic-auth" in SERVICES["mlflow"]["command"][0]
    assert SERVICES["ray"]["environment"]["RAY_AUTH_MODE"] == "token"
    assert "RAY_AUTH_TOKEN_PATH=/run/secrets/ray-token" in SERVICES["ray"]["command"][0]
    assert SERVICES["grafana"]["environment"]["GF_AUTH_ANONYMOUS_ENABLED"] == "false"
    assert SERVICES["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD__FILE"] == "/run/secrets/grafana-password"


def test_secrets_are_drawn_once_and_closed(tmp_path):
    script = tmp_path / "secrets"
    shutil.copy(INFRA / "compose" / "secrets", script)
    first = run(script)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "secrets.d"
    assert folder.stat().st_mode & 0o077 == 0
    drawn = {path.name: path.read_text() for path in folder.iterdir()}
    assert set(drawn) == set(yaml.safe_load(COMPOSE.read_text())["secrets"])
    assert all(len(value) == 32 for value in drawn.values())
    assert len(set(drawn.values())) == len(drawn)
    assert not any(value in first.stdout + first.stderr for value in drawn.values())
    assert run(script).stdout == ""
    assert {path.name: path.read_text() for path in folder.iterdir()} == drawn
    assert "/infra/compose/secrets.d/" in (ROOT / ".gitignore").read_text().splitlines()


# -- what is seen ---------------------------------------------------------------------------------------------------


def exported():
    """Prometheus' names of what `orchestrator.launch.metrics` shows; tests/e2e/test_metrics.py reads them off Ray."""
    gauges = {f"ray_{name}" for name, _ in metrics.GAUGES.values()}
    histogram = {f"ray_{metrics.STEP_SECONDS}_{part}" for part in ("bucket", "sum", "count")}
    others = {metrics.STEP, metrics.WINDOW_TIME, metrics.PROGRESS_TIME, f"{metrics.STEPS}_total"}
    return gauges | histogram | {f"ray_{name}" for name in others}


def named(expressions):
    return {name for text in expressions for name in re.findall(r"\bray_\w+", text)}


def dashboard():
    return json.loads((INFRA / "grafana" / "training.json").read_text())


def test_dashboard_shows_every_metric_and_no_other():
    board = dashboard()
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert named(queries) == exported()
    (run_names,) = [v["query"] for v in board["templating"]["list"] if v["name"] == "run"]
    assert named([run_names]) <= exported()
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len(set(places)) == len(places)


def alert_rules():
    (group,) = yaml.safe_load((INFRA / "prometheus" / "rules.yml").read_text())["groups"]
    return group["rules"]


def test_alerts_name_metrics_that_are_exported_and_say_what_to_do():
    rules = alert_rules()
    assert {"ItpnStepStalled", "ItpnDataWaitRising", "ItpnCheckpointFailing"} <= {rule["alert"] for rule in rules}
    for rule in rules:
        assert named([rule["expr"]])
        assert named([rule["expr"]]) <= exported()
        assert rule["annotations"]["action"]


@pytest.fixture
def promtool():
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (apt-get install prometheus)")
    return found


@pytest.mark.parametrize(
    "words",
    [("check", "rules", "rules.yml"), ("check", "config", "prometheus.yml"), ("test", "rules", "rules_test.yml")],
)
def test_promtool(promtool, words):
    done = run(promtool, *words[:2], INFRA / "prometheus" / words[2])
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_reads_the_queries_of_the_dashboard(promtool, tmp_path):
    queries = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    plain = [text.replace("$__rate_interval", "1m").replace("$run", ".*") for text in queries]
    file = tmp_path / "queries.yml"
    rules = [{"record": f"panel:{number}", "expr": text} for number, text in enumerate(plain)]
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = run(promtool, "check", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr
