"""The recipes for clusters in configs/cluster: valid for the tools that read them, and closed to strangers."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any

import jsonschema
import pytest
import yaml
from conftest import ROOT

from distill_at_scale.config import load as configuration

FOLDER = ROOT / "configs" / "cluster"
RECIPES = sorted(path for path in FOLDER.iterdir() if path.is_file())
LAUNCHERS = ("aws", "gcp")
COMMAND = re.compile(r"jobs/pipeline\.py\s+(configs/\S+\.yaml)((?:[\s\\#]+[a-z_]+\.\S+=\S+)*)")
SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|\b\d{12}\b|(?:password|secret_key|token)\s*[:=]\s*['\"]?\w{8,}", re.I
)

# What of the ray.io/v1 schema (KubeRay 1.5.1 and newer) and of Kubernetes' own the manifest uses; anything else is refused.
QUANTITY = {"type": "string", "pattern": r"^[0-9.]+([KMGT]i|m)?$"}
LIMITS = {"type": "object", "additionalProperties": QUANTITY, "required": ["cpu", "memory"]}


def shape(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
CONTAINER = shape(
    ("name", "image", "resources"), name=TEXT, image=TEXT, env=array(shape(("name",), name=TEXT, value=TEXT)),
    resources=shape(("limits",), limits=LIMITS, requests=LIMITS),
    securityContext=shape(
        allowPrivilegeEscalation={"const": False}, runAsNonRoot={"const": True}, capabilities=shape(drop=array(TEXT))
    ),
)  # fmt: skip
POD = shape(
    ("spec",), metadata=shape(labels=TEXTS),
    spec=shape(
        ("containers",), serviceAccountName=TEXT, containers=array(CONTAINER),
        tolerations=array(shape(key=TEXT, operator={"enum": ["Exists", "Equal"]}, effect={"enum": ["NoSchedule"]})),
    ),
)  # fmt: skip
HEAD = shape(("template",), serviceType={"const": "ClusterIP"}, rayStartParams=TEXTS, template=POD)
WORKERS = shape(
    ("groupName", "template", "maxReplicas"), groupName=TEXT, minReplicas=COUNT, maxReplicas=COUNT, rayStartParams=TEXTS,
    template=POD,
)  # fmt: skip
CLUSTER = shape(
    ("headGroupSpec", "authOptions"), rayVersion=TEXT, authOptions=shape(("mode",), mode={"const": "token"}),
    enableInTreeAutoscaling=FLAG, autoscalerOptions=shape(idleTimeoutSeconds=COUNT), headGroupSpec=HEAD,
    workerGroupSpecs=array(WORKERS),
)  # fmt: skip
RAY_JOB = shape(
    ("apiVersion", "kind", "metadata", "spec"), apiVersion={"const": "ray.io/v1"}, kind={"const": "RayJob"},
    metadata=shape(("name",), name=TEXT),
    spec=shape(
        ("entrypoint", "rayClusterSpec"), entrypoint=TEXT, backoffLimit=COUNT, shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=COUNT, rayClusterSpec=CLUSTER,
    ),
)  # fmt: skip


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def rayjob() -> tuple[dict[str, Any], dict[str, Any]]:
    job, policy = yaml.safe_load_all((FOLDER / "kuberay_rayjob.yaml").read_text(encoding="utf-8"))
    return job, policy


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_up_takes_the_recipe(name):
    util = pytest.importorskip("ray.autoscaler._private.util")
    util.validate_config(util.prepare_config(read(name)))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_workers_of_a_launched_cluster_come_and_go(name):
    recipe = read(name)
    head = recipe["available_node_types"].pop(recipe["head_node_type"])
    assert head["resources"]["CPU"] == 0, "the head is no spot machine, and does no work"
    for kind in recipe["available_node_types"].values():
        assert kind["min_workers"] == 0
        assert "spot" in str(kind["node_config"]).lower()


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launched_cluster_asks_for_the_token_and_shows_its_dashboard_to_the_head_alone(name):
    recipe = read(name)
    starts = [
        line
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for line in recipe[key]
        if "ray start" in line
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert recipe["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("chmod 600 ~/.ray/auth_token" in line for line in recipe["setup_commands"])


def test_the_manifest_has_the_shape_of_ray_io_v1():
    jsonschema.validate(rayjob()[0], RAY_JOB)


def test_the_manifest_allows_only_its_own_pods_and_the_operator():
    job, policy = rayjob()
    assert policy["kind"] == "NetworkPolicy"
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    spec = job["spec"]["rayClusterSpec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert group["template"]["metadata"]["labels"] == policy["spec"]["podSelector"]["matchLabels"]
    assert all(rule["from"] for rule in policy["spec"]["ingress"]), "a rule without `from` lets in everybody"


def test_the_script_for_slurm_is_valid_bash():
    script = str(FOLDER / "slurm.sh")
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", "--severity=warning", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_script_for_slurm_keeps_its_token_to_itself_and_ends_what_it_started():
    text = (FOLDER / "slurm.sh").read_text(encoding="utf-8")
    assert text.index("umask 077") < text.index("mktemp")
    assert re.search(r"trap '.*kill .*rm -f \"\$token\"' EXIT", text)
    assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=" in text
    assert "--dashboard-host=127.0.0.1" in text
    assert "ray stop" not in text, "it would end Ray of others on the same machines"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_open_with_their_command_and_hold_no_secret(path):
    text = path.read_text(encoding="utf-8")
    first = next(line for line in text.splitlines() if not line.startswith("#!"))
    assert first.startswith("# ")
    assert f"configs/cluster/{path.name}" in first
    assert not SECRET.search(text)


def test_the_commands_in_the_recipes_are_ones_that_the_program_takes():
    commands = [match for path in RECIPES for match in COMMAND.finditer(path.read_text(encoding="utf-8"))]
    assert len(commands) == 3
    for match in commands:
        overrides = re.sub(r"[\\#]", " ", match[2]).split()
        assert len(overrides) == 5, match[0]
        configuration.load(ROOT / match[1], overrides)
