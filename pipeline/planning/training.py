"""What training takes: its two stages, what they read, exchange, hold and save."""

from __future__ import annotations

from pipeline.planning.costs import TRAINABLES, row_bytes, runs, step_gflop, stored_bytes
from pipeline.planning.curation import image_size, nodes
from pipeline.planning.inputs import CHECKPOINTS, COUNTED, SHARDS, Inputs
from pipeline.planning.phases import (
    BITS,
    GIGA,
    KILO,
    MIB,
    RANGE_BYTES,
    Resource,
    StagePlan,
    bandwidth,
    file_puts,
    in_time,
    resource,
)
from pipeline.planning.quantities import Quantity, Sheet, ceil, floor, known, largest, least, total

_FLOAT32 = known(4, "B")
_GRADIENT = _FLOAT32 * known(TRAINABLES, "parameters", COUNTED)


def training(given: Inputs) -> tuple[StagePlan, ...]:
    """The stages that have steps, in order."""
    cfg = given.cfg
    stages = (
        ("semantic", 1, given["semantic_steps"]),
        ("multi_scale", cfg.scales, given["multi_scale_steps"]),
    )
    return tuple(
        _stage(given, name, scales, steps) for name, scales, steps in stages if steps.value
    )


def checkpoint_size() -> Quantity:
    """Bytes of a checkpoint: the trainables, and AdamW's two moments of each, float32."""
    return known(3, "tensors", CHECKPOINTS) * _GRADIENT


def _stage(given: Inputs, name: str, scales: int, steps: Quantity) -> StagePlan:
    sheet, cfg = Sheet(name), given.cfg
    samples = sheet.put("samples", steps * given["global_batch"], "samples")
    gflop = known(step_gflop(cfg.codec, scales, cfg.queries), "GFLOP", COUNTED)
    reached = given["gpus"] * given["peak_tflops"] * given["utilisation"] * KILO
    gpus = resource(sheet, "GPUs", reached / gflop, "samples", f"{cfg.gpus:,} {cfg.gpu}", "--gpus")
    row = sheet.put("bytes a row", _row(given, scales), "B")
    _reads(sheet, given, samples, row)
    found = [gpus, _network(sheet, given, row), *_store(sheet, given, row)]
    found.append(_cores(sheet, given, row))
    sheet.put("Gbit/s to feed", gpus.rate * row * BITS / GIGA, "Gbit/s")
    sheet.put("Gbit/s a node", sheet["Gbit/s to feed"] / nodes(given), "Gbit/s")
    found += _requests(sheet, given, samples, scales)
    in_time(sheet, samples, "samples", found, gpus=given["gpus"])
    sheet.put("steps a second", sheet["pace"] / given["global_batch"], "steps/s")
    sheet.put("samples/s a GPU", sheet["pace"] / given["gpus"], "samples/s")
    _checkpoints(sheet, given, steps)
    held = sheet.put("memory of the lanes, a node", _held(given, row), "B")
    return StagePlan(sheet, tuple(found), round(samples.value), memory=held.value)


def _row(given: Inputs, scales: int) -> Quantity:
    if given.cfg.codec == "images":
        return image_size(given)
    return known(row_bytes(given.cfg.codec, scales, given.cfg.scales), "B", SHARDS)


def _reads(sheet: Sheet, given: Inputs, samples: Quantity, row: Quantity) -> None:
    sheet.put("epochs", samples / given["images"], "epochs")
    sheet.put("bytes an epoch", given["images"] * row, "B")
    sheet.put("bytes read", samples * row, "B")


def _network(sheet: Sheet, given: Inputs, row: Quantity) -> Resource:
    """A node's network brings its share of the rows, and the other nodes' gradients. A ring of
    nodes: each receives them twice over, less its own share.
    """
    count = nodes(given)
    coming = row / count
    if count.value > 1:
        others = known(count.value - 1, "nodes", given.source("gpus"))
        ring = known(2, "times") * _GRADIENT * others / (count * given["global_batch"])
        exchanged = sheet.put("gradient bytes into a node, a sample", ring, "B")
        sheet.put(
            "Gbit/s of gradients a node", sheet["GPUs allow"] * exchanged * BITS / GIGA, "Gbit/s"
        )
        coming = coming + exchanged
    mend = "--network_gbit"
    if count.value > 1 and exchanged.value > (row / count).value:
        mend = "a larger --global_batch, --network_gbit"
    return resource(
        sheet, "network", bandwidth(given["network_gbit"], coming), "samples",
        f"{given.cfg.network_gbit:g} Gbit/s a node", mend,
    )  # fmt: skip


