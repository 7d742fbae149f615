"""What the manifests promise beside the lints: one fact in one place, and patches that reach it."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import celpy
import pytest
import yaml

from infra.checks.objects import clusters, dig, groups, pods
from infra.checks.render import INFRA, OVERLAYS, Document, render, sources

Rendered = Callable[[str], list[Document]]
POD = yaml.safe_load((INFRA / "jobs" / "pod.yaml").read_text())


@pytest.fixture
def overlay(tmp_path: Path, rendered: Rendered) -> Callable[[str], list[Document]]:
    """Builds a kustomization that stands beside the repository's overlays, in a copy of infra/."""
    copied = tmp_path / "infra"
    shutil.copytree(INFRA, copied, ignore=shutil.ignore_patterns("checks", "docker"))

    def build(kustomization: str) -> list[Document]:
        folder = copied / "overlays" / "mine"
        folder.mkdir()
        (folder / "kustomization.yaml").write_text(kustomization)
        return render(folder)

    return build


def job(documents: list[Document], name: str) -> dict[str, Any]:
    (found,) = (d for d in documents if d["kind"] == "RayJob" and d["metadata"]["name"] == name)
    return found


@pytest.mark.parametrize("name", ["ci", "dev", "prod"])
def test_every_ray_pod_has_what_pod_yaml_says(name: str, rendered: Rendered) -> None:
    template = POD["template"]["spec"]
    ours = template["containers"][0]
    documents = rendered(name)
    for cluster in clusters(documents):
        assert cluster.spec["rayVersion"] == POD["metadata"]["annotations"]["ssr/ray-version"]
    for group in groups(documents):
        spec, ray = group.pod.spec, group.ray.spec
        assert template["securityContext"] == spec["securityContext"]
        assert all(volume in spec["volumes"] for volume in template["volumes"])
        assert all(mount in ray["volumeMounts"] for mount in ours["volumeMounts"])
        assert {entry["name"] for entry in ours["env"]} <= set(group.ray.env)
        assert ray["envFrom"][0]["configMapRef"]["name"].startswith("ssr-site-")  # with its hash
        assert ("affinity" in spec) == (not group.is_head)


@pytest.mark.parametrize("name", ["ci", "prod"])
def test_the_smoke_test_runs_on_the_cluster_that_train_would_have(
    name: str, rendered: Rendered
) -> None:
    train, smoke = (job(rendered(name), which)["spec"] for which in ("train", "nccl-smoke"))
    assert smoke["rayClusterSpec"] == train["rayClusterSpec"]
    assert smoke["submitterPodTemplate"] == train["submitterPodTemplate"]


def test_a_prefix_reaches_every_name(overlay: Callable[[str], list[Document]]) -> None:
    documents = overlay("namePrefix: team-\nresources: [../ci]\n")
    made = {document["metadata"]["name"].removeprefix("team-") for document in documents}
    assert {"ssr-curate", "train", "rdma", "ssr-models", "h800"} <= made
    left = [
        (where, text)
        for document in documents
        for where, text in named(document)
        if not text.startswith("team-")
    ]
    assert left == []


def named(document: Document) -> Iterator[tuple[str, str]]:
    """(where, name) of what a document names of ours."""
    keys = {
        "serviceAccountName", "claimName", "clusterQueue", "topologyName",
        "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class",
    }  # fmt: skip

    def walk(value: Any, where: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict):
            for key, part in value.items():
                if key in keys:
                    yield f"{where}.{key}", part
                elif key == "configMapRef":
                    yield f"{where}.{key}", part["name"]
                elif key == "flavors":
                    yield from ((f"{where}.flavors", flavor["name"]) for flavor in part)
                else:
                    yield from walk(part, f"{where}.{key}")
        elif isinstance(value, list):
            for part in value:
                yield from walk(part, where)

    return walk(document, f"{document['kind']}/{document['metadata']['name']}")


