"""The files of `cluster/` are parsed by the program that uses them, or validated by its schema."""

import json
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from helpers import PIPES, TRAIN, Outcome, environment, shard_cache, tiny, training_rows

from pipeline.config.command_line import parse_config

ROOT = TRAIN.parents[1]
CLUSTER = ROOT / "cluster"
SCRIPTS = Path(sysconfig.get_path("scripts"))
MANIFESTS = ("volumes.yaml", "indexed-job.yaml", "pytorchjob.yaml")


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def run_tool(name: str, *arguments: str) -> None:
    tool = shutil.which(name, path=SCRIPTS)
    if tool is None:
        pytest.skip(f"{name} is not installed")
    done = subprocess.run([tool, *arguments], cwd=ROOT, **PIPES, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


# --- accelerate ---


@pytest.mark.parametrize(
    ("name", "distributed_type", "use_cpu"),
    [
        ("one_cpu", DistributedType.NO, True),
        ("one_gpu", DistributedType.NO, False),
        ("multi_gpu", DistributedType.MULTI_GPU, False),
        ("multi_node", DistributedType.MULTI_GPU, False),
    ],
)
def test_accelerate_reads_its_configurations(name: str, distributed_type: DistributedType, use_cpu: bool) -> None:
    config = load_config_from_file(str(CLUSTER / "accelerate" / f"{name}.yaml"))  # an unknown key raises
    assert (config.distributed_type, config.use_cpu, config.mixed_precision) == (distributed_type, use_cpu, "no")


def test_command_line_of_a_node_overrides_the_configuration_of_many() -> None:
    call = ["--config_file", str(CLUSTER / "accelerate" / "multi_node.yaml"), "--machine_rank", "3"]
    call += ["--num_machines", "4", "--num_processes", "16", "--main_process_ip", "10.0.0.1", str(TRAIN)]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(call))
    assert (args.multi_gpu, args.num_machines, args.num_processes, args.machine_rank) == (True, 4, 16, 3)
    assert (args.main_process_ip, args.main_process_port, args.rdzv_backend) == ("10.0.0.1", 29500, "static")


def test_gpus_of_one_machine_are_asked_for_and_not_guessed() -> None:
    call = ["--config_file", str(CLUSTER / "accelerate" / "multi_gpu.yaml"), str(TRAIN)]
    with pytest.raises(ValueError, match="--num_processes"):
        _validate_launch_command(launch_command_parser().parse_args(call))


