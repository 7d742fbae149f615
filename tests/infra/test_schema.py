"""Real objects pass their schemas, broken copies do not: fields, types, enums, CEL rules."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any

import pytest

from infra.checks import schema
from infra.checks.render import OVERLAYS, Document, load
from tests.infra.broken.breakage import cluster, head, job, named, of_kind, ray, workers

Rendered = Callable[[str], list[Document]]


def findings(documents: list[Document]) -> list[str]:
    return [f"{found.path}: {found.wrong}" for found in schema.check(documents)]


def only(documents: list[Document]) -> str:
    (found,) = findings(documents)
    return found


@pytest.mark.parametrize("overlay", sorted(path.name for path in OVERLAYS.iterdir()))
def test_an_intact_overlay_has_no_findings(overlay: str, rendered: Rendered) -> None:
    assert findings(rendered(overlay)) == []


def test_an_unknown_field_of_a_custom_resource(rendered: Rendered) -> None:
    documents = rendered("prod")
    cluster(documents, "train")["rayversion"] = "2.60.0"
    assert "spec.rayClusterSpec: Additional properties are not allowed" in only(documents)


def test_an_unknown_field_deep_in_a_pod(rendered: Rendered) -> None:
    documents = rendered("prod")
    ray(workers(documents, "train"))["imagepullpolicy"] = "Always"
    assert only(documents).startswith(
        "spec.rayClusterSpec.workerGroupSpecs[0].template.spec.containers[0]: Additional"
    )


def test_a_wrong_type(rendered: Rendered) -> None:
    documents = rendered("prod")
    head(documents, "train")["rayStartParams"]["num-cpus"] = 0
    where = "spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus"
    assert only(documents) == f"{where}: 0 is not of type 'string'"


def test_an_amount_that_is_neither_integer_nor_string(rendered: Rendered) -> None:
    documents = rendered("prod")
    ray(head(documents, "train"))["resources"]["limits"]["cpu"] = 0.5
    assert only(documents).endswith("resources.limits.cpu: 0.5 is not of type 'integer', 'string'")


def test_a_value_outside_its_enum(rendered: Rendered) -> None:
    documents = rendered("prod")
    cluster(documents, "train")["authOptions"]["mode"] = "tokens"
    assert only(documents) == (
        "spec.rayClusterSpec.authOptions.mode: 'tokens' is not one of ['disabled', 'token']"
    )


def test_a_missing_field_without_a_default(rendered: Rendered) -> None:
    documents = rendered("prod")
    del workers(documents, "train")["groupName"]
    assert only(documents).endswith("'groupName' is a required property")


def test_a_missing_field_with_a_default_is_no_fault(rendered: Rendered) -> None:
    documents = rendered("prod")
    del workers(documents, "train")["minReplicas"]
    assert findings(documents) == []


def test_metadata_of_a_custom_resource(rendered: Rendered) -> None:
    documents = rendered("prod")
    metadata = named(documents, "RayJob", "train")["metadata"]
    metadata["labels"]["weeks"] = 4
    assert only(documents) == "metadata.labels.weeks: 4 is not of type 'string'"
    metadata["labels"]["weeks"], metadata["label"] = "4", {}
    assert "Additional properties are not allowed ('label'" in only(documents)


def test_an_unknown_version_or_kind(rendered: Rendered) -> None:
    documents = rendered("prod")
    named(documents, "RayJob", "train")["apiVersion"] = "ray.io/v1alpha1"
    assert only(documents).startswith("kind: no schema of ray.io/v1alpha1 RayJob")
    named(documents, "RayJob", "train").update(apiVersion="ray.io/v1", kind="Rayjob")
    assert only(documents).startswith("kind: no schema of ray.io/v1 Rayjob")


def test_an_object_that_does_not_say_what_it_is() -> None:
    assert only([{"metadata": {"name": "a"}}]) == "apiVersion, kind: not given"


def test_an_unknown_field_of_a_core_object(rendered: Rendered) -> None:
    documents = rendered("prod")
    of_kind(documents, "NetworkPolicy")[0]["spec"]["policyType"] = ["Ingress"]
    assert "('policyType' was unexpected)" in only(documents)


def test_a_wrong_type_in_a_core_object(rendered: Rendered) -> None:
    documents = rendered("prod")
    of_kind(documents, "ServiceAccount")[0]["automountServiceAccountToken"] = "false"
    assert only(documents).startswith("automountServiceAccountToken: 'false' is not of type")


def _rule(
    documents: list[Document], change: Callable[[list[Document]], None]
) -> tuple[str, set[str]]:
    change(documents)
    found = list(schema.check(documents))
    return found[0].wrong, {finding.lint for finding in found}


def _borrow(documents: list[Document]) -> None:
    queue = of_kind(documents, "ClusterQueue")[0]["spec"]
    queue["resourceGroups"][0]["flavors"][0]["resources"][0]["borrowingLimit"] = 1


def _drop_a_resource(documents: list[Document]) -> None:
    queue = of_kind(documents, "ClusterQueue")[0]["spec"]
    queue["resourceGroups"][0]["flavors"][0]["resources"].pop()


def _turn_the_levels(documents: list[Document]) -> None:
    of_kind(documents, "Topology")[0]["spec"]["levels"].reverse()


def _unlabel_a_flavor(documents: list[Document]) -> None:
    flavor = next(f for f in of_kind(documents, "ResourceFlavor") if "topologyName" in f["spec"])
    flavor["spec"]["nodeLabels"] = {}


def _empty_the_deletion_strategy(documents: list[Document]) -> None:
    job(documents, "train")["deletionStrategy"] = {}


def _manage_by_another(documents: list[Document]) -> None:
    job(documents, "train")["managedBy"] = "someone"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_borrow, "borrowingLimit must be nil when cohort is empty"),
        (_drop_a_resource, "flavors must have the same number of resources"),
        (_turn_the_levels, "label can only be used at the lowest level"),
        (_unlabel_a_flavor, "at least one nodeLabel is required when topology is set"),
        (_empty_the_deletion_strategy, "deletionStrategy requires either BOTH"),
        (_manage_by_another, "managedBy field value must be either"),
    ],
)
def test_cel_rules(change: Any, message: str, rendered: Rendered) -> None:
    wrong, kinds = _rule(rendered("prod"), change)
    assert message in wrong
    assert kinds == {"cel"}


def test_cel_sees_defaults() -> None:
    """whenCanBorrow and whenCanPreempt are not written: their defaults decide."""
    text = """
    apiVersion: kueue.x-k8s.io/v1beta2
    kind: ClusterQueue
    metadata: {name: a}
    spec: {flavorFungibility: {preference: BorrowingOverPreemption, whenCanPreempt: TryNextFlavor}}
    """
    assert "preference can only be set when" in only(load(text, "queue.yaml"))


def test_what_a_schema_leaves_open_stays_open() -> None:
    """Unknown fields under x-kubernetes-preserve-unknown-fields, null under nullable."""
    whole = schema.close(
        {
            "type": "object",
            "properties": {
                "free": {
                    "type": "object",
                    "properties": {"known": {"type": "string"}},
                    "x-kubernetes-preserve-unknown-fields": True,
                },
                "port": {"x-kubernetes-int-or-string": True},
                "none": {"type": "string", "nullable": True},
                "map": {
                    "type": "object",
                    "additionalProperties": {"type": "object", "properties": {}},
                },
            },
        }
    )
    parts = whole["properties"]
    assert whole["additionalProperties"] is False
    assert "additionalProperties" not in parts["free"]
    assert parts["port"]["type"] == ["integer", "string"]
    assert parts["none"]["type"] == ["string", "null"]
    assert parts["map"]["additionalProperties"]["additionalProperties"] is False


def test_every_vendored_schema_says_what_its_file_is_called() -> None:
    files = sorted(schema.FOLDER.glob("*.json.gz"))
    assert len(files) == 16
    for file in files:
        held = json.loads(gzip.decompress(file.read_bytes()))
        assert file.name == f"{held['group']}_{held['version']}_{held['kind']}.json.gz"


def test_every_rule_of_the_schemas_is_one_that_we_can_read() -> None:
    """Rules that compare with an older self are left out; all others compile."""
    rules = set()
    for file in schema.FOLDER.glob("*.json.gz"):
        text = json.loads(gzip.decompress(file.read_bytes()))
        rules |= set(_rules(text))
    assert len(rules) > 10
    for rule in rules:
        if "oldSelf" not in rule:
            schema._program(rule)


def _rules(part: Any) -> list[str]:
    if isinstance(part, list):
        return [rule for entry in part for rule in _rules(entry)]
    if not isinstance(part, dict):
        return []
    own = part.get("x-kubernetes-validations")
    mine = [entry["rule"] for entry in own] if isinstance(own, list) else []
    return mine + [rule for entry in part.values() for rule in _rules(entry)]
