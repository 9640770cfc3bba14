"""What Prometheus reads off a Ray node while a training shows its numbers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.launch import metrics
from tests.contract.test_infra_stack import exported

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.long, pytest.mark.timeout(700)]
# In a process of its own: Ray leaves threads and warnings behind.
SCRAPE = """
import json, socket, sys, time, urllib.error, urllib.request
import ray
from orchestrator.launch.metrics import DriverMetrics, TrainingMetrics

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _metrics_export_port=port,
         _node_ip_address="127.0.0.1")
shown, driver, steps = TrainingMetrics("a run"), DriverMetrics("a run"), 3
driver.heard(3)
began = time.perf_counter()
shown.window(3, steps, json.loads(sys.argv[1]))
first = time.perf_counter() - began
began = time.perf_counter()
for _ in range(1000):
    shown.window(6, steps, json.loads(sys.argv[1]))
print(f"first window {1e3 * first:.2f} ms, the others {1e3 * (time.perf_counter() - began):.0f} us", file=sys.stderr)


def scrape():
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20).read().decode()
    except (urllib.error.URLError, TimeoutError):
        return ""


def wait_for(done):
    until = time.monotonic() + 120
    text = scrape()
    while not done(text) and time.monotonic() < until:
        time.sleep(1)
        text = scrape()
    return text


seen = [wait_for(lambda text: "ray_itpn_steps_total{" in text and "ray_itpn_step{" in text)]
time.sleep(40)  # no window ends for longer than Ray keeps a gauge
seen.append(wait_for(bool))
shown.close()
driver.close()
seen.append(wait_for(lambda text: text and "ray_itpn_step{" not in text))
print(json.dumps(seen))
"""


def test_dashboard_and_alerts_find_what_a_run_shows_while_it_goes_on():
    values = dict.fromkeys(metrics.GAUGES, 0.25) | {"train/seconds_per_step": 0.4, "train/grad_norm": 1.0}
    done = subprocess.run(
        [sys.executable, "-c", SCRAPE, json.dumps(values)], capture_output=True, text=True, timeout=680, check=False,
        cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(done.stderr.strip().splitlines()[-1])
    first, stalled, ended = json.loads(done.stdout.strip().splitlines()[-1])
    lines = [line for line in stalled.splitlines() if line.startswith("ray_itpn")]
    assert {re.match(r"\w+", line).group() for line in lines} == exported()
    assert all('run="a run"' in line for line in lines)
    found = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines if "_bucket" not in line}
    assert found["ray_itpn_mfu"] == 0.25
    assert found["ray_itpn_step"] == 6
    assert found["ray_itpn_steps_total"] == 3 * 1001
    assert found["ray_itpn_step_seconds_count"] == 1001
    assert found["ray_itpn_window_time_seconds"] > 1.7e9
    assert found["ray_itpn_progress_time_seconds"] > 1.7e9
    assert "ray_itpn_window_time_seconds{" in first
    # A run that has ended raises no alarm.
    assert "ray_itpn_window_time_seconds{" not in ended
    assert "ray_itpn_progress_time_seconds{" not in ended
