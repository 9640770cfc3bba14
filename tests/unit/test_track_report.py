import re
import time

from orchestrator.track.config import TrackConfig
from orchestrator.track.describe import model_card, run_description
from orchestrator.track.figures import curve_figure
from orchestrator.track.recorder import Recorder
from orchestrator.track.redact import Redactor
from orchestrator.track.system import SystemSampler

CONFIG = TrackConfig(uri="http://127.0.0.1:9")


def test_the_report_is_one_file_that_tells_the_story(tmp_path):
    for attempt, first in ((1, 0), (2, 40)):
        recorder = Recorder(CONFIG, "uid", tmp_path, attempt, name="<first & run>", follow=False)
        recorder.state("running")
        recorder.params({"train": {"lr": 0.1}})
        recorder.describe("Why this **run** exists.\n\n| | |\n|---|---|\n| **Recipe** | `a<b` |\n")
        recorder.dataset("photos/train", "abcdef", "/data/photos", "training", {"samples": 1000})
        for step in range(first, first + 60):
            recorder.metrics(step, {"train/loss": 10.0 / (step + 1), "eval/knn_top1": step / 100})
    curve_figure(tmp_path / "figures" / "features-000100.png", {"a": [(0, 1.0)]}, title="a")
    recorder.artifact(tmp_path / "figures" / "features-000100.png", "figures")
    recorder.state("finished", "all steps done")
    page = recorder.report().read_text()
    recorder.close(0)
    expected = [
        "&lt;first &amp; run&gt;", "Why this <b>run</b> exists.", "<td><b>Recipe</b></td><td><code>a&lt;b</code></td>",
        "10 → 0.1", "photos/train", "all steps done", "data:image/png;base64,", "<polyline", "train.lr", "2 attempts",
    ]  # fmt: skip
    assert [words for words in expected if words not in page] == []
    assert not re.search(r"(src|href)='(?!data:)", page)  # nothing is fetched from anywhere
    assert Redactor().text(page) == page  # shipping does not damage the pictures


def test_charts_come_in_the_order_of_interest_and_never_mix_units(tmp_path):
    recorder = Recorder(CONFIG, "uid", tmp_path, follow=False)
    for step in range(3):
        recorder.metrics(step, {
            "checkpoint/bytes": 10.0 + step, "checkpoint/failed": 0.0, "train/lr": 0.1 * step, "train/loss": 1.0 - step,
            "goodput/share/compute": 0.5 + step / 10, "goodput/share/data": 0.1 * step, "eval/knn_top1": 0.1 * step,
            "system/node0/cpu_percentage": 50.0 + step, "system/node0/memory_percentage": 20.0 + step,
            "system/node0/process_memory_mb": 2000.0 + step,
        })  # fmt: skip
    page = recorder.report().read_text()
    recorder.close(0)
    assert re.findall(r"<figcaption><b>(.+?)</b>", page) == [
        "train/loss", "eval/knn_top1", "train/lr", "goodput/share", "system/node0 (%)", "system/node0 (MB)",
        "checkpoint/bytes",
    ]  # fmt: skip
    assert "The same at every step: checkpoint/failed 0" in page
    assert "■</span> cpu_percentage 52" in page


def test_words_hold_the_facts():
    said = run_description(purpose="Try it.", recipe="first_run", model="fast", objective="features of X",
                           data="60,000 images", length="3 epochs", run_directory="runs/a")  # fmt: skip
    assert "Try it." in said
    assert "| **Recipe** | `first_run` |" in said
    card = model_card(name="a", model={"img_size": 64}, data="photos", metrics={"eval/knn_top1": 0.8391}, run_uid="u")
    assert "| eval/knn_top1 | 0.8391 |" in card
    assert "64 x 64" in card


def test_system_metrics_are_recorded_once_per_step_until_closed():
    seen, step = [], [3]
    sampler = SystemSampler(lambda at, values: seen.append((at, dict(values))), lambda: step[0], "node0", 0.02)
    sampler.start()
    for wanted in (3, 4):
        step[0] = wanted
        until = time.monotonic() + 20
        while not any(at == wanted for at, _ in seen) and time.monotonic() < until:
            time.sleep(0.01)
    time.sleep(0.1)
    sampler.close()
    assert not sampler.is_alive()
    assert [at for at, _ in seen] == [3, 4]
    assert seen[1][1]["system/node0/process_memory_mb"] > 10
    assert 0 <= seen[1][1]["system/node0/cpu_utilization_percentage"] <= 100
