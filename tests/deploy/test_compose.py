# SPDX-License-Identifier: Apache-2.0
"""compose.yaml, as Docker Compose itself reads it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvserve.bench.command import make_parser
from kvserve.http.draining import END_SECONDS
from tests.deploy.conftest import DEPLOY, ROOT, load_yaml, run_tool

_OURS = {"cpu": "kvserve-cpu", "gpu": "kvserve-gpu"}


def compose(
    *profiles: str, override: str | None = None, **environment: str
) -> dict[str, Any]:
    files = ["compose.yaml", *([override] if override else [])]
    flags: list[str | Path] = []
    for file in files:
        flags += ["-f", DEPLOY / file]
    for profile in profiles:
        flags += ["--profile", profile]
    text = run_tool("docker-compose", *flags, "config", "--format=json", **environment)
    config: dict[str, Any] = json.loads(text)
    return config


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose("cpu", "gpu", "loadtest")["services"]
    return found


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_a_profile_starts_its_server_prometheus_and_grafana(profile: str) -> None:
    names = set(compose(profile)["services"])
    assert names == {_OURS[profile], "prometheus", "grafana"}


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_an_override_leaves_grafana_out_and_nothing_else(profile: str) -> None:
    config = compose(profile, override="compose.no-grafana.yaml")
    whole = compose(profile)
    del whole["services"]["grafana"], whole["volumes"]["grafana-data"]
    assert config == whole


def test_no_service_runs_as_root_or_may_gain_rights(
    services: dict[str, dict[str, Any]],
) -> None:
    for name, service in services.items():
        user = service["user"].split(":")[0]
        assert int(user) > 0, name
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_every_service_has_limits_of_memory_and_processors() -> None:
    services = compose("cpu", "gpu", "loadtest", KVSERVE_CPUS="3")["services"]
    for name, service in services.items():
        limits = service["deploy"]["resources"]["limits"]
        assert float(limits["cpus"]) == (3 if name in _OURS.values() else 1), name
        assert int(limits["memory"]) > 0, name


def test_no_service_asks_for_more_processors_than_a_machine_may_have(
    services: dict[str, dict[str, Any]],
) -> None:
    """An engine refuses to start what may use more processors than there are."""
    for name, service in services.items():
        assert service["deploy"]["resources"]["limits"].get("cpus", 0) <= 1, name


def test_every_service_that_stays_has_a_health_check(
    services: dict[str, dict[str, Any]],
) -> None:
    for name, service in services.items():
        # The image of what does not stay has one, which would never succeed.
        assert service["healthcheck"].get("disable", False) == (name == "loadtest")


def test_images_are_pinned_to_a_version(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        tag = service["image"].rpartition(":")[2]
        assert any(character.isdigit() for character in tag), name


def test_ports_are_published_on_the_loopback_device_alone(
    services: dict[str, dict[str, Any]],
) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 4
    assert {port["host_ip"] for port in ports} == {"127.0.0.1"}


def test_every_file_that_is_mounted_exists(
    services: dict[str, dict[str, Any]],
) -> None:
    sources = [
        Path(volume["source"])
        for service in services.values()
        for volume in service.get("volumes", [])
        if volume["type"] == "bind"
    ]
    assert len(sources) == 4
    for source in sources:
        assert source.exists(), source


def test_what_is_compiled_at_run_time_may_be_executed(
    services: dict[str, dict[str, Any]],
) -> None:
    for name in _OURS.values():
        for mount in services[name]["tmpfs"]:
            assert "exec" in mount, (name, mount)


def test_prometheus_and_the_load_test_look_for_the_server_where_it_is(
    services: dict[str, dict[str, Any]],
) -> None:
    config = load_yaml(DEPLOY / "prometheus" / "prometheus.yml")
    (target,) = config["scrape_configs"][0]["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert f"http://{target}" in services["loadtest"]["entrypoint"]
    for name in _OURS.values():
        assert host in services[name]["networks"]["default"]["aliases"]
        assert services[name]["ports"][0]["target"] == int(port)


def test_grafana_finds_prometheus_and_the_dashboard(
    services: dict[str, dict[str, Any]],
) -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = load_yaml(provisioning / "datasources" / "prometheus.yml")[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    assert source["type"] == "prometheus"
    (provider,) = load_yaml(provisioning / "dashboards" / "kvserve.yml")["providers"]
    targets = {v["target"]: v["source"] for v in services["grafana"]["volumes"]}
    mounted = Path(targets[provider["options"]["path"]])
    home = services["grafana"]["environment"][
        "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"
    ]
    assert (mounted / Path(home).name).exists()


def test_servers_are_given_flags_that_kvserve_serve_has(
    services: dict[str, dict[str, Any]], serve_parser: Callable[[list[str]], Any]
) -> None:
    for name in _OURS.values():
        args = serve_parser(services[name]["command"])
        grace = services[name]["stop_grace_period"]
        assert grace == "1m15s"
        assert 0 < args.shutdown_timeout <= 75 - END_SECONDS


def test_the_load_test_is_a_command_that_kvserve_bench_has(
    services: dict[str, dict[str, Any]],
) -> None:
    program, command, *flags = services["loadtest"]["entrypoint"]
    assert (program, command) == ("kvserve", "bench")
    args = make_parser().parse_args([*flags, *services["loadtest"]["command"]])
    assert args.url


def test_one_key_goes_to_the_server_and_to_the_load_test() -> None:
    services = compose("cpu", "loadtest", KVSERVE_API_KEY="k-1")["services"]
    assert services["kvserve-cpu"]["environment"]["VLLM_API_KEY"] == "k-1"
    assert services["loadtest"]["environment"]["OPENAI_API_KEY"] == "k-1"


def test_the_dockerfile_has_the_targets_that_are_built_and_lints_clean(
    services: dict[str, dict[str, Any]],
) -> None:
    text = (ROOT / "Dockerfile").read_text()
    for service in services.values():
        if "build" in service:
            assert f" AS {service['build']['target']}\n" in text
            assert Path(service["build"]["context"]) == ROOT
    run_tool("hadolint", ROOT / "Dockerfile")


def test_a_mirror_is_named_by_arguments_that_the_dockerfile_has() -> None:
    """Those that are not set are left out, so the Dockerfile's own values count."""
    text = (ROOT / "Dockerfile").read_text()
    wanted = {
        "cpu": {"PYTHON_IMAGE", "TORCH_INDEX", "PACKAGE_INDEX"},
        "gpu": {"VLLM_IMAGE", "PACKAGE_INDEX"},
    }
    for profile, names in wanted.items():
        mirror = {name: f"mirror/{name}" for name in names}
        build = compose(profile, **mirror)["services"][_OURS[profile]]["build"]
        assert build["args"] == mirror
        build = compose(profile)["services"][_OURS[profile]]["build"]
        assert not build.get("args")
        for name in names:
            assert f"\nARG {name}=" in text, name


