"""The jobs fit the clusters that they run on: settings on one side, groups and pods on the other.

Entrypoints are parsed as the jobs do it, so presets and dotted keys are checked as well. What a
stage, a task and a training worker take comes from the settings; what lanes hold and how fast steps
are, from the arithmetic of jobs/plan.py (pipeline/planning).
"""

from __future__ import annotations

import re
import shlex
import string
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import UnionType
from typing import Any

from infra.checks.findings import Finding, lint, subject
from infra.checks.lints.serving import applications, config
from infra.checks.objects import Cluster, Group, clusters, dig, environment, pods, quantity
from infra.checks.render import Document
from pipeline.command_line import load
from pipeline.config import (
    AllReduceConfig,
    CurateConfig,
    EvaluateConfig,
    GenerateConfig,
    PlanConfig,
    ServeConfig,
    StageResources,
    TrainConfig,
)
from pipeline.curation.filtering.score_table import JOIN_BYTES
from pipeline.errors import UserError
from pipeline.planning import StagePlan, plan
from pipeline.serving.arguments import FRONT_CPUS, IMPORT_PATH, settings
from pipeline.tasks import TASK_BYTES

OBJECT_STORE, MOST_OBJECT_STORE = 0.3, 200e9
"""Share of a pod's memory that Ray takes for its object store where it is not told, and the bytes
that it takes at most.
"""
CPUS_PER_GPU = 4
"""Cores of a node per training worker: the step's own, the lanes' reader, copies to the GPU."""

_SERVE_CONFIG = {
    "proxy_location", "http_options", "grpc_options", "logging_config", "applications",
}  # fmt: skip
_JOBS: dict[str, type] = {
    "jobs/curate.py": CurateConfig,
    "jobs/train.py": TrainConfig,
    "jobs/generate.py": GenerateConfig,
    "jobs/evaluate.py": EvaluateConfig,
    "pipeline.training.all_reduce": AllReduceConfig,
}


@dataclass(frozen=True)
class Node:
    """A pod of a group as Ray sees it, and how many of them there may be."""

    group: Group
    cpus: float
    gpus: float
    memory: float
    """Bytes."""
    most: int

    @staticmethod
    def of(group: Group) -> Node:
        limits = dig(group.ray.spec, "resources.limits", {})
        cpus = quantity(group.start.get("num-cpus", limits.get("cpu", 0)))
        gpus = quantity(group.start.get("num-gpus", group.gpus))
        hosts = int(group.spec.get("numOfHosts", 1))
        most = int(group.spec.get("maxReplicas", group.spec.get("replicas", 0))) * hosts
        return Node(group, cpus, gpus, quantity(limits.get("memory", 0)), most)

    def takes(self, worker: StageResources) -> bool:
        return worker.cpus <= self.cpus and worker.gpus <= self.gpus

    @property
    def object_store(self) -> float:
        """Bytes."""
        taken = min(self.memory * OBJECT_STORE, MOST_OBJECT_STORE)
        return quantity(self.group.start.get("object-store-memory", taken))


# --- entrypoints ------------------------------------------------------------------------


@lint("fit", "an entrypoint is one of our jobs, with settings that it knows and may have")
def entrypoint_is_understood(documents: list[Document]) -> Iterator[Finding]:
    for cluster in clusters(documents):
        if cluster.job is not None:
            try:
                _settings(cluster, documents)
            except UserError as error:
                path = f"{cluster.path.rpartition('.')[0]}.entrypoint"
                yield Finding(subject(cluster.document), path, str(error), "mend it")


def _settings(cluster: Cluster, documents: list[Document]) -> Any:
    """The settings that the cluster's entrypoint gives its job."""
    submitter = [
        environment(documents, pod, container)
        for pod in pods(documents)
        if pod.document is cluster.document and pod.path.endswith("submitterPodTemplate")
        for container in pod.containers
    ]
    known = submitter[0] if submitter else {}
    text = string.Template((cluster.job or {}).get("entrypoint", "")).safe_substitute(known)
    if unset := re.search(r"\$\{?\w+\}?", text):
        raise UserError(f"the submitter has no {unset[0]} in its environment")
    words = shlex.split(text)
    command = words[1:3] if words[1:2] == ["-m"] else words[1:2]
    name = command[-1] if command else ""
    if words[:1] != ["python"] or name not in _JOBS:
        raise UserError(f"{text.strip()[:60]!r} is none of: python {', '.join(_JOBS)}")
    return load(_JOBS[name], words[1 + len(command) :])


