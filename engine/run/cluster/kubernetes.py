"""A manifest for Kubernetes: an Indexed Job (batch/v1) with a pod a shard."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from ... import __version__
from ...errors import InterruptedRunError, JobFileError, ModelError, UsageError
from .options import MARGIN_S, Request, Volume, plain_name

_NAME_LENGTH = 45
"""A pod's host name is the job's name and its index, in 63 characters."""
_SCRATCH = "/dfmpc-scratch"
_CONTAINER = "dfmpc"
_FINISHED = [1, JobFileError.exit_code, ModelError.exit_code]
"""Exit codes that another try of the same part would mostly end with too: a bug, nothing could start, failed tasks.
None of them ends the other parts: a pod may be the only one whose node lacks a mount."""

Node = dict[str, object]


def render_kubernetes(request: Request, image: str, volumes: Sequence[Volume]) -> str:
    """Return the manifest as YAML; pods start in the first of ``volumes``. UsageError where there is none."""
    if not volumes:
        raise UsageError("--k8s needs a volume that all pods share for models and store: give --pvc NAME:/MOUNT")
    spec: Node = {
        "completions": request.shards,
        "parallelism": request.shards,
        "completionMode": "Indexed",
        "backoffLimitPerIndex": request.requeues,
        "activeDeadlineSeconds": request.seconds,
        "podFailurePolicy": {"rules": _failure_rules()},
        "template": {"metadata": {"labels": _labels(request)}, "spec": _pod(request, image, volumes)},
    }
    metadata: Node = {"name": plain_name(request.name, _NAME_LENGTH), "labels": _labels(request)}
    manifest = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}
    head = f"# Written by dfmpc {__version__}. Read it, then give it to kubectl create -f. Kubernetes 1.29 or newer.\n"
    return head + yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True)


def _labels(request: Request) -> Node:
    return {"app.kubernetes.io/name": "dfmpc", "app.kubernetes.io/instance": plain_name(request.name, _NAME_LENGTH)}


def _failure_rules() -> list[Node]:
    """Return what follows from a pod that failed: the first rule that fits; what fits none is tried again."""

    def on_exit(action: str, codes: list[int]) -> Node:
        return {"action": action, "onExitCodes": {"containerName": _CONTAINER, "operator": "In", "values": codes}}

    return [
        on_exit("FailIndex", _FINISHED),
        on_exit("Ignore", [InterruptedRunError.exit_code]),
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]


def _pod(request: Request, image: str, volumes: Sequence[Volume]) -> Node:
    claims: list[Node] = [
        {"name": f"volume-{index}", "persistentVolumeClaim": {"claimName": volume.claim}}
        for index, volume in enumerate(volumes)
    ]
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": request.grace_s + MARGIN_S,
        "containers": [_container(request, image, volumes)],
        "volumes": [
            *claims,
            {"name": "scratch", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{request.memory_bytes // 2**23}Mi"}},
        ],
    }


def _container(request: Request, image: str, volumes: Sequence[Volume]) -> Node:
    asked: Node = {"cpu": str(request.cpus), "memory": f"{request.memory}i"}
    if request.gpus:
        asked["nvidia.com/gpu"] = str(request.gpus)
    words = request.run_command()
    return {
        "name": _CONTAINER,
        "image": image,
        # Kubernetes replaces $(NAME) in these words; a doubled $ stands for itself.
        "command": [word.replace("$", "$$") for word in words],
        "workingDir": volumes[0].mount,
        "env": [{"name": "TRITON_CACHE_DIR", "value": f"{_SCRATCH}/triton"}],
        "resources": {"requests": asked, "limits": dict(asked)},
        "volumeMounts": [
            *({"name": f"volume-{index}", "mountPath": volume.mount} for index, volume in enumerate(volumes)),
            {"name": "scratch", "mountPath": _SCRATCH},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