def test_a_patch_of_one_group_leaves_the_others(
    overlay: Callable[[str], list[Document]], rendered: Rendered
) -> None:
    patch = """
resources: [../prod]
patches:
  - patch: |
      apiVersion: ray.io/v1
      kind: RayJob
      metadata: {name: curate, namespace: ssr}
      spec: {rayClusterSpec: {workerGroupSpecs: [{groupName: gpu-caption, maxReplicas: 3}]}}
"""

    def by_name(documents: list[Document]) -> dict[str, dict[str, Any]]:
        specs = job(documents, "curate")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        return {spec["groupName"]: spec for spec in specs}

    expected = by_name(rendered("prod"))
    expected["gpu-caption"]["maxReplicas"] = 3
    assert by_name(overlay(patch)) == expected


@pytest.mark.parametrize("component", sorted(p.name for p in (INFRA / "components").iterdir()))
def test_each_component_goes_with_the_jobs_alone(
    component: str, overlay: Callable[[str], list[Document]]
) -> None:
    before = {"log-shipping-s3": "../../components/log-shipping, "}.get(component, "")
    documents = overlay(
        "resources: [../../base, ../../queues, ../../jobs]\n"
        f"components: [{before}../../components/{component}]\n"
    )
    plain = {"ssr-train", "curate", "train"}
    assert plain <= {document["metadata"]["name"] for document in documents}


def test_nothing_is_open_before_a_site_says_so(overlay: Callable[[str], list[Document]]) -> None:
    documents = overlay("resources: [../../base]\n")
    blocks = {
        policy["metadata"]["name"]: [
            peer["ipBlock"]["cidr"]
            for rule in policy["spec"].get("egress", [])
            for peer in rule.get("to", [])
            if "ipBlock" in peer
        ]
        for policy in documents
        if policy["kind"] == "NetworkPolicy"
    }
    assert blocks["egress-object-store"] == ["192.0.2.0/24"]  # nobody's (RFC 5737)
    assert blocks["egress-api-server"] == ["192.0.2.1/32"]


@pytest.mark.parametrize("name", ["dev", "prod"])
def test_an_example_site_says_all_that_base_leaves_open(name: str, rendered: Rendered) -> None:
    text = yaml.safe_dump_all(rendered(name))
    assert "192.0.2." not in text
    assert "image: ssr-" not in text


def refusals(
    documents: list[Document],
    policy: str,
    new: Document,
    old: Document | None = None,
    user: str = "system:serviceaccount:kuberay-system:kuberay-operator",
) -> list[str]:
    """What the admission policy says against an object that is made, or changed from `old`."""
    (spec,) = (
        d["spec"]
        for d in documents
        if d["kind"] == "ValidatingAdmissionPolicy" and d["metadata"]["name"] == policy
    )
    known: dict[str, Any] = {
        "object": celpy.json_to_cel(new),
        "oldObject": celpy.json_to_cel(old),
        "request": celpy.json_to_cel(
            {
                "operation": "UPDATE" if old else "CREATE",
                "namespace": "ssr",
                "userInfo": {"username": user},
            }
        ),
        "variables": celpy.json_to_cel({}),
    }
    environment = celpy.Environment()

    def evaluate(expression: str) -> Any:
        return environment.program(environment.compile(expression)).evaluate(known)

    for variable in spec.get("variables", ()):
        name = celpy.celtypes.StringType(variable["name"])
        known["variables"][name] = evaluate(variable["expression"])
    if not all(evaluate(condition["expression"]) for condition in spec.get("matchConditions", ())):
        return []
    return [rule["message"] for rule in spec["validations"] if not evaluate(rule["expression"])]


def made(documents: list[Document]) -> list[Document]:
    """The pods that the templates become."""
    return [
        {"metadata": {"labels": pod.labels}, "spec": copy.deepcopy(pod.spec)}
        for pod in pods(documents)
    ]


@pytest.mark.parametrize("name", ["ci", "dev", "prod"])
def test_admission_lets_our_pods_in(name: str, rendered: Rendered) -> None:
    documents = rendered(name)
    found = made(documents)
    assert len(found) >= 4
    assert [refusals(documents, "ssr-pods", pod) for pod in found] == [[]] * len(found)
    assert [refusals(documents, "ssr-pods", pod, pod) for pod in found] == [[]] * len(found)


