"""Rule 6: a pod that is told to go has the time to drain, and what must stay is not told."""

from __future__ import annotations

from collections.abc import Iterator

from infra.checks.findings import Finding, lint, subject
from infra.checks.objects import Group, dig, environment, groups, kind, namespace, selects
from infra.checks.render import Document
from pipeline.errors import STOP_S

_DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
_STOP = "RAY_JOB_STOP_WAIT_TIME_S"
_RAYS_DRAIN_S, _RAYS_STOP_S = 30.0, 3  # Ray 2.60's own
_KUBERNETES_GRACE_S = 30


@lint("rule 6", "terminationGracePeriodSeconds is above Ray's drain of 30 s")
def grace_exceeds_drain(documents: list[Document]) -> Iterator[Finding]:
    for group in groups(documents):
        drain = float(environment(documents, group.pod, group.ray).get(_DRAIN) or _RAYS_DRAIN_S)
        grace = group.pod.spec.get("terminationGracePeriodSeconds", _KUBERNETES_GRACE_S)
        if grace <= drain:
            wrong = f"{grace} s, and Ray drains for {drain:g} s: it is killed meanwhile"
            do = f"say more than {drain:g}"
            yield group.pod.finding("terminationGracePeriodSeconds", wrong, do)


@lint("rule 6", "between `ray job stop` and the kill a job has the time to end by itself")
def stopped_jobs_end_by_themselves(documents: list[Document]) -> Iterator[Finding]:
    for group in groups(documents):
        wait = int(environment(documents, group.pod, group.ray).get(_STOP) or _RAYS_STOP_S)
        if group.is_head and wait <= STOP_S:
            wrong = f"{_STOP} is {wait} s, and a job takes up to {STOP_S:g} s to end"
            yield group.finding("template", wrong, f"say more than {STOP_S:g}")


@lint("rule 6", "no `ray stop` before the end: it kills what SIGTERM would drain")
def no_ray_stop(documents: list[Document]) -> Iterator[Finding]:
    for group in groups(documents):
        for container in group.pod.containers:
            hook = dig(container.spec, "lifecycle.preStop.exec.command") or ()
            if "ray stop" in " ".join(hook):
                path = f"{container.path}.lifecycle.preStop"
                do = "leave the hook out"
                yield Finding(subject(group.cluster.document), path, "runs ray stop", do)


@lint("rule 6", "a PodDisruptionBudget of maxUnavailable 0 keeps heads")
def heads_are_kept(documents: list[Document]) -> Iterator[Finding]:
    yield from _kept(documents, [group for group in groups(documents) if group.is_head])


@lint("rule 6", "a PodDisruptionBudget of maxUnavailable 0 keeps training workers")
def training_workers_are_kept(documents: list[Document]) -> Iterator[Finding]:
    yield from _kept(documents, [group for group in groups(documents) if group.training])


def _kept(documents: list[Document], wanted: list[Group]) -> Iterator[Finding]:
    for group in wanted:
        if not any(
            dig(budget, "spec.maxUnavailable") in (0, "0", "0%")
            and namespace(budget) == group.pod.namespace
            and selects(dig(budget, "spec.selector"), group.pod.labels)
            for budget in kind(documents, "PodDisruptionBudget")
        ):
            wrong = "no PodDisruptionBudget with maxUnavailable 0 selects its pods"
            yield group.finding("template", wrong, "add one, or mend its selector")