def having(
    documents: list[Document], settings: type | UnionType
) -> Iterator[tuple[Cluster, list[Node], Any]]:
    """(cluster, its groups' nodes, settings) of the jobs that have such settings."""
    for cluster in clusters(documents):
        if cluster.job is None:
            continue
        try:
            cfg = _settings(cluster, documents)
        except UserError:
            continue  # told by entrypoint_is_understood
        if isinstance(cfg, settings):
            yield cluster, [Node.of(group) for group in cluster.workers], cfg


# --- groups -----------------------------------------------------------------------------


@lint("fit", "what Ray is told of a node is no more than its pod has")
def ray_has_what_the_pod_has(documents: list[Document]) -> Iterator[Finding]:
    for cluster in clusters(documents):
        for group in cluster.groups:
            node, limits = Node.of(group), dig(group.ray.spec, "resources.limits", {})
            if "cpu" in limits and node.cpus > quantity(limits["cpu"]):
                wrong = f"is {node.cpus:g}, and the pod has {limits['cpu']}"
                yield group.finding("rayStartParams.num-cpus", wrong, "lower it")
            if node.gpus != group.gpus:
                wrong = f"is {node.gpus:g}, and the pod has {group.gpus}"
                yield group.finding("rayStartParams.num-gpus", wrong, "make them equal")


@lint("fit", "where CPU nodes scale, GPU nodes offer Ray no CPUs: downloads would hold their GPUs")
def gpu_nodes_are_for_gpu_work(documents: list[Document]) -> Iterator[Finding]:
    for cluster in clusters(documents):
        nodes = [Node.of(group) for group in cluster.workers]
        if cluster.autoscaled and any(node.cpus and not node.gpus for node in nodes):
            for node in nodes:
                if node.gpus and node.cpus:
                    wrong = f"is {node.cpus:g} on nodes with GPUs"
                    do = 'make it "0", and the cpus of GPU stages too'
                    yield node.group.finding("rayStartParams.num-cpus", wrong, do)


# --- curation and evaluation ------------------------------------------------------------


@lint("fit", "a worker of each stage fits a node, and their numbers do not keep nodes idle")
def stages_fit_the_groups(documents: list[Document]) -> Iterator[Finding]:
    for cluster, nodes, cfg in having(documents, CurateConfig | EvaluateConfig):
        stages = _stages(cfg)
        for name, worker in stages.items():
            if not any(node.takes(worker) and node.most for node in nodes):
                wrong = f"no node holds one of {name}: {worker.cpus:g} CPUs, {worker.gpus:g} GPUs"
                yield cluster.finding("workerGroupSpecs", wrong, "add a group, or lower them")
        for node in nodes:
            by = "gpus" if node.gpus else "cpus"
            used = sum(
                getattr(worker, by) * worker.max_workers
                for worker in stages.values()
                if bool(worker.gpus) == bool(node.gpus)
            )
            least = 0 if node.gpus else 1  # the filter's tasks
            if getattr(node, by) * node.most > max(used, least):
                wrong = f"{node.most} nodes have more {by} than all stages take, {used:g}"
                yield node.group.finding("maxReplicas", wrong, "lower it, or raise max_workers")


def _stages(cfg: CurateConfig | EvaluateConfig) -> dict[str, StageResources]:
    """What runs on workers, by its setting."""
    if isinstance(cfg, EvaluateConfig):
        on_workers = cfg.drawing.max_workers > 0  # else all of it is done by the driver
        return {"drawing": cfg.drawing, "scoring": cfg.scoring} if on_workers else {}
    stages = {
        "download_workers": cfg.download_workers,
        "caption_workers": cfg.caption_workers,
        "features_workers": cfg.features_workers,
    }
    return stages | ({"scores_workers": cfg.scores_workers} if cfg.scores.enabled else {})


@lint("fit", "an evaluation's bench is one that its pods can read: in an object store, or mini")
def bench_is_in_a_store(documents: list[Document]) -> Iterator[Finding]:
    for cluster, _, cfg in having(documents, EvaluateConfig):
        if not re.match("mini$|s3://|gs://", cfg.bench):
            path = f"{cluster.path.rpartition('.')[0]}.entrypoint"
            wrong = f"--bench is {cfg.bench}: pods have no folder of yours"
            yield Finding(subject(cluster.document), path, wrong, "name one in an object store")