def test_admission_holds_in_the_namespaces_of_ours(rendered: Rendered) -> None:
    for name, namespace in (("ci", "ssr"), ("dev", "ssr-dev"), ("prod", "ssr")):
        documents = rendered(name)
        (ours,) = (d for d in documents if d["kind"] == "Namespace")
        assert ours["metadata"]["name"] == namespace
        bindings = [d for d in documents if d["kind"] == "ValidatingAdmissionPolicyBinding"]
        assert {dig(d, "spec.policyName") for d in bindings} == {"ssr-pods", "ssr-scaling"}
        for binding in bindings:
            assert dig(binding, "spec.validationActions") == ["Deny"]
            wanted = dig(binding, "spec.matchResources.namespaceSelector.matchLabels")
            assert wanted.items() <= ours["metadata"]["labels"].items()


def the_pod(documents: list[Document], account: str, node: str) -> Document:
    return next(
        pod
        for pod in made(documents)
        if pod["spec"]["serviceAccountName"] == account
        and pod["metadata"]["labels"].get("ray.io/node-type") == node
    )


def spec(**fields: Any) -> Callable[[Document], None]:
    return lambda pod: pod["spec"].update(fields)


def guard(**fields: Any) -> Callable[[Document], None]:
    return lambda pod: pod["spec"]["containers"][0]["securityContext"].update(fields)


def label(name: str, value: str) -> Callable[[Document], None]:
    return lambda pod: pod["metadata"]["labels"].update({name: value})


def init_container(pod: Document) -> None:
    pod["spec"]["initContainers"] = [{"name": "in", "securityContext": {"privileged": True}}]


@pytest.mark.parametrize(
    ("account", "change", "said"),
    [
        ("ssr-curate", spec(hostPID=True), "hostPID"),
        ("ssr-curate", spec(hostIPC=True), "hostPID and hostIPC"),
        ("ssr-curate", spec(volumes=[{"name": "n", "hostPath": {"path": "/"}}]), "hostPath"),
        ("ssr-train", spec(volumes=[{"name": "n", "hostPath": {"path": "/"}}]), "hostPath"),
        ("ssr-train", guard(privileged=True), "privileged"),
        ("ssr-curate", guard(allowPrivilegeEscalation=True), "privileged"),
        ("ssr-curate", init_container, "privileged"),
        ("ssr-curate", spec(hostNetwork=True), "hostNetwork"),
        ("ssr-curate", guard(capabilities={"add": ["IPC_LOCK"]}), "IPC_LOCK"),
        ("ssr-train", guard(capabilities={"add": ["SYS_ADMIN"]}), "IPC_LOCK"),
        ("ssr-train", label("ray.io/group", "other"), "IPC_LOCK"),
        ("ssr-train", label("ssr/role", "curate"), "ssr/role train"),
        ("ssr-curate", spec(serviceAccountName="ssr-train"), "ssr/role train"),
    ],
)
def test_admission_refuses_pods_that_reach_further(
    account: str, change: Callable[[Document], None], said: str, rendered: Rendered
) -> None:
    documents = rendered("prod")
    pod = the_pod(documents, account, "worker")
    change(pod)
    refused = refusals(documents, "ssr-pods", pod)
    assert len(refused) == 1 and said in refused[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda pod: pod["spec"]["containers"][0].update(image="evil"), "keeps its images"),
        (label("ssr/role", "train"), "no other role"),
    ],
)
def test_admission_refuses_pods_that_become_others(
    change: Callable[[Document], None], said: str, rendered: Rendered
) -> None:
    documents = rendered("prod")
    pod = the_pod(documents, "ssr-curate", "worker")
    changed = copy.deepcopy(pod)
    change(changed)
    (refused,) = refusals(documents, "ssr-pods", changed, pod)
    assert said in refused


