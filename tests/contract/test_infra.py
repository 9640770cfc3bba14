"""Manifests in infra/ are valid for the tools that read them, and say what the documentation promises."""

import copy
import json
import re
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import drain_node

from orchestrator.config.load import load
from orchestrator.config.tree import PretrainConfig
from orchestrator.launch.home import resolve

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
# KubeRay's custom resource definition is not ours to ship; it lies beside the checkout where it is available.
CRD = ROOT.parent / "shared" / "kuberay" / "ray.io_rayjobs.yaml"
KUBERNETES = "1.33"
UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def read(*parts):
    return yaml.safe_load(INFRA.joinpath(*parts).read_text())


def bytes_of(text):
    number, unit = re.fullmatch(r"(\d+)([A-Za-z]*)", text).groups()
    return int(number) * UNITS[unit]


RAYJOB, RAYCLUSTER = read("kuberay", "rayjob.yaml"), read("kuberay", "raycluster.yaml")
GUARDS = list(yaml.safe_load_all((INFRA / "kuberay" / "guards.yaml").read_text()))
HEAD, *GROUPS = (RAYCLUSTER["spec"]["headGroupSpec"], *RAYCLUSTER["spec"]["workerGroupSpecs"])
SUBMITTER = {"template": RAYJOB["spec"]["submitterPodTemplate"]}


# -- KubeRay --------------------------------------------------------------------------------------------------------


def strict(schema):
    """The schema with unknown keys refused wherever it lists the known ones."""
    if isinstance(schema, dict):
        tightened = {key: strict(value) for key, value in schema.items()}
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            tightened.setdefault("additionalProperties", False)
        return tightened
    return [strict(item) for item in schema] if isinstance(schema, list) else schema


