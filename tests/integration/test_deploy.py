"""What is deployed: compose.yaml, Dockerfile, KubeRay's job and MLflow's kubernetes backend, as far as no cluster is needed."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlflow
import pytest
import yaml
from click.testing import CliRunner

from cedkv.runs.resolved import ResolvedRun
from tests.support import patch_points as points
from tests.support.compose import SETTINGS, interpolated, services

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = "1.34"
PINS = yaml.safe_load((ROOT / "conda.yaml").read_text())["dependencies"][-1]["pip"]


def kuberay() -> tuple[dict[str, Any], dict[str, Any]]:
    """The volume and the job of kuberay.yaml."""
    volume, job = yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text())
    return volume, job


def assert_kubernetes_takes(document: dict[str, Any]) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate (pip, 108 MB); runs where it is")
    validator.validate(document, KUBERNETES, strict=True)


def resolved_by(words: list[str], monkeypatch: pytest.MonkeyPatch) -> ResolvedRun:
    """The run that a command of the image starts, resolved as the command line does; the checkout is /opt/cedkv there."""
    assert words[:2] == ["python", "-m"]
    module = importlib.import_module({"cedkv": "cedkv.cli.app"}.get(words[2], words[2]))
    found: list[ResolvedRun] = []

    def run(resolved: ResolvedRun) -> None:
        found.append(resolved)
        raise KeyboardInterrupt

    points.RUN.replace(run, monkeypatch)
    points.END_ON_SIGNALS.replace(lambda: None, monkeypatch)
    result = CliRunner().invoke(module.main, [word.replace("/opt/cedkv", str(ROOT)) for word in words[3:]])
    assert found, result.output
    return found[0]


def test_compose_takes_the_file() -> None:
    compose = pytest.importorskip("compose_spec", reason="needs compose-spec (pip); runs where it is")
    merged = json.dumps(yaml.safe_load(interpolated((ROOT / "compose.yaml").read_text(), SETTINGS)))
    assert set(compose.PyCompose.from_json(merged).service_names()) == {"postgres", "s3", "migrate", "bucket", "mlflow"}


def test_compose_asks_for_passwords_and_listens_here_alone() -> None:
    text = (ROOT / "compose.yaml").read_text()
    example = dict(re.findall(r"^(\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert set(re.findall(r"\$\{(\w+)", text)) == set(example)
    for name in ("POSTGRES_PASSWORD", "S3_SECRET_KEY"):
        assert example[name] == ""
        with pytest.raises(KeyError, match=name):
            interpolated(f"${{{name}:?set it}}", example)
    published = [interpolated(port, {}) for service in services().values() for port in service.get("ports", [])]
    assert published == ["127.0.0.1:5000:5000"]
    for ignored in (".gitignore", ".dockerignore"):
        assert ".env" in (ROOT / ignored).read_text().splitlines()


def test_images_have_versions_and_targets() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", dockerfile, re.MULTILINE))
    for service in services().values():
        if "build" in service:
            assert service["build"]["target"] in targets
        else:
            assert re.fullmatch(r"[\w/]+:v?\d+(\.\d+)*", service["image"])
    (names,) = re.findall(r"grep -E '\^\((.*)\)=='", dockerfile)
    assert set(names.split("|")) <= {pin.split("==")[0] for pin in PINS}
    (expression,) = re.findall(r"sed -n '(.*)' conda.yaml", dockerfile)
    assert expression in (ROOT / "Makefile").read_text().replace("$$/", "$/")


def test_kuberay_starts_a_run_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """One driver, started in the volume, whose options are those of the command line."""
    volume, job = kuberay()
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:3] == ["env", "-C", "/work"]
    config = resolved_by(words[3:], monkeypatch).config
    assert (config.runtime.workers, config.runtime.ray_address) == ("auto", "auto")
    assert config.model.id.startswith("/work/")
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (workers,) = (group["template"]["spec"] for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"])
    for pod in (head, workers):
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == volume["metadata"]["name"]
        assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == "/work"
    assert "envFrom" in head["containers"][0]
    assert "envFrom" not in workers["containers"][0]
    assert workers["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_kubernetes_takes_what_kuberay_makes() -> None:
    """The volume and the pods; the job itself is of a kind that KubeRay brings."""
    volume, job = kuberay()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert_kubernetes_takes(volume)
    cluster = job["spec"]["rayClusterSpec"]
    for template in (cluster["headGroupSpec"]["template"], cluster["workerGroupSpecs"][0]["template"]):
        assert_kubernetes_takes({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template})


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Jobs that MLflow's backend gives to a cluster; no image is built, and no cluster is asked."""
    given: list[dict[str, Any]] = []
    api = SimpleNamespace(create_namespaced_job=lambda namespace, body, pretty: given.append(body))
    kubernetes: Any = ModuleType("kubernetes")
    kubernetes.client = SimpleNamespace(BatchV1Api=lambda: api)
    kubernetes.config = SimpleNamespace(load_kube_config=lambda context: None)
    exception: Any = ModuleType("kubernetes.config.config_exception")
    exception.ConfigException = Exception
    monkeypatch.setitem(sys.modules, "kubernetes", kubernetes)
    monkeypatch.setitem(sys.modules, "kubernetes.config", ModuleType("kubernetes.config"))
    monkeypatch.setitem(sys.modules, "kubernetes.config.config_exception", exception)
    backend = importlib.import_module("mlflow.projects.kubernetes")
    docker = importlib.import_module("mlflow.projects.docker")
    monkeypatch.setattr(docker, "validate_docker_installation", lambda: None)
    monkeypatch.setattr(docker, "build_docker_image", lambda **_: SimpleNamespace(tags=["registry.example.org/cedkv-run:1"]))
    monkeypatch.setattr(backend, "push_image_to_registry", lambda tag: "sha256:0")
    yield given
    sys.modules.pop("mlflow.projects.kubernetes")


def test_mlflows_kubernetes_backend_makes_a_job_of_every_entry_point(
    store: str, jobs: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run: the job is one that Kubernetes takes, and its command starts the run that was asked for."""
    backend = json.loads((DEPLOY / "mlflow-kubernetes" / "backend.json").read_text())
    backend["kube-job-template-path"] = str(ROOT / backend["kube-job-template-path"])
    project = yaml.safe_load((DEPLOY / "mlflow-kubernetes" / "MLproject").read_text())
    assert set(project["entry_points"]) == set(yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"])
    for name in project["entry_points"]:
        mlflow.projects.run(
            str(DEPLOY / "mlflow-kubernetes"),
            entry_point=name,
            experiment_name="deploy",
            parameters={"model_id": "/work/models/m", "max_on": 7},
            backend="kubernetes",
            backend_config=backend,
            synchronous=False,
        )
        job = jobs.pop()
        (container,) = job["spec"]["template"]["spec"]["containers"]
        assert container["image"] == "registry.example.org/cedkv-run:1@sha256:0"
        environment = {each["name"]: each["value"] for each in container["env"]}
        assert mlflow.get_run(environment["MLFLOW_RUN_ID"]).info.status == "RUNNING"
        config = resolved_by(container["command"], monkeypatch).config
        assert (config.model.id, config.eval.on_samples) == ("/work/models/m", 7)
        assert_kubernetes_takes(job)