@lint("fit", "a node with CPUs has the memory for as many of the filter's tasks and downloads")
def tasks_fit_the_memory(documents: list[Document]) -> Iterator[Finding]:
    for cluster, nodes, cfg in having(documents, CurateConfig):
        largest = JOIN_BYTES if cfg.filter.score == "table" else TASK_BYTES
        working = [node for node in nodes if node.cpus]
        if not any(node.memory >= largest for node in working):
            wrong = (
                f"no node with CPUs has the {largest / 2**30:.0f} GiB of the filter's largest task"
            )
            yield cluster.finding("workerGroupSpecs", wrong, "give one group more memory")
        for node in working:
            needed = node.cpus * TASK_BYTES + node.object_store
            if needed > node.memory:
                wrong = (
                    f"{node.cpus:g} tasks and the object store may take {needed / 2**30:.0f} GiB, "
                    f"the pod has {node.memory / 2**30:.0f}"
                )
                do = "raise memory, or lower num-cpus"
                yield node.group.finding("template.spec.containers[0].resources", wrong, do)


# --- the service ------------------------------------------------------------------------


@lint("fit", "a service's config is Ray Serve's, its application ours, with settings that it knows")
def service_is_understood(documents: list[Document]) -> Iterator[Finding]:
    for cluster in clusters(documents):
        if cluster.service is None:
            continue
        path, do = "spec.serveConfigV2", "mend it"
        told = config(cluster)
        if unknown := sorted(set(told) - _SERVE_CONFIG):
            yield Finding(subject(cluster.document), path, f"unknown: {', '.join(unknown)}", do)
        found = applications(cluster)
        if [each.get("import_path") for each in found] != [IMPORT_PATH]:
            wrong = f"applications are not one, of import_path {IMPORT_PATH}"
            yield Finding(subject(cluster.document), path, wrong, do)
        for group in cluster.groups if found else ():  # it is built on any node
            try:
                _served(documents, group)
            except UserError as error:
                yield Finding(subject(cluster.document), path, str(error), do)
                break


def _served(documents: list[Document], group: Group) -> ServeConfig:
    args = applications(group.cluster)[0].get("args") or {}
    return settings(args, environment(documents, group.pod, group.ray))