@pytest.fixture(scope="module")
def rayjob():
    if not CRD.exists():
        pytest.skip("KubeRay's RayJob definition is not beside this checkout")
    definition = yaml.load(CRD.read_text(), yaml.CSafeLoader)
    (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    schema = copy.deepcopy(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return jsonschema.Draft202012Validator(strict(schema))


def test_rayjob_fits_the_definition(rayjob):
    rayjob.validate(RAYJOB)


def test_raycluster_is_the_cluster_of_the_rayjob():
    """RayCluster's own definition is not here; RayJob's contains it."""
    assert RAYCLUSTER["spec"] == RAYJOB["spec"]["rayClusterSpec"]
    assert (RAYCLUSTER["apiVersion"], RAYCLUSTER["kind"]) == ("ray.io/v1", "RayCluster")


@pytest.mark.parametrize("place", [("spec",), ("spec", "rayClusterSpec"), ("spec", "rayClusterSpec", "headGroupSpec")])
def test_the_check_refuses_unknown_keys(rayjob, place):
    manifest = copy.deepcopy(RAYJOB)
    inner = manifest
    for key in place:
        inner = inner[key]
    inner["templat"] = {}
    assert any("'templat'" in error.message for error in rayjob.iter_errors(manifest))


def test_version_is_that_of_the_image():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert RAYCLUSTER["spec"]["rayVersion"] == pins["ray"]


def test_the_autoscaler_has_the_memory_that_it_asks_for():
    resources = RAYCLUSTER["spec"]["autoscalerOptions"]["resources"]
    assert resources["requests"] == resources["limits"]


def test_token_authentication_is_on():
    assert RAYCLUSTER["spec"]["authOptions"] == {"mode": "token", "secretName": "itpn-ray-token"}


@pytest.mark.parametrize("group", [HEAD, *GROUPS, SUBMITTER], ids=lambda g: g.get("groupName", "head or submitter"))
def test_pods_are_guarded(group):
    pod = group["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 1000
    (container,) = pod["containers"]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
    assert group["template"]["metadata"]["labels"]["app.kubernetes.io/name"] == "itpn"
    # Secrets by reference only.
    assert all(name in ("ITPN_HOME", "ITPN_CLUSTER_MAX") for name in (e["name"] for e in container.get("env", [])))


@pytest.mark.parametrize("group", [HEAD, *GROUPS], ids=lambda g: g.get("groupName", "head"))
def test_nodes_have_secrets_recovery_settings_and_shared_memory(group):
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    assert container["envFrom"] == [
        {"secretRef": {"name": "itpn-storage"}},
        {"secretRef": {"name": "itpn-mlflow"}},
        {"configMapRef": {"name": "itpn-recovery"}},
    ]
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    (shm,) = [v["emptyDir"] for v in pod["volumes"] if v["name"] == "shm"]
    assert shm["medium"] == "Memory"
    # What lies there counts as the pod's memory.
    assert bytes_of(shm["sizeLimit"]) <= bytes_of(container["resources"]["limits"]["memory"]) / 2
    assert int(group["rayStartParams"]["object-store-memory"]) < bytes_of(shm["sizeLimit"])


def job_config():
    words = RAYJOB["spec"]["entrypoint"].split()
    assert words[:3] == ["python", "/opt/itpn/jobs/pretrain.py", "--recipe"]
    recipe = ROOT / Path(words[3]).relative_to("/opt/itpn")
    return resolve(load(PretrainConfig, recipe, words[4:]), {"ITPN_HOME": "/tmp/itpn"})


def test_the_job_fits_its_cluster():
    config = job_config()
    assert config.cluster.device == "cuda"
    for group in GROUPS:
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert limits["nvidia.com/gpu"] == "1"
        assert config.cluster.cpus_per_worker <= int(limits["cpu"])
        assert group["maxReplicas"] >= config.cluster.workers
        # The object store, and the batches that every loader process holds ready or has in hand.
        per_rank = -(-config.train.global_batch // config.cluster.workers)
        batch = per_rank * 3 * config.data.image_size**2
        needed = int(group["rayStartParams"]["object-store-memory"])
        needed += config.data.workers * (config.data.prefetch + 1) * batch
        (shm,) = [v["emptyDir"] for v in group["template"]["spec"]["volumes"] if v["name"] == "shm"]
        assert needed <= bytes_of(shm["sizeLimit"])


def test_gpu_nodes_come_and_go():
    spec = RAYCLUSTER["spec"]
    assert spec["enableInTreeAutoscaling"] is True
    assert all(group["minReplicas"] == 0 < group["maxReplicas"] for group in GROUPS)
    assert HEAD["rayStartParams"]["num-cpus"] == "0"


def test_preemptible_pool_drains_within_its_notice():
    (group,) = [g for g in GROUPS if g["groupName"] == "gpu-preemptible"]
    pod = group["template"]["spec"]
    assert pod["nodeSelector"]
    assert any(t["key"] == "itpn/pool" for t in pod["tolerations"])
    (container,) = pod["containers"]
    script, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    # The call imports Ray, which takes a while on a busy node, and Ray itself wants to leave in peace.
    assert int(seconds) + 20 + 20 <= pod["terminationGracePeriodSeconds"]
    text = (ROOT / Path(script).relative_to("/opt/itpn")).read_text()
    command = re.search(r"^ray drain-node (.*?[^\\])\n", text, re.DOTALL | re.MULTILINE).group(1)
    words = command.replace("\\\n", " ").replace('"this node is taken back"', "message").replace('"$seconds"', seconds)
    parsed = drain_node.make_context("drain-node", words.split()).params
    assert parsed["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert parsed["deadline_remaining_seconds"] == int(seconds)
    assert parsed["node_id"] is None, "the node it runs on"


@pytest.mark.parametrize("manifest", GUARDS, ids=lambda m: m["kind"])
def test_guards_fit_kubernetes(manifest):
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**manifest, "spek": {}}, KUBERNETES, strict=True)


def test_guards_select_the_pods():
    policy, budget = GUARDS
    labels = HEAD["template"]["metadata"]["labels"]
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert budget["spec"]["selector"]["matchLabels"] == labels
    assert budget["spec"]["maxUnavailable"] == 0
    # Nobody but the pods themselves may reach a port that runs code.
    opened = {p["port"] for rule in policy["spec"]["ingress"] for p in rule.get("ports", [])}
    assert opened == {8265, 8080}


# -- ray up ---------------------------------------------------------------------------------------------------------


def test_ray_up_fits_ray():
    config = read("ray-up", "cluster.yaml")
    ready = prepare_config(copy.deepcopy(config))
    validate_config(ready)
    assert ready["setup_commands"] == [], "everything is in the image"
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config({**config, "max_worker": 1}))
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_AUTH_MODE=token" in config[key][-1]
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    (rule,) = config["provider"]["security_group"]["IpPermissions"]
    assert (rule["FromPort"], rule["ToPort"]) == (22, 22)
    assert not any(place["CidrIp"].endswith("/0") for place in rule["IpRanges"])


# -- recovery settings ----------------------------------------------------------------------------------------------


def profile(name):
    lines = (INFRA / "recovery" / f"{name}.env").read_text().splitlines()
    return dict(line.split("=") for line in lines if line and not line.startswith("#"))


def test_the_default_profile_tolerates_a_slow_start():
    pull_s, import_s, settings = 600, 120, profile("default")
    assert float(settings["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"]) >= pull_s + import_s
    assert float(settings["RAY_worker_register_timeout_seconds"]) > import_s
    assert float(settings["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"]) > import_s
    assert job_config().cluster.start_timeout_s >= pull_s + import_s


def test_profiles_set_the_same_things_and_test_is_the_quicker():
    default, test = profile("default"), profile("test")
    assert default.keys() == test.keys()
    assert all(float(test[name]) <= float(default[name]) for name in default)
    known = (INFRA.parent / "docs" / "operations.md").read_text()
    assert [name for name in default if name not in known] == [], "docs/operations.md explains every one"


def test_every_manifest_uses_the_default_profile():
    """KubeRay by a config map made from the file, compose by the file, virtual machines by the file they are given."""
    for name in ("rayjob.yaml", "raycluster.yaml"):
        text = (INFRA / "kuberay" / name).read_text()
        assert "kubectl create configmap itpn-recovery --from-env-file=infra/recovery/default.env" in text
    compose = read("compose", "compose.yaml")["services"]["ray"]
    assert compose["env_file"] == ["../recovery/default.env"]
    config = read("ray-up", "cluster.yaml")
    assert config["file_mounts"]["/home/itpn/recovery"] == "infra/recovery"
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert config[key][-1].index(". ~/recovery/default.env") < config[key][-1].index("ray start")
    files = [
        p for p in INFRA.rglob("*") if p.is_file() and p.parent.name != "recovery" and "__pycache__" not in p.parts
    ]
    assert not [p for p in files if any(name in p.read_text() for name in profile("default"))], (
        "one place of definition"
    )


# -- storage --------------------------------------------------------------------------------------------------------


def test_bucket_policy_gives_shards_no_write():
    policy = json.loads((INFRA / "storage" / "bucket-policy.json").read_text())
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow"
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        assert not any("*" in action for action in actions)
        if "shards" in statement["Resource"]:
            assert actions == ["s3:GetObject"]
        if "s3:ListBucket" in actions:
            # A read has no prefix: under a condition on it, S3 answers 403 for an object that is not there yet.
            assert "Condition" not in statement