def test_accelerate_trains_by_the_configuration_for_one_cpu(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    config = CLUSTER / "accelerate" / "one_cpu.yaml"
    call = [str(SCRIPTS / "accelerate"), "launch", "--config_file", str(config), str(TRAIN)]
    call += tiny(shard_cache(tmp_path_factory), steps=2, run_dir="run")
    without = {key: value for key, value in environment().items() if key != "ACCELERATE_USE_CPU"}
    done = subprocess.run(call, cwd=tmp_path, env=without, **PIPES, timeout=300)
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    assert outcome.code == 0, outcome.err
    assert [row["iteration"] for row in training_rows(tmp_path / "run")] == [1, 2]


# --- Kubernetes ---


def pod_templates(name: str) -> list[dict[str, Any]]:
    (job,) = (doc for doc in documents(CLUSTER / "kubernetes" / name) if doc["kind"] in ("Job", "PyTorchJob"))
    if job["kind"] == "Job":
        return [job["spec"]["template"]]
    return [replica["template"] for replica in job["spec"]["pytorchReplicaSpecs"].values()]


def test_manifests_fulfil_the_schema_of_kubernetes() -> None:
    kubernetes = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    resources = [
        *(doc for name in MANIFESTS for doc in documents(CLUSTER / "kubernetes" / name) if doc["kind"] != "PyTorchJob"),
        # The operator's own kind has no schema there, but its pods have.
        *(
            {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
            for template in pod_templates("pytorchjob.yaml")
        ),
    ]
    kinds = {resource["kind"] for resource in resources}
    assert kinds == {"PersistentVolumeClaim", "Service", "Job", "PodTemplate"}
    for resource in resources:
        kubernetes.validate(resource, kubernetes.latest_version(), strict=True)  # an unknown key raises
    resources[-1]["template"]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes.ValidationError):
        kubernetes.validate(resources[-1], kubernetes.latest_version(), strict=True)


@pytest.mark.parametrize("name", ["indexed-job.yaml", "pytorchjob.yaml"])
def test_pods_outlive_the_checkpoint_of_a_preemption(name: str) -> None:
    for template in pod_templates(name):
        spec = template["spec"]
        (container,) = spec["containers"]
        env = {variable["name"]: variable["value"] for variable in container["env"]}
        assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < spec["terminationGracePeriodSeconds"]
        claims = {v["name"]: v.get("persistentVolumeClaim", {}).get("claimName") for v in spec["volumes"]}
        mounts = {mount["mountPath"]: claims[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts == {"/data": "furrygan-data", "/runs": "furrygan-runs", "/dev/shm": None}
        claimed = {doc["metadata"]["name"] for doc in documents(CLUSTER / "kubernetes" / "volumes.yaml")}
        assert set(filter(None, claims.values())) == claimed


@pytest.mark.parametrize("name", ["indexed-job.yaml", "pytorchjob.yaml"])
def test_training_command_of_a_pod_is_one(name: str) -> None:
    for template in pod_templates(name):
        (container,) = template["spec"]["containers"]
        config = parse_config("", container["args"])
        assert str(config.run_dir).startswith("/runs/") and config.data is not None
        gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        assert config.batch % (4 * 2 * gpus) == 0


def test_numbers_of_the_indexed_job_are_those_of_its_launcher() -> None:
    service, job = documents(CLUSTER / "kubernetes" / "indexed-job.yaml")
    template = job["spec"]["template"]
    (container,) = template["spec"]["containers"]
    pods, gpus = job["spec"]["completions"], container["resources"]["limits"]["nvidia.com/gpu"]
    command = [argument.replace("$(JOB_COMPLETION_INDEX)", "1") for argument in container["command"]]
    assert command[:2] == ["accelerate", "launch"] and (ROOT / command[-1]).samefile(TRAIN)
    config_file = command[2].removeprefix("--config_file=")
    call = ["--config_file", str(ROOT / config_file), *command[3:]]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(call))
    assert (args.num_machines, args.num_processes, args.machine_rank) == (pods, pods * gpus, 1)
    assert job["spec"]["parallelism"] == pods
    # Pod 0's name is the job's and its index, in the domain of the headless service that selects the job's pods.
    name = job["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {"job-name": name}
    assert args.main_process_ip == f"{name}-0.{service['metadata']['name']}"
    assert template["spec"]["subdomain"] == service["metadata"]["name"]
    assert {port["port"] for port in service["spec"]["ports"]} == {args.main_process_port}


# --- Ray ---


def test_ray_takes_its_cluster() -> None:
    util = pytest.importorskip("ray.autoscaler._private.util", reason="ray is not installed")
    (tree,) = documents(CLUSTER / "ray" / "cluster.yaml")
    num_workers = len(tree["provider"]["worker_ips"])
    config = util.prepare_config(tree)
    util.validate_config(config)
    (node_type,) = config["available_node_types"].values()
    assert (node_type["min_workers"], config["max_workers"]) == (num_workers, num_workers)


# --- containers ---


def test_dockerfile_pleases_hadolint() -> None:
    run_tool("hadolint", "cluster/docker/Dockerfile")


def test_image_runs_as_nobody_special_and_stops_on_sigterm() -> None:
    lines = (CLUSTER / "docker" / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000:1000"]
    (command,) = (json.loads(line.removeprefix("CMD ")) for line in lines if line.startswith("CMD "))
    assert command == ["python", "pipeline/train.py"]  # process 1 is the trainer itself


def test_image_leaves_out_data_and_keeps_what_it_copies() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert {"runs", "shards", ".git", ".venv", "**/.env"} <= set(ignored)
    for needed in ("requirements.lock", "pyproject.toml", "README.md", "LICENSE", "pipeline", "cluster"):
        assert (ROOT / needed).exists() and needed not in ignored


def test_tracking_server_fulfils_the_schema_of_compose() -> None:
    run_tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "cluster/mlflow/compose.yaml")


def test_tracking_server_has_no_password_of_its_own() -> None:
    """Every variable is in the example file; secrets are empty there, and compose ends where one is."""
    (compose,) = documents(CLUSTER / "mlflow" / "compose.yaml")
    text = json.dumps(compose)
    required = set(re.findall(r"\$\{(\w+):\?", text))
    optional = set(re.findall(r"\$\{(\w+):-", text))
    assert required == {"POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY"}
    assert set(re.findall(r"\$\{?(\w+)", text)) == required | optional
    example = dict(re.findall(r"^(\w+)=(.*)$", (CLUSTER / "mlflow" / ".env.example").read_text(), re.MULTILINE))
    assert example.keys() == required | optional
    assert {example[name] for name in required} == {""}
    for service in compose["services"].values():
        for name, value in service["environment"].items():
            if "PASSWORD" in name or "KEY" in name:
                assert re.fullmatch(r"\$\{\w+:\?[^}]*\}", value), name
    assert [name for name, service in compose["services"].items() if "ports" in service] == ["server"]
    assert all("healthcheck" in service for service in compose["services"].values())


def test_tracking_server_is_of_the_pipelines_version() -> None:
    (compose,) = documents(CLUSTER / "mlflow" / "compose.yaml")
    (version,) = re.findall(r"^mlflow==(.+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert f"mlflow:v{version}" in compose["services"]["server"]["build"]["dockerfile_inline"]


def test_mlflow_takes_the_command_of_the_tracking_server(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.cli import cli

    (compose,) = documents(CLUSTER / "mlflow" / "compose.yaml")
    server = compose["services"]["server"]
    for name, value in server["environment"].items():
        monkeypatch.setenv(name, value)
    program, name, *arguments = server["command"]
    assert program == "mlflow"
    options = cli.commands[name].make_context(name, arguments).params  # an unknown option raises
    assert options["serve_artifacts"] and options["artifacts_destination"] == "s3://mlflow"
    assert options["backend_store_uri"].startswith("postgresql+psycopg2://mlflow:")
    assert (options["host"], options["port"]) == ("0.0.0.0", 5000)


# --- the README ---


def test_readme_of_the_cluster_names_every_file_and_none_besides() -> None:
    readme = (CLUSTER / "README.md").read_text()
    files = {path.name for path in CLUSTER.rglob("*") if path.is_file()}
    assert {name for name in files - {"README.md", ".gitignore", ".env"} if f"{name}`" not in readme} == set()
    for named in re.findall(r"cluster/[\w./-]+\.(?:yaml|json|sbatch)", readme):
        assert (ROOT / named).is_file(), named
