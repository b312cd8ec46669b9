# SPDX-License-Identifier: Apache-2.0
"""The manifests: valid by Kubernetes' own schemas, and of one mind."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import kubernetes_validate
import pytest

from kvserve.http.draining import END_SECONDS
from kvserve.units import parse_bytes
from tests.deploy.conftest import DEPLOY, load_yaml

_BASE = DEPLOY / "kubernetes" / "base"
_GPU = DEPLOY / "kubernetes" / "gpu"
_VERSION = "1.37"
_NO_SCHEMA = {"PodMonitor"}


@cache
def manifests() -> dict[str, dict[str, Any]]:
    """The base's resources by kind."""
    names = load_yaml(_BASE / "kustomization.yaml")["resources"]
    documents = [load_yaml(_BASE / name) for name in names]
    return {document["kind"]: document for document in documents}


def pod() -> dict[str, Any]:
    spec: dict[str, Any] = manifests()["Deployment"]["spec"]["template"]["spec"]
    return spec


def container() -> dict[str, Any]:
    (only,) = pod()["containers"]
    found: dict[str, Any] = only
    return found


@pytest.mark.parametrize("kind", sorted(set(manifests()) - _NO_SCHEMA))
def test_manifests_are_valid(kind: str) -> None:
    kubernetes_validate.validate(manifests()[kind], _VERSION, strict=True)


def test_a_mistake_in_a_manifest_would_be_found() -> None:
    broken = {**manifests()["Service"], "spec": {"port": 80}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, _VERSION, strict=True)


def test_the_gpu_patch_is_a_valid_deployment_apart_from_what_the_base_says() -> None:
    patch = load_yaml(_GPU / "deployment.yaml")
    base = manifests()["Deployment"]
    assert patch["metadata"]["name"] == base["metadata"]["name"]
    (patched,) = patch["spec"]["template"]["spec"]["containers"]
    assert patched["name"] == container()["name"]
    whole = {**pod(), "containers": [{**container(), **patched}]}
    template = {**base["spec"]["template"], "spec": whole}
    merged = {**base, "spec": {**base["spec"], "template": template}}
    kubernetes_validate.validate(merged, _VERSION, strict=True)
    assert patched["resources"]["limits"]["nvidia.com/gpu"] == 1
    images = load_yaml(_GPU / "kustomization.yaml")["images"]
    (base_image,) = load_yaml(_BASE / "kustomization.yaml")["images"]
    assert base_image["name"] == container()["image"]
    assert images[0]["name"] == base_image["newName"]


def test_every_selector_finds_the_pods() -> None:
    labels = manifests()["Deployment"]["spec"]["template"]["metadata"]["labels"]
    found = manifests()
    for kind in ("Deployment", "PodDisruptionBudget", "PodMonitor"):
        assert found[kind]["spec"]["selector"]["matchLabels"] == labels, kind
    assert found["Service"]["spec"]["selector"] == labels
    assert found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    for spread in pod()["topologySpreadConstraints"]:
        assert spread["labelSelector"]["matchLabels"] == labels


def test_ports_are_named_as_the_container_names_them() -> None:
    ports = {port["name"] for port in container()["ports"]}
    found = manifests()
    asked = [
        found["Service"]["spec"]["ports"][0]["targetPort"],
        found["PodMonitor"]["spec"]["podMetricsEndpoints"][0]["port"],
        found["NetworkPolicy"]["spec"]["ingress"][0]["ports"][0]["port"],
        *(container()[f"{kind}Probe"]["httpGet"]["port"] for kind in _PROBES),
    ]
    assert set(asked) == ports


_PROBES = ("startup", "readiness", "liveness")


def test_the_pod_monitor_names_the_job_that_the_alerts_speak_of() -> None:
    monitor = manifests()["PodMonitor"]["spec"]
    labels = manifests()["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert labels[monitor["jobLabel"]] == "kvserve"
    assert monitor["podMetricsEndpoints"][0]["path"] == "/metrics"


def test_a_pod_has_time_to_finish_what_it_runs(
    serve_parser: Callable[[list[str]], Any],
) -> None:
    sleep = container()["lifecycle"]["preStop"]["sleep"]["seconds"]
    args = serve_parser(container()["args"])
    assert sleep > 0
    grace = pod()["terminationGracePeriodSeconds"]
    assert sleep + args.shutdown_timeout + END_SECONDS <= grace


def test_servers_are_given_flags_that_kvserve_serve_has(
    serve_parser: Callable[[list[str]], Any],
) -> None:
    (gpu,) = load_yaml(_GPU / "deployment.yaml")["spec"]["template"]["spec"][
        "containers"
    ]
    for args in (container()["args"], gpu["args"]):
        assert serve_parser(args).shutdown_timeout > 0


def test_the_cache_fits_into_the_memory_that_is_asked_for(
    serve_parser: Callable[[list[str]], Any],
) -> None:
    cache_bytes = serve_parser(container()["args"]).kv_cache_memory_bytes
    memory = container()["resources"]["limits"]["memory"]
    assert 2 * cache_bytes <= parse_bytes(f"{memory}B", "memory")


def test_pods_meet_the_restricted_standard_of_their_namespace() -> None:
    enforced = manifests()["Namespace"]["metadata"]["labels"]
    assert enforced["pod-security.kubernetes.io/enforce"] == "restricted"
    assert pod()["securityContext"]["runAsNonRoot"]
    assert pod()["securityContext"]["runAsUser"] > 0
    assert pod()["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    context = container()["securityContext"]
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"]["drop"] == ["ALL"]
    assert context["readOnlyRootFilesystem"]


def test_what_a_server_writes_to_is_mounted() -> None:
    mounts = {mount["mountPath"] for mount in container()["volumeMounts"]}
    assert mounts == {"/var/cache/kvserve", "/tmp", "/home/kvserve", "/dev/shm"}
    volumes = {volume["name"] for volume in pod()["volumes"]}
    assert {mount["name"] for mount in container()["volumeMounts"]} == volumes


def test_the_autoscaler_asks_for_a_metric_that_the_adapter_makes_of_vllms() -> None:
    scaler = manifests()["HorizontalPodAutoscaler"]["spec"]
    assert (
        scaler["scaleTargetRef"]["name"]
        == manifests()["Deployment"]["metadata"]["name"]
    )
    (metric,) = scaler["metrics"]
    adapter = load_yaml(DEPLOY / "kubernetes" / "prometheus-adapter.yaml")
    (rule,) = adapter["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert rule["seriesQuery"].startswith("vllm:num_requests_waiting{")
    # A count of its own would undo what the autoscaler decided, at every apply.
    assert "replicas" not in manifests()["Deployment"]["spec"]


def test_production_stack_gives_flags_that_kvserve_serve_has(
    serve_parser: Callable[[list[str]], Any],
) -> None:
    values = load_yaml(DEPLOY / "production-stack" / "values.yaml")
    (model,) = values["servingEngineSpec"]["modelSpec"]
    args = serve_parser([model["modelURL"], *model["vllmConfig"]["extraArgs"]])
    assert args.model_tag == "SmolLM2-135M-Instruct"
    assert args.policy == "retrieval"
    # What the chart leaves a pod between SIGTERM and SIGKILL.
    assert args.shutdown_timeout + END_SECONDS <= 30