def _store(sheet: Sheet, given: Inputs, row: Quantity) -> list[Resource]:
    if not given.cfg.store_gbit:
        return []
    rate, size = bandwidth(given["store_gbit"], row), f"{given.cfg.store_gbit:g} Gbit/s"
    return [resource(sheet, "store", rate, "samples", size, "--store_gbit, or fewer --gpus")]


def _cores(sheet: Sheet, given: Inputs, row: Quantity) -> Resource:
    """Cores of the nodes, which read and copy rows; of the layout "images", decode."""
    cores = nodes(given) * given["node_cores"]
    each = given["rows_gb_per_core_s"] * GIGA / row
    if given.cfg.codec == "images":
        each = given["decodes_per_core_s"]
    size = f"{given.cfg.node_cores:,} cores a node"
    return resource(sheet, "node CPU", cores * each, "samples", size, "--node_cores")


def _requests(sheet: Sheet, given: Inputs, samples: Quantity, scales: int) -> list[Resource]:
    """Ranges of a row group, and two requests for its shard's footer, which with many shards is
    seldom still there. Returns what a prefix answers.
    """
    cfg = given.cfg
    rows = sheet.put("rows of a row group", _group(given), "rows")
    stretches = [known(size, "B", SHARDS) for size in runs(cfg.codec, scales, cfg.scales)]
    parts = [ceil(rows * size / RANGE_BYTES) for size in stretches or [image_size(given)]]
    asked = total(parts) + known(2, "GETs", SHARDS)
    each = sheet.put("GETs a row group", asked, "requests")
    sheet.put("GETs", samples * each / rows, "requests")
    if not cfg.store_gets_s:
        return []
    rate = given["store_gets_s"] * rows / each
    return [
        resource(
            sheet, "GETs a prefix", rate, "samples", f"{cfg.store_gets_s:,.0f} a second",
            "a smaller codec, --row_group_mib, several roots", paces=False,
        )
    ]  # fmt: skip


def _checkpoints(sheet: Sheet, given: Inputs, steps: Quantity) -> None:
    size = sheet.put("bytes of a checkpoint", checkpoint_size(), "B")
    count = sheet.put("checkpoints", ceil(steps / given["checkpoint_steps"]), "checkpoints")
    sheet.put("bytes written", count * size, "B")
    sheet.put("bytes of checkpoints that stay", least(count, given["keep_checkpoints"]) * size, "B")
    small = known(2, "PUTs", CHECKPOINTS)  # generators, marker
    weights, moments = file_puts(_GRADIENT), file_puts(known(2, "moments", CHECKPOINTS) * _GRADIENT)
    sheet.put("PUTs", count * (weights + moments + small), "requests")
    sheet.put("LISTs", count * known(1, "LIST", CHECKPOINTS), "requests")


def _group(given: Inputs) -> Quantity:
    """Rows of a row group; one at least, however large it is."""
    cfg = given.cfg
    whole = known(stored_bytes(cfg.codec, cfg.scales, cfg.flip), "B", SHARDS)
    size = whole if whole.value else image_size(given)
    return largest(known(1, "row", SHARDS), floor(given["row_group_mib"] * MIB / size))


def _held(given: Inputs, row: Quantity) -> Quantity:
    """Two windows of each lane, with the row groups at both ends of each whole."""
    group = _group(given).value
    ends = known(2 * (group - 1), "rows", SHARDS)
    windows = known(2, "windows", "pipeline/training/lanes.py")
    rows = given["lanes"] / nodes(given) * windows * (given["shuffle_rows"] + ends)
    return least(rows, given["images"]) * row
