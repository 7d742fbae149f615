"""The config of infra/jobs/serve.yaml on a Ray cluster, given as KubeRay gives it (but by a client:
a private cluster has no dashboard): on the CPU, with the shipped models, from another address.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from infra.checks.render import INFRA
from pipeline.cluster import connect
from pipeline.config.shared import RayConfig
from pipeline.generation import png
from pipeline.generation.recipe import rebuild
from tests.ports import free_port
from tests.system.test_serve import asked
from tests.system.waiting import until

pytestmark = [pytest.mark.system, pytest.mark.timeout(1200)]
TOKEN = "a token of sixteen letters or more"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("serve")
    (folder / "token").write_text(f"{TOKEN}\n")
    manifest = yaml.safe_load((INFRA / "jobs" / "serve.yaml").read_text())
    told: dict[str, Any] = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    told["http_options"] = {"host": "127.0.0.1", "port": free_port()}
    told["applications"][0]["args"] |= {
        "preset": "mini",
        "root": str(folder),
        "model": "miniworld:ssr",
        "token_file": str(folder / "token"),
        "device": "cpu",
        "dtype": "float32",
        "replicas": 1,
        "page": False,
    }
    return told


@pytest.fixture(scope="module")
def client(config: dict[str, Any]) -> Iterator[Any]:
    from ray import serve
    from ray.serve._private.api import serve_start

    with connect(RayConfig(num_cpus=4)):
        yield serve_start(http_options=config["http_options"])
        serve.shutdown()


def deployed(client: Any, config: dict[str, Any]) -> Any:
    """The application's status when Ray Serve has taken up the config, or refused it."""
    from ray import serve
    from ray.serve.schema import ServeDeploySchema

    client.deploy_apps(ServeDeploySchema.model_validate(config))
    ends = time.monotonic() + 600
    while time.monotonic() < ends:
        found = serve.status().applications.get("ssr")
        if found is not None and found.status in ("RUNNING", "DEPLOY_FAILED"):
            return found
        time.sleep(0.3)
    raise AssertionError(serve.status())


def status(url: str, headers: dict[str, str] | None = None) -> int:
    """Of the answer. Models that do not tell of themselves in time (503) are asked again."""

    def other_than_late() -> int:
        answer = httpx.get(url, headers=headers, timeout=60)
        return 0 if answer.status_code == 503 else answer.status_code

    return until(other_than_late)


def test_a_misspelt_setting_is_named(client: Any, config: dict[str, Any]) -> None:
    broken = copy.deepcopy(config)
    broken["applications"][0]["args"]["bach"] = 8
    found = deployed(client, broken)
    assert found.status == "DEPLOY_FAILED"
    assert (
        found.message.strip()
        .splitlines()[-1]
        .endswith("UserError: unknown setting --bach; did you mean --batch?")
    )


def test_the_service_draws_for_those_who_bring_the_token(
    client: Any, config: dict[str, Any]
) -> None:
    found = deployed(client, config)
    assert found.status == "RUNNING", found
    assert set(found.deployments) == {"drawer", "front"}
    url = f"http://127.0.0.1:{config['http_options']['port']}"
    for path in ("/healthz", "/readyz"):
        assert status(f"{url}{path}") == 200
    for path in ("/v1/facts", "/metrics", "/openapi.json"):
        assert httpx.get(f"{url}{path}", timeout=60).status_code == 401
    assert httpx.post(f"{url}/v1/pictures", timeout=60, **asked(1, 2)).status_code == 401
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    answer = httpx.post(f"{url}/v1/pictures", headers=bearer, timeout=200, **asked(1, 2))
    assert answer.status_code == 200, answer.text
    made_by = png.made_by(answer.content)
    assert made_by is not None
    drawn = rebuild(made_by["recipe"], png.sources(answer.content))
    assert (drawn.prompt, drawn.seed, drawn.steps) == ("a cup on snow", 1, 2)
    figures = httpx.get(f"{url}/metrics", headers=bearer, timeout=60).text
    assert 'ssr_requests_total{method="POST",route="/v1/pictures",status="200"} 1.0' in figures


def test_changed_arguments_and_another_token_are_taken_up(
    client: Any, config: dict[str, Any]
) -> None:
    """Without a new cluster, and on the same port."""
    changed = copy.deepcopy(config)
    changed["applications"][0]["args"] |= {"limits": {"steps": 7}, "steps": 7}
    token = Path(changed["applications"][0]["args"]["token_file"])
    token.write_text(TOKEN[::-1])
    assert deployed(client, changed).status == "RUNNING"
    url = f"http://127.0.0.1:{config['http_options']['port']}"
    old, new = ({"Authorization": f"Bearer {each}"} for each in (TOKEN, TOKEN[::-1]))
    assert status(f"{url}/v1/facts", old) == 401
    assert status(f"{url}/v1/facts", new) == 200
    answer = httpx.post(f"{url}/v1/pictures", headers=new, timeout=60, **asked(1, 8))
    assert answer.status_code == 422 and "less than or equal to 7" in answer.text
