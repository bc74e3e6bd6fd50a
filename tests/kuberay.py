"""Offline check of KubeRay manifests: RayJob, RayCluster, RayService.

KubeRay's own fields are checked against a schema written here from its API reference (``ray.io/v1``); every pod
template is checked against Kubernetes' published schemas by ``kubernetes-validate``. Unknown fields are errors in
both: an API server would drop them in silence. Not checked: what only a server can (CEL rules, admission, quotas).
"""

from __future__ import annotations

from typing import Any

import jsonschema
import kubernetes_validate

KUBERNETES_VERSION = "1.31"

_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
_COUNT = {"type": "integer", "minimum": 0}
_POD = {"type": "object", "required": ["spec"]}  # content: kubernetes-validate


def _object(required: list[str], **fields: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": fields, "additionalProperties": False}


_HEAD = _object(
    ["template"],
    rayStartParams=_STRINGS,
    template=_POD,
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    enableIngress={"type": "boolean"},
)
_WORKERS = _object(
    ["groupName", "template", "minReplicas", "maxReplicas"],
    groupName={"type": "string"},
    replicas=_COUNT,
    minReplicas=_COUNT,
    maxReplicas=_COUNT,
    numOfHosts={"type": "integer", "minimum": 1},
    idleTimeoutSeconds=_COUNT,
    suspend={"type": "boolean"},
    rayStartParams=_STRINGS,
    template=_POD,
)
_AUTOSCALER = _object(
    [],
    version={"enum": ["v1", "v2"]},
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    idleTimeoutSeconds=_COUNT,
    image={"type": "string"},
    imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    resources=_object([], requests=_STRINGS, limits=_STRINGS),
)
_CLUSTER = _object(
    ["headGroupSpec", "rayVersion"],
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    authOptions=_object(["mode"], mode={"enum": ["disabled", "token"]}),
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=_AUTOSCALER,
    headGroupSpec=_HEAD,
    workerGroupSpecs={"type": "array", "items": _WORKERS},
    suspend={"type": "boolean"},
)


def _kind(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return _object(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": "ray.io/v1"},
        kind={"const": name},
        metadata=_object(
            ["name"], name={"type": "string"}, namespace={"type": "string"}, labels=_STRINGS, annotations=_STRINGS
        ),
        spec=spec,
    )


# By kind: the schema, and the field of its spec that holds a cluster ("" = the spec itself).
SCHEMAS: dict[str, tuple[dict[str, Any], str]] = {
    "RayCluster": (_kind("RayCluster", _CLUSTER), ""),
    "RayJob": (
        _kind(
            "RayJob",
            _object(
                ["entrypoint", "rayClusterSpec"],
                entrypoint={"type": "string", "minLength": 1},
                runtimeEnvYAML={"type": "string"},
                submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
                shutdownAfterJobFinishes={"type": "boolean"},
                ttlSecondsAfterFinished=_COUNT,
                activeDeadlineSeconds={"type": "integer", "minimum": 1},
                backoffLimit=_COUNT,
                suspend={"type": "boolean"},
                metadata=_STRINGS,
                entrypointNumCpus={"type": "number", "minimum": 0},
                entrypointNumGpus={"type": "number", "minimum": 0},
                entrypointResources={"type": "string"},
                rayClusterSpec=_CLUSTER,
            ),
        ),
        "rayClusterSpec",
    ),
    "RayService": (
        _kind(
            "RayService",
            _object(
                ["serveConfigV2", "rayClusterConfig"],
                serveConfigV2={"type": "string", "minLength": 1},
                rayClusterConfig=_CLUSTER,
                rayClusterDeletionDelaySeconds=_COUNT,
                excludeHeadPodFromServeSvc={"type": "boolean"},
                upgradeStrategy=_object(["type"], type={"enum": ["NewCluster", "None"]}),
            ),
        ),
        "rayClusterConfig",
    ),
}


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """The cluster that a manifest of any of the three kinds describes."""
    place = SCHEMAS[manifest["kind"]][1]
    return manifest["spec"][place] if place else manifest["spec"]


def groups_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Its head group, then those of workers."""
    cluster = cluster_of(manifest)
    return [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]


def problems(manifest: dict[str, Any]) -> list[str]:
    """Everything wrong with a manifest, one line each, with the path of the field; [] = valid."""
    schema, place = SCHEMAS[manifest["kind"]]
    validator = jsonschema.Draft202012Validator(schema)
    found = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]
    cluster = manifest["spec"].get(place, {}) if place else manifest["spec"]
    for path, template in _templates(cluster):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "template"}, **template}
        try:
            kubernetes_validate.validate(pod, KUBERNETES_VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{path}: {error.message}")
        found += [f"{path}: {problem}" for problem in _mount_problems(pod["spec"])]
        # KubeRay refuses it: the autoscaler's second version counts a pod that was started again as another node.
        second = cluster.get("autoscalerOptions", {}).get("version") == "v2"
        if second and pod["spec"].get("restartPolicy") != "Never":
            found.append(f"{path}: autoscaler v2 needs restartPolicy: Never")
    for group in cluster.get("workerGroupSpecs", []):
        if not group.get("minReplicas", 0) <= group.get("replicas", 0) <= group.get("maxReplicas", 0):
            found.append(f"{group.get('groupName')}: replicas={group.get('replicas')} is not within its bounds")
    return found


def _templates(cluster: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    groups = [("head", cluster.get("headGroupSpec", {}))]
    groups += [(str(group.get("groupName")), group) for group in cluster.get("workerGroupSpecs", [])]
    return [(name, group["template"]) for name, group in groups if "spec" in group.get("template", {})]


def _mount_problems(spec: dict[str, Any]) -> list[str]:
    """Mounts of volumes that the pod doesn't have: legal to a schema, refused by a server."""
    volumes = {volume.get("name") for volume in spec.get("volumes", [])}
    mounts = [mount for container in spec.get("containers", []) for mount in container.get("volumeMounts", [])]
    return [f"no volume {mount['name']!r} for its mount" for mount in mounts if mount["name"] not in volumes]