def test_what_is_compiled_and_downloaded_lies_in_the_volume() -> None:
    stages = (ROOT / "Dockerfile").read_text().split("\nFROM ")[1:]
    for stage in stages:
        if stage.split()[2] in _OURS:
            assert "VLLM_CACHE_ROOT=/var/cache/kvserve/" in stage
            assert "HF_HOME=/var/cache/kvserve/" in stage


def test_images_end_as_a_user_who_is_not_root() -> None:
    stages = (ROOT / "Dockerfile").read_text().split("\nFROM ")[1:]
    final = [stage for stage in stages if stage.split()[2] in _OURS]
    assert len(final) == 2
    for stage in final:
        users = [line for line in stage.splitlines() if line.startswith("USER ")]
        assert users[-1] == "USER 10001:10001"


def test_what_images_copy_exists_and_is_not_ignored() -> None:
    allowed = [
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copies = [
        line for line in lines if line.startswith("COPY ") and "--from" not in line
    ]
    sources = {source for line in copies for source in line.split()[1:-1]}
    assert "kvserve" in sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(source == a or source.startswith(f"{a}/") for a in allowed), source


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["serve", "MODEL", "--port", "1"], "kvserve serve MODEL --port 1"),
        (["bench", "serve"], "python3 -m vllm.entrypoints.cli.main bench serve"),
    ],
)
def test_vllm_serve_in_our_images_is_kvserve_serve(
    tmp_path: Path, arguments: list[str], told: str
) -> None:
    for name in ("kvserve", "python3"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho {name} "$@"\n')
        program.chmod(0o755)
    done = subprocess.run(
        [DEPLOY / "image" / "vllm", *arguments],
        env=os.environ | {"PATH": f"{tmp_path}:/bin:/usr/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == told


def test_the_script_that_tries_images_refuses_a_step_it_has_not() -> None:
    done = subprocess.run(
        [ROOT / "scripts" / "try_compose.sh", "build", "fly"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("try_compose: no such step: fly; there are build ")
    assert not done.stdout
