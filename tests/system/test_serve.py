"""jobs/serve.py as people run it: a crowd, killed processes, a stop. Two replicas, tiny models."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import ipaddress
import json
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

from pipeline.generation import png
from pipeline.generation.recipe import rebuild
from tests.documented import fenced
from tests.ports import free_port
from tests.system.jobs import REPOSITORY
from tests.system.waiting import until
from tests.untrained import save_encoder, tiny_parts

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]
ANSWERED_S = 220.0
"""Longer than the service's deadline: who has no answer by then hangs."""
PAGE, HERE = "docs/serving.md", "http://127.0.0.1:8000"
LONG = 300
"""Steps of a picture that is still drawn when something happens to it: seconds."""


@dataclass
class Service:
    process: subprocess.Popen[str]
    url: str
    said: list[str]

    def replicas(self, name: str) -> list[psutil.Process]:
        """Processes of a deployment, as Ray titles them."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                line = process.cmdline()
            except psutil.Error:
                continue
            if line and line[0].startswith(f"ray::ServeReplica:ssr:{name}"):
                found.append(process)
        return found

    def figure(self, name: str) -> float:
        """Of /metrics."""
        text = httpx.get(f"{self.url}/metrics", timeout=ANSWERED_S).text
        return float(re.findall(rf"^{name} (\S+)", text, re.M)[0])

    def facts(self) -> dict[str, Any]:
        """Empty where the models do not tell of themselves in time, which the service gives them
        little of.
        """
        answer = httpx.get(f"{self.url}/v1/facts", timeout=ANSWERED_S)
        assert answer.status_code in (200, 503), answer.text
        return dict(answer.json()) if answer.status_code == 200 else {}

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=10).status_code == 200
        except httpx.HTTPError:
            return False


def job(root: Path, tiny: Path, *words: str) -> subprocess.Popen[str]:
    models = ["--models.base", str(tiny / "sd"), "--models.vision", str(tiny / "clip")]
    given = ["--root", str(root), "--device", "cpu", "--port", str(free_port()), *words]
    return subprocess.Popen(
        [sys.executable, "jobs/serve.py", *models, *given],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def service(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("root")
    save_encoder(root / "model", tiny_parts(tiny_models))
    settings = ["--replicas", "2", "--batch", "8", "--queue", "16", "--deadline_s", "200"]
    settings += ["--drain_s", "200", "--limits.steps", str(LONG)]
    process = job(root, tiny_models, *settings)
    said, lines = list[str](), queue.Queue[str]()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            lines.put(line)

    threading.Thread(target=read, daemon=True).start()
    until(lambda: any(line.startswith("stop:") for line in said), process, what=lambda: said)
    url = re.search(r"service:\s+(\S+)", "".join(said))
    assert url is not None
    yield Service(process, url[1], said)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def asked(seed: int, steps: int = 4) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "green").save(buffer, "PNG")
    subjects = [{"image": 0, "query": "cup"}]
    recipe = {"prompt": "a cup on snow", "subjects": subjects, "seed": seed, "steps": steps}
    return {
        "data": {"recipe": json.dumps(recipe)},
        "files": [("files", ("cup.png", buffer.getvalue()))],
    }


def crowd(
    service: Service, clients: int, steps: int, meanwhile: Callable[[], object] | None = None
) -> list[httpx.Response]:
    """As many clients at once, each with a connection of its own; `meanwhile` happens while they
    wait, and some are drawn: for that their pictures need LONG. Fails where one hangs.
    """

    async def one(seed: int) -> httpx.Response:
        async with httpx.AsyncClient(timeout=ANSWERED_S) as client:
            return await client.post(f"{service.url}/v1/pictures", **asked(seed, steps))

    async def all_of_them() -> list[httpx.Response]:
        tasks = [asyncio.create_task(one(seed)) for seed in range(clients)]
        if meanwhile is not None:

            def under_way() -> bool:
                assert not all(task.done() for task in tasks), "all were drawn before it was seen"
                return service.figure("ssr_drawing") >= clients // 2

            await asyncio.to_thread(until, under_way)
            await asyncio.to_thread(meanwhile)
        return await asyncio.gather(*tasks)

    return asyncio.run(all_of_them())


def statuses(answers: list[httpx.Response]) -> Counter[int]:
    return Counter(answer.status_code for answer in answers)


def test_it_says_where_it_is_and_draws(service: Service) -> None:
    said = "".join(service.said)
    assert "Traceback" not in said and "WARNING" not in said, said
    for word in ("service:", "page:", "api:", "curl", "stop:"):
        assert word in said
    until(service.ready, service.process)
    answer = httpx.post(f"{service.url}/v1/pictures", timeout=ANSWERED_S, **asked(7))
    assert answer.status_code == 200, answer.text
    made_by = png.made_by(answer.content)
    assert made_by is not None and len(made_by["model"]) == 64
    recipe = rebuild(made_by["recipe"], png.sources(answer.content))
    assert recipe.seed == 7 and recipe.subjects[0].query == "cup"
    routes = httpx.get(f"{service.url}/-/routes", timeout=ANSWERED_S)
    assert routes.json() == {"/": "ssr"}, "which Ray's proxy tells to anybody, and no more"
    facts = until(service.facts, service.process)
    assert (facts["side"], facts["device"]) == (32, "cpu")
    bad = httpx.post(f"{service.url}/v1/pictures", timeout=ANSWERED_S, data={"recipe": "{}"})
    assert bad.status_code == 415 and list(bad.json()) == ["error"]


def test_the_documentations_requests_are_answered(service: Service, tmp_path: Path) -> None:
    """Its curls, that of the job itself, and its Python, as they stand but for the port."""
    for name in ("cup.png", "a.png", "b.png", "photo.png"):
        Image.new("RGB", (40, 40), "green").save(tmp_path / name)
    Image.new("L", (40, 40), 255).save(tmp_path / "b-mask.png")
    asked = [each for each in fenced(PAGE) if each.words[0] == "curl"]
    (own,) = re.findall(r"^try: +(.+)$", "".join(service.said), re.M)
    for words in [*(each.words for each in asked), shlex.split(own)]:
        there = [word.replace(HERE, service.url) for word in words]
        done = subprocess.run(
            [*there, "-sS", "--fail-with-body"],
            cwd=tmp_path,
            capture_output=True,
            timeout=ANSWERED_S,
        )
        assert done.returncode == 0, (words, done.stderr, done.stdout[:500])
        if "-o" in words:
            said = png.made_by((tmp_path / "out.png").read_bytes())
            (tmp_path / "out.png").unlink()
            recipe = json.loads(next(w for w in words if w.startswith("recipe=")).partition("=")[2])
            assert said and said["recipe"]["prompt"] == recipe["prompt"]
            assert len(said["recipe"]["subjects"]) == len(recipe["subjects"])
        else:
            assert len(json.loads(done.stdout)["looks"]) == 2
    assert len(asked) == 3

    (code,) = re.findall(r"^```python\n(.*?)^```", (REPOSITORY / PAGE).read_text(), re.M | re.S)
    found: dict[str, Any] = {}
    with contextlib.chdir(tmp_path):
        exec(compile(code.replace(HERE, service.url), PAGE, "exec"), found)
    body = found["answer"].json()
    assert body["settings"]["recipe"]["prompt"] == "a cup on snow" and len(body["attention"]) == 1
    assert png.picture(base64.b64decode(body["picture"])).size == (32, 32)


def test_the_page_is_there_and_draws(service: Service) -> None:
    """As its script asks; tests/system/test_page_browser.py has a browser before it."""
    with httpx.Client(base_url=service.url, timeout=ANSWERED_S) as client:
        assert "SSR on Ray" in client.get("/").text
        assert list(client.get("/nothing").json()) == ["error"]
        asks = next(
            it for it in client.get("/config").json()["dependencies"] if it["api_name"] == "draw"
        )
        card = json.dumps({"name": "", "image": "", "mask": "", "query": ""})
        empty = [card, 1, "everywhere", ""]
        words = ["a cup on snow", "", 7, 3, 7.5, 0, 0, 0, "{}", 1]
        said = {"fn_index": asks["id"], "session_hash": "a", "data": [*empty * 4, *words]}
        assert client.post("/gradio_api/queue/join", json=said).status_code == 200
        shown = list[str]()
        with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": "a"}) as told:
            for line in told.iter_lines():
                shown.append(line)
                if "process_completed" in line:
                    break
    assert any("data:image/png" in line for line in shown), shown[-3:]
    assert any("step 3 of 3" in line for line in shown) and '"success":true' in shown[-1]


def test_nobody_else_reaches_any_of_its_processes(service: Service) -> None:
    tree = [service.process.pid]
    tree += [each.pid for each in psutil.Process(service.process.pid).children(recursive=True)]
    listening = [
        each.laddr.ip
        for each in psutil.net_connections("inet")
        if each.status == psutil.CONN_LISTEN and each.pid in tree
    ]
    here = [ipaddress.ip_address(each.removeprefix("::ffff:")).is_loopback for each in listening]
    assert len(here) > 3 and all(here), listening


def test_a_hundred_clients_are_all_answered(service: Service) -> None:
    names = ("ssr_batch_pictures_sum", "ssr_batch_pictures_count")
    before, began = [service.figure(name) for name in names], time.monotonic()
    # steps enough that others come while some are drawn
    answers = crowd(service, 100, 20)
    assert time.monotonic() - began < ANSWERED_S
    counted = statuses(answers)
    assert set(counted) <= {200, 429} and counted[200] >= 16, counted
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)
    beside, drawn = (service.figure(name) - was for name, was in zip(names, before, strict=True))
    assert beside / drawn > 2, "pictures are denoised together"


def test_a_killed_replica_costs_nobody_an_answer(service: Service) -> None:
    answers = crowd(service, 16, LONG, lambda: service.replicas("drawer")[0].kill())
    counted = statuses(answers)
    assert set(counted) <= {200, 503} and counted[200] >= 8, counted
    until(lambda: len(service.replicas("drawer")) == 2, service.process)
    until(service.ready, service.process)
    assert statuses(crowd(service, 4, 2)) == {200: 4}


def test_with_all_replicas_killed_everybody_is_told(service: Service) -> None:
    def kill() -> None:
        for replica in service.replicas("drawer"):
            replica.kill()

    counted = statuses(crowd(service, 8, LONG, kill))
    assert set(counted) <= {200, 503}, counted
    until(service.ready, service.process)
    assert statuses(crowd(service, 4, 2)) == {200: 4}


def test_the_front_comes_back_too(service: Service) -> None:
    """Its clients are answered 500 by Ray's proxy, or see their connection end; none hangs."""
    with contextlib.suppress(httpx.TransportError):
        counted = statuses(crowd(service, 8, LONG, lambda: service.replicas("front")[0].kill()))
        assert set(counted) <= {200, 500, 503}, counted
    until(service.ready, service.process)
    assert statuses(crowd(service, 4, 2)) == {200: 4}


def test_a_stop_finishes_what_is_drawn(service: Service) -> None:
    refused = list[str]()

    def stop() -> None:
        service.process.send_signal(signal.SIGTERM)

        def stopping() -> bool:
            # no recipe: let in, it is refused at once. A picture would wait behind the others, and
            # be the last one that the service lives for.
            bad = {"recipe": "{}"}
            answer = httpx.post(f"{service.url}/v1/pictures", timeout=ANSWERED_S, data=bad)
            assert answer.status_code in (415, 503), answer.text
            refused.extend([answer.json()["error"]] if answer.status_code == 503 else [])
            return bool(refused)

        until(stopping)

    assert statuses(crowd(service, 6, LONG, stop)) == {200: 6}
    assert "stopping" in refused[0]
    assert service.process.wait(ANSWERED_S) == 0, service.said
    since = "".join(service.said).partition("stopping: ")[2]
    assert since.endswith("stopped\n") and "Traceback" not in since, since


def test_no_model_is_one_line(tiny_models: Path, tmp_path: Path) -> None:
    said, _ = (process := job(tmp_path, tiny_models)).communicate(timeout=300)
    assert process.returncode == 2 and said.count("\n") == 1, said
    assert "no trained model" in said and "jobs/train.py" in said
