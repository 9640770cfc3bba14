"""Manifests in infra/ are valid for the tools that read them."""

import copy
import json
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
# KubeRay's custom resource definition is not ours to ship; it lies beside the checkout where it is available.
CRD = ROOT.parent / "shared" / "kuberay" / "ray.io_rayjobs.yaml"
RAYJOB = ROOT / "infra" / "kuberay" / "rayjob.yaml"


def strict(schema):
    """The schema with unknown keys refused wherever it lists the known ones."""
    if isinstance(schema, dict):
        tightened = {key: strict(value) for key, value in schema.items()}
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            tightened.setdefault("additionalProperties", False)
        return tightened
    return [strict(item) for item in schema] if isinstance(schema, list) else schema


@pytest.fixture(scope="module")
def rayjob_schema():
    if not CRD.exists():
        pytest.skip("KubeRay's RayJob definition is not beside this checkout")
    definition = yaml.safe_load(CRD.read_text())
    (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    schema = copy.deepcopy(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return strict(schema)


def test_rayjob_fits_the_definition(rayjob_schema):
    jsonschema.validate(yaml.safe_load(RAYJOB.read_text()), rayjob_schema)


def test_the_check_refuses_unknown_keys(rayjob_schema):
    manifest = yaml.safe_load(RAYJOB.read_text())
    manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["templat"] = {}
    with pytest.raises(jsonschema.ValidationError, match="templat"):
        jsonschema.validate(manifest, rayjob_schema)


def test_rayjob_is_guarded():
    spec = yaml.safe_load(RAYJOB.read_text())["spec"]["rayClusterSpec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["containers"]
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
        # Secrets by reference only.
        assert not any(word in e["name"] for e in container["env"] for word in ("SECRET", "PASSWORD", "ACCESS_KEY"))


def test_bucket_policy_gives_shards_no_write():
    policy = json.loads((ROOT / "infra" / "storage" / "bucket-policy.json").read_text())
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow"
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        assert not any("*" in action for action in actions)
        if "shards" in statement["Resource"]:
            assert actions == ["s3:GetObject"]
