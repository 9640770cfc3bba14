"""What the manifests say the autoscaler can bring is what their worker groups are."""

import re
from pathlib import Path

import pytest
import yaml

from orchestrator.launch.limits import VARIABLE, parse

INFRA = Path(__file__).resolve().parents[2] / "infra"


def kuberay(name):
    spec = yaml.safe_load((INFRA / "kuberay" / name).read_text())["spec"]
    return spec.get("rayClusterSpec", spec)


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kuberay_states_its_worker_groups_on_every_node(name):
    spec = kuberay(name)
    real = []
    for group in spec["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        real.append((group["maxReplicas"], {"CPU": float(limits["cpu"]), "GPU": float(limits["nvidia.com/gpu"])}))
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        (container,) = group["template"]["spec"]["containers"]
        (stated,) = [item["value"] for item in container["env"] if item["name"] == VARIABLE]
        assert [(group.count, dict(group.resources)) for group in parse(stated)] == real


def test_ray_up_states_its_worker_types_on_the_head():
    config = yaml.safe_load((INFRA / "ray-up" / "cluster.yaml").read_text())
    kinds = {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}
    command = config["head_start_ray_commands"][-1]
    stated = re.search(rf'export {VARIABLE}="([^"]*)"', command)
    assert command.index(VARIABLE) < command.index("ray start")
    assert [(group.count, dict(group.resources)) for group in parse(stated[1])] == [
        (kind["max_workers"], kind["resources"]) for kind in kinds.values()
    ]
    assert config["max_workers"] >= sum(group.count for group in parse(stated[1]))