def test_an_autoscaler_only_scales(rendered: Rendered) -> None:
    documents = rendered("dev")
    (old,) = (d for d in documents if d["kind"] == "RayCluster")
    autoscaler = "system:serviceaccount:ssr:ssr-curate"

    def told(change: Callable[[Document], Any], user: str = autoscaler) -> list[str]:
        new = copy.deepcopy(old)
        change(new["spec"])
        return refusals(documents, "ssr-scaling", new, old, user)

    def as_ray_does(spec: Document) -> None:
        spec["workerGroupSpecs"][0].update(replicas=3, scaleStrategy={"workersToDelete": ["a"]})

    def other_pods(spec: Document) -> None:
        spec["workerGroupSpecs"][1]["template"]["spec"]["serviceAccountName"] = "ssr-train"

    assert told(as_ray_does) == []
    assert "no group's pods" in told(other_pods)[0]
    assert "no group's pods" in told(lambda spec: spec["workerGroupSpecs"].pop())[0]
    assert "no head" in told(lambda spec: spec["headGroupSpec"].update(serviceType="NodePort"))[0]
    assert "no token" in told(lambda spec: spec.update(authOptions={"mode": "disabled"}))[0]
    assert told(other_pods, "alice") == []  # people are whom roles let in
    assert refusals(documents, "ssr-scaling", old, user=autoscaler) != []


def test_models_are_fetched_at_a_revision_and_found_as_main(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rendered: Rendered
) -> None:
    asked = []
    pickled = ["config.json", "pytorch_model.bin", "flax_model.msgpack"]
    files = {"a/b": [*pickled, "model.safetensors"], "c/d": pickled}

    def snapshot_download(name: str, revision: str, allow_patterns: list[str], **_: Any) -> str:
        asked.append((name, revision))
        path = tmp_path / f"models--{name.replace('/', '--')}" / "snapshots" / "c0ffee"
        path.mkdir(parents=True, exist_ok=True)
        for file in files[name]:
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                (path / file).touch()
        return str(path)

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setenv("SSR_MODELS", "a/b@0123 c/d")
    (fetch,) = (d for d in rendered("prod") if d["kind"] == "Job")
    exec(fetch["spec"]["template"]["spec"]["containers"][0]["args"][0], {})
    assert asked == [("a/b", "0123"), ("c/d", "main"), ("c/d", "main")]
    got = {file.name for file in tmp_path.glob("models--a--b/snapshots/*/*")}
    assert got == {"config.json", "model.safetensors"}
    got = {file.name for file in tmp_path.glob("models--c--d/snapshots/*/*")}
    assert got == {"config.json", "pytorch_model.bin"}  # it has nothing else
    assert (tmp_path / "models--a--b" / "refs" / "main").read_text() == "c0ffee"


def test_what_is_the_clusters_names_no_namespace(rendered: Rendered) -> None:
    own = {
        "Namespace", "ClusterQueue", "ResourceFlavor", "Topology", "WorkloadPriorityClass",
        "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding",
    }  # fmt: skip
    for name, namespace in (("ci", "ssr"), ("dev", "ssr-dev"), ("prod", "ssr")):
        for document in rendered(name):
            expected = None if document["kind"] in own else namespace
            assert document["metadata"].get("namespace") == expected, document["metadata"]


def test_jobs_start_by_label_and_nothing_else_does(rendered: Rendered) -> None:
    for document in rendered("prod"):
        label = document["metadata"].get("labels", {}).get("ssr/job")
        runs = document["kind"] in ("RayJob", "RayCluster", "RayService", "Job")
        name = {"RayService": "serve"}.get(document["kind"], document["metadata"]["name"])
        assert label == (name if runs else None)


def test_files_are_short() -> None:
    long = {str(path): len(path.read_text().splitlines()) for path in sources()}
    assert {path: lines for path, lines in long.items() if lines > 160} == {}


def test_kubectl_renders_the_same(rendered: Rendered) -> None:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    folder = str(OVERLAYS / "prod")
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(yaml.safe_load_all(done.stdout)) == rendered("prod")
