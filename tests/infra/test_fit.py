"""Jobs and clusters fit: presets and entrypoints on one side, the rendered overlays on the other.

Each rule is shown to hold, and to fail on a copy that is broken at one place.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest

from infra.checks import render
from infra.checks.lints import FIT as LINTS
from infra.checks.lints.fit import having
from pipeline.command_line import load
from pipeline.config import CurateConfig, EvaluateConfig, TrainConfig
from pipeline.curation.filtering.score_table import JOIN_BYTES
from tests.infra.broken.serving import served_by, service

pytestmark = pytest.mark.skipif(
    not render.renderer_found(), reason="neither kustomize nor kubectl is installed"
)
OVERLAYS = render.overlays([])
Documents = list[dict[str, Any]]


@pytest.fixture(scope="module")
def prod() -> Documents:
    return render.render(render.OVERLAYS / "prod")


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda folder: folder.name)
def test_the_overlays_fit(overlay: Any) -> None:
    documents = render.render(overlay)
    assert [str(found) for lint in LINTS.values() for found in lint(documents)] == []


def named(documents: Documents, name: str) -> Any:
    found = [
        document
        for document in documents
        if document["kind"] == "RayJob" and document["metadata"]["name"] == name
    ]
    assert len(found) == 1
    return found[0]["spec"]


def group(documents: Documents, job: str, name: str) -> Any:
    groups = named(documents, job)["rayClusterSpec"]["workerGroupSpecs"]
    return next(each for each in groups if each["groupName"] == name)


def limits(each: Any) -> Any:
    return each["template"]["spec"]["containers"][0]["resources"]["limits"]


def entry(job: str, more: str) -> Callable[[Documents], None]:
    def change(documents: Documents) -> None:
        spec = named(documents, job)
        spec["entrypoint"] = f"{spec['entrypoint'].strip()} {more}"

    return change


def spec(job: str, **fields: Any) -> Callable[[Documents], None]:
    return lambda documents: named(documents, job).update(fields)


def of(job: str, name: str, **fields: Any) -> Callable[[Documents], None]:
    return lambda documents: group(documents, job, name).update(fields)


def start(job: str, name: str, **told: str) -> Callable[[Documents], None]:
    told = {key.replace("_", "-"): value for key, value in told.items()}
    return lambda documents: group(documents, job, name)["rayStartParams"].update(told)


def pod(job: str, name: str, **told: str) -> Callable[[Documents], None]:
    return lambda documents: limits(group(documents, job, name)).update(told)


def served(before: str, after: str) -> Callable[[Documents], None]:
    def change(documents: Documents) -> None:
        told = service(documents)["serveConfigV2"]
        assert before in told
        service(documents)["serveConfigV2"] = told.replace(before, after)

    return change


def by(**fields: Any) -> Callable[[Documents], None]:
    return lambda documents: served_by(documents).update(fields)


def no_site(documents: Documents) -> None:
    for document in documents:
        if document["kind"] == "ConfigMap":
            document["data"] = {}


@pytest.mark.parametrize(
    ("lint", "broken", "said"),
    [
        ("entrypoint-is-understood", entry("curate", "--filter.unit_row 5"), "unknown setting"),
        ("entrypoint-is-understood", entry("train", "--preset sd15-h900"), "unknown preset"),
        ("entrypoint-is-understood", entry("train", "--precision fp8"), "bad value"),
        ("entrypoint-is-understood", spec("train", entrypoint="python jobs/trian.py"), "none of"),
        ("entrypoint-is-understood", spec("train", entrypoint="echo jobs/train.py"), "none of"),
        ("entrypoint-is-understood", no_site, "the submitter has no $SSR_ROOT"),
        (
            "service-is-understood",
            served("batch:", "bach:"),
            "unknown setting --bach; did you mean",
        ),
        ("service-is-understood", served("batch: 8", "batch: many"), "--batch: bad value"),
        ("service-is-understood", served("sd15-h800", "sd15-h900"), "unknown preset"),
        ("service-is-understood", served("device: cuda", "device: auto"), "say cuda or cpu"),
        ("service-is-understood", served("token_file:", "controlnet:"), "args.token_file: is not"),
        ("service-is-understood", served("batch: 8", "port: 80"), "is said http_options.port"),
        ("service-is-understood", served("http_options", "http_option"), "unknown: http_option"),
        ("service-is-understood", served("rayservice:build", "deployment:application"), "not one"),
        ("service-is-understood", served("  - name", "  name"), "not one, of import_path"),
        ("service-is-understood", served("root: $SSR_ROOT", "root: $SSR_ROT"), "has no SSR_ROT"),
        ("service-is-understood", no_site, "args.root: the environment has no SSR_ROOT"),
        ("service-fills-its-group", served("replicas: 2", "replicas: 3"), "3 replicas, and 2 GPUs"),
        ("service-fills-its-group", by(maxReplicas=4), "2 replicas, and 4 GPUs"),
        (
            "service-fills-its-group",
            by(rayStartParams={"num-cpus": "1", "num-gpus": "1"}),
            "no room for the front beside a replica",
        ),
        ("service-fills-its-group", served("drain_s: 20", "drain_s: 30"), "after 30 s"),
        ("ray-has-what-the-pod-has", start("curate", "cpu-spot", num_cpus="64"), "the pod has 15"),
        ("ray-has-what-the-pod-has", start("train", "h800", num_gpus="4"), "the pod has 8"),
        (
            "gpu-nodes-are-for-gpu-work",
            start("curate", "gpu-caption", num_cpus="7"),
            "is 7 on nodes with GPUs",
        ),
        (
            "stages-fit-the-groups",
            entry("curate", "--caption_workers.cpus 2"),
            "no node holds one of caption_workers: 2 CPUs, 1 GPUs",
        ),
        (
            "stages-fit-the-groups",
            entry("curate", "--features_workers.gpus 2"),
            "no node holds one of features_workers",
        ),
        (
            "stages-fit-the-groups",
            of("curate", "gpu-caption", maxReplicas=0),
            "no node holds one of caption_workers",
        ),
        (
            "stages-fit-the-groups",
            of("curate", "gpu-caption", maxReplicas=1000),
            "1000 nodes have more gpus than all stages take, 128",
        ),
        (
            "stages-fit-the-groups",
            entry("curate", "--download_workers.max_workers 100"),
            "have more cpus than all stages take, 100",
        ),
        (
            "stages-fit-the-groups",
            start("evaluate", "gpu-evaluate", num_cpus="1"),
            "no node holds one of drawing: 2 CPUs, 1 GPUs",
        ),
        (
            "stages-fit-the-groups",
            entry("evaluate", "--scoring.gpus 2"),
            "no node holds one of scoring: 2 CPUs, 2 GPUs",
        ),
        (
            "stages-fit-the-groups",
            entry("evaluate", "--drawing.max_workers 0"),
            "8 nodes have more gpus than all stages take, 0",
        ),
        ("bench-is-in-a-store", entry("evaluate", "--bench dreambench"), "--bench is dreambench"),
        ("bench-is-in-a-store", entry("evaluate", "--bench /data/mini"), "--bench is /data/mini"),
        (
            "tasks-fit-the-memory",
            pod("curate", "cpu-spot", memory="16Gi"),
            "15 tasks and the object store may take 20 GiB, the pod has 16",
        ),
        (
            "tasks-fit-the-memory",
            pod("curate", "cpu-spot", memory="512Mi"),
            "no node with CPUs has the 1 GiB",
        ),
        (
            "training-fills-its-group",
            entry("train", "--workers 8"),
            "asks for 8 workers, the groups have 16 GPUs",
        ),
        ("training-fills-its-group", entry("train", "--use_gpu null"), "leaves use_gpu open"),
        (
            "training-fills-its-group",
            of("nccl-smoke", "h800", maxReplicas=4, replicas=4),
            "the groups have 32 GPUs",
        ),
        (
            "workers-divide-the-lanes",
            entry("train", "--workers 24"),
            "24 gpus must divide 64 lanes",
        ),
        (
            "workers-divide-the-lanes",
            entry("train", "--min_workers 12"),
            "12 gpus must divide 64 lanes",
        ),
        (
            "training-fits-its-nodes",
            entry("train", "--shuffle_rows 4096"),
            "lanes and the object store may take",
        ),
        ("training-fits-its-nodes", pod("train", "h800", memory="200Gi"), "the pod has 200"),
        ("training-fits-its-nodes", pod("train", "h800", cpu="16"), "16 cores for 8 GPUs"),
        (
            "checkpoints-come-in-time",
            spec("train", activeDeadlineSeconds=3600),
            "the steps alone take",
        ),
        (
            "checkpoints-come-in-time",
            entry("train", "--checkpoint_steps 50000000"),
            "a retry may end before its first",
        ),
        (
            "checkpoints-come-in-time",
            entry("train", "--log_steps 5000"),
            "after the notice, of 30",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    prod: Documents, lint: str, broken: Callable[[Documents], None], said: str
) -> None:
    documents = copy.deepcopy(prod)
    broken(documents)
    assert any(said in str(found) for found in LINTS[lint](documents)), [
        str(found) for found in LINTS[lint](documents)
    ]


def test_a_table_of_scores_needs_a_node_for_its_join(prod: Documents) -> None:
    documents = copy.deepcopy(prod)
    entry("curate", "--filter.score table --filter.score_inputs s3://b/scores")(documents)
    assert LINTS["tasks-fit-the-memory"](documents) == []
    pod("curate", "cpu-spot", memory=str(JOIN_BYTES - 1))(documents)
    (first, *_) = LINTS["tasks-fit-the-memory"](documents)
    assert "the 10 GiB of the filter's largest task" in str(first)


def test_every_rule_was_broken() -> None:
    (mark,) = [
        mark for mark in test_what_does_not_fit_is_named.pytestmark if mark.name == "parametrize"
    ]
    assert {case[0] for case in mark.args[1]} == set(LINTS)


def test_the_presets_agree_with_one_another() -> None:
    """What is curated by one is what the other trains on."""
    curated = load(CurateConfig, ["--preset", "laion-sd15"])
    trained = load(TrainConfig, ["--preset", "sd15-h800"])
    assert curated.models == trained.models and curated.root == trained.root
    assert trained.workers is not None and trained.lanes % trained.workers == 0
    assert trained.global_batch % trained.lanes == 0 and trained.use_gpu is True


@pytest.mark.parametrize("name", ["ci", "prod"])
def test_what_the_jobs_load_is_fetched(name: str) -> None:
    """Their pods cannot ask the hub: what is not in the claim ends them at their start."""
    documents = render.render(render.OVERLAYS / name)
    (site,) = (d for d in documents if d["metadata"]["name"].startswith("ssr-site-"))
    fetched = {model.partition("@")[0] for model in site["data"]["SSR_MODELS"].split()}
    loaded: dict[str, set[str | None]] = {}
    for cluster, _, cfg in having(documents, CurateConfig | TrainConfig | EvaluateConfig):
        loaded[cluster.document["metadata"]["name"]] = used = {cfg.models.base, cfg.models.vision}
        if isinstance(cfg, CurateConfig):
            used.add(cfg.models.captioner)
        if isinstance(cfg, EvaluateConfig):
            used |= {cfg.look.clip, cfg.look.dino, cfg.look.segmenter}
            used |= {weights for name in cfg.methods if (weights := name.partition("@")[2])}
    assert loaded.keys() == {"curate", "train", "evaluate"}
    assert set.union(*loaded.values()) == fetched


def test_what_the_readme_submits_fits_the_dev_cluster() -> None:
    text = (render.INFRA / "README.md").read_text().replace("\\\n", " ")
    submitted = re.findall(r"^ray job submit -- (python jobs/\w+\.py [^#\n]*)", text, re.M)
    assert [words.split()[1] for words in submitted] == ["jobs/curate.py", "jobs/train.py"]
    documents = render.render(render.OVERLAYS / "dev")
    (dev,) = (document for document in documents if document["kind"] == "RayCluster")
    documents.remove(dev)
    for words in submitted:
        name = words.split()[1].removeprefix("jobs/").removesuffix(".py")
        spec = {"entrypoint": words.strip(), "rayClusterSpec": copy.deepcopy(dev["spec"])}
        metadata = {"name": name, "namespace": dev["metadata"]["namespace"]}
        documents.append({"kind": "RayJob", "metadata": metadata, "spec": spec})
    on_one_gpu = [name for name in LINTS if name != "checkpoints-come-in-time"]  # days of it
    assert [str(found) for name in on_one_gpu for found in LINTS[name](documents)] == []