@lint(
    "fit", "each replica of a service has a GPU of its group, and a node its CPUs and its front's"
)
def service_fills_its_group(documents: list[Document]) -> Iterator[Finding]:
    for cluster in clusters(documents):
        if cluster.service is None or not applications(cluster):
            continue
        for group in cluster.workers:
            try:
                cfg, node = _served(documents, group), Node.of(group)
            except UserError:
                continue  # told by service_is_understood
            sizes = [group.spec.get(size) for size in ("minReplicas", "replicas", "maxReplicas")]
            by = "gpus" if cfg.device.startswith("cuda") else "cpus"
            there = int(node.gpus * node.most)
            if len(set(sizes)) > 1 or (by == "gpus" and there != cfg.replicas):
                wrong = f"{cfg.replicas} replicas, and {there} GPUs in the group at most"
                do = "make replicas, minReplicas, maxReplicas and args.replicas agree"
                yield group.finding("replicas", wrong, do)
            # as pipeline/serving/deployment.py asks for them
            if node.cpus < max(node.gpus, 1) + FRONT_CPUS:
                wrong = f"is {node.cpus:g}: no room for the front beside a replica"
                yield group.finding("rayStartParams.num-cpus", wrong, "raise it")
            told = environment(documents, group.pod, group.ray)
            drain = float(told.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S") or 30)
            if cfg.drain_s >= drain:
                wrong = f"drain_s is {cfg.drain_s:g}, and Ray leaves a node after {drain:g} s"
                yield Finding(subject(cluster.document), "spec.serveConfigV2", wrong, "lower it")


# --- training ---------------------------------------------------------------------------


@lint("fit", "training takes every GPU of its group, and asks for GPUs by name")
def training_fills_its_group(documents: list[Document]) -> Iterator[Finding]:
    for kinds in (TrainConfig, AllReduceConfig):
        for cluster, nodes, cfg in having(documents, kinds):
            there = int(sum(node.gpus * node.most for node in nodes))
            path = f"{cluster.path.rpartition('.')[0]}.entrypoint"
            if cfg.workers != there:
                asked = "those that are there" if cfg.workers is None else cfg.workers
                wrong = f"asks for {asked} workers, the groups have {there} GPUs"
                do = f"say --workers {there}, or change replicas"
                yield Finding(subject(cluster.document), path, wrong, do)
            if there and cfg.use_gpu is not True:
                wrong = "leaves use_gpu open: with nodes that come late it would run on CPUs"
                yield Finding(subject(cluster.document), path, wrong, "say --use_gpu true")


@lint("fit", "training workers divide the lanes, and lanes the batch")
def workers_divide_the_lanes(documents: list[Document]) -> Iterator[Finding]:
    for cluster, nodes, cfg in having(documents, TrainConfig):
        try:
            _planned(documents, nodes, cfg)
        except UserError as error:
            path = f"{cluster.path.rpartition('.')[0]}.entrypoint"
            do = "change --workers, --min_workers or --lanes"
            yield Finding(subject(cluster.document), path, str(error), do)


@lint("fit", "a training node has the memory for its lanes, and cores for its GPUs")
def training_fits_its_nodes(documents: list[Document]) -> Iterator[Finding]:
    for _, nodes, cfg in having(documents, TrainConfig):
        for node in nodes:
            path = "template.spec.containers[0].resources"
            try:
                held = max(stage.memory for stage in _planned(documents, nodes, cfg))
            except UserError:
                continue  # told by workers_divide_the_lanes
            needed = held + node.object_store
            if needed > node.memory:
                wrong = (
                    f"lanes and the object store may take {needed / 2**30:.0f} GiB of a node, the "
                    f"pod has {node.memory / 2**30:.0f}"
                )
                yield node.group.finding(path, wrong, "raise memory, or lower shuffle_rows")
            cores = quantity(dig(node.group.ray.spec, "resources.limits", {}).get("cpu", 0))
            if node.gpus and cores < CPUS_PER_GPU * node.gpus:
                wrong = f"{cores:g} cores for {node.gpus:g} GPUs"
                yield node.group.finding(path, wrong, f"give {CPUS_PER_GPU} a GPU at least")


@lint("fit", "a run ends before its deadline, which each retry has anew, and saves before it")
def checkpoints_come_in_time(documents: list[Document]) -> Iterator[Finding]:
    for cluster, nodes, cfg in having(documents, TrainConfig):
        try:
            stages = _planned(documents, nodes, cfg)
        except UserError:
            continue
        job, batch = cluster.job or {}, cfg.global_batch
        path = cluster.path.rpartition(".")[0]
        deadline = float(job.get("activeDeadlineSeconds", 0))
        whole = sum(stage.hours for stage in stages) * 3600
        if deadline and whole > deadline:
            wrong = f"the steps alone take {whole:,.0f} s by jobs/plan.py"
            do = f"raise it above {deadline:,.0f}"
            yield Finding(subject(cluster.document), f"{path}.activeDeadlineSeconds", wrong, do)
        slowest = min((stage.rate for stage in stages), default=1.0)
        between = cfg.checkpoint_steps * batch / slowest
        start = float(job.get("preRunningDeadlineSeconds", 0))
        if deadline and start + 2 * between > deadline:
            wrong = f"{between:,.0f} s between checkpoints: a retry may end before its first"
            do = "raise it, or lower checkpoint_steps"
            yield Finding(subject(cluster.document), f"{path}.activeDeadlineSeconds", wrong, do)
        for node in nodes:
            told = environment(documents, node.group.pod, node.group.ray)
            drain = float(told.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S") or 30)
            leaving = cfg.log_steps * batch / slowest
            if leaving > drain / 2:
                wrong = f"workers may train {leaving:.0f} s after the notice, of {drain:.0f}"
                yield node.group.finding("template.spec", wrong, "lower log_steps")


def _planned(
    documents: list[Document], nodes: list[Node], cfg: TrainConfig
) -> tuple[StagePlan, ...]:
    """The run by jobs/plan.py, in its smallest world: there a node's lanes are the most."""
    each = int(max((node.gpus for node in nodes), default=0)) or 1
    workers = cfg.min_workers or cfg.workers or each
    shards = next((made for _, _, made in having(documents, CurateConfig)), CurateConfig())
    features = shards.features
    if cfg.workers:  # refused where they do not divide
        PlanConfig(gpus=cfg.workers, lanes=cfg.lanes, global_batch=cfg.global_batch)
    made = replace(
        PlanConfig(),
        gpus=workers,
        gpus_per_node=each,
        codec=features.codec,
        scales=features.scales,
        flip=features.flip,
        row_group_mib=features.row_group_mib,
        images=shards.filter.max_rows or PlanConfig.images,
        global_batch=cfg.global_batch,
        lanes=cfg.lanes,
        shuffle_rows=cfg.shuffle_rows,
        queries=cfg.queries,
        semantic_steps=cfg.semantic.steps,
        multi_scale_steps=cfg.multi_scale.steps,
    )
    return plan(made).stages
