"""What curation takes: the scan of the metadata, the download, captions, features, the seal."""

from __future__ import annotations

from pipeline.planning.costs import feature_gflop, stored_bytes
from pipeline.planning.inputs import COUNTED, SEAL, SHARDS, Inputs
from pipeline.planning.phases import (
    BITS,
    GIGA,
    HOUR,
    KILO,
    RANGE_BYTES,
    Phase,
    Resource,
    bandwidth,
    in_time,
    resource,
    unit_requests,
)
from pipeline.planning.quantities import Quantity, Sheet, ceil, known, largest, least

_MORE_GPUS = "--gpus"
_STORE = "--store_gbit"
_OUTCOME_FILES = 1  # beside the images of a unit: how every row of it ended
IMAGES = "pipeline/curation/images.py"


def curation(given: Inputs) -> list[Phase]:
    """The phases of curation, in order."""
    phases = [_scan(given)] if given.cfg.metadata_rows else []
    download = _download(given)
    phases += [download, _captions(given, download.sheet["units"])]
    if given.cfg.codec != "images":
        phases += [_features(given, download.sheet["units"]), _seal(given, download.sheet["units"])]
    return phases


def row_size(given: Inputs) -> Quantity:
    """Bytes of a shard's row."""
    cfg = given.cfg
    tensors = known(stored_bytes(cfg.codec, cfg.scales, cfg.flip), "B", SHARDS)
    return tensors + given["overhead_bytes"] if cfg.overhead_bytes else tensors


def image_size(given: Inputs) -> Quantity:
    """Bytes of an image as it is stored."""
    return given["stored_kb"] * KILO


def nodes(given: Inputs) -> Quantity:
    """GPU nodes."""
    return known(
        ceil(given["gpus"] / given["gpus_per_node"]).value, "nodes", given.source("gpus_per_node")
    )


def _scan(given: Inputs) -> Phase:
    sheet = Sheet("metadata scan")
    rows, size = given["metadata_rows"], given["metadata_row_bytes"]
    read = sheet.put("bytes read", rows * size, "B")
    sheet.put("work", rows / (given["scan_rows_per_core_s"] * HOUR), "core-hours")
    sheet.put("GETs", ceil(read / RANGE_BYTES), "requests")
    cores = given["download_cores"] * given["scan_rows_per_core_s"]
    found = [
        resource(sheet, "cores", cores, "rows", _cores(given), "--download_cores"),
        *_store(sheet, given, size, "rows"),
    ]
    in_time(sheet, rows, "rows", found, cores=given["download_cores"])
    return Phase(sheet, tuple(found), given.cfg.metadata_rows)


def _download(given: Inputs) -> Phase:
    sheet = Sheet("download")
    images, cores = given["images"], given["download_cores"]
    links = sheet.put("links", ceil(images / given["answering"]), "links")
    units = sheet.put("units", ceil(links / given["unit_rows"]), "units")
    asked = known(1, "request") + given["redirects"] + given["tries_again"]
    if given.cfg.robots_txt:
        asked = asked + given["hosts_per_link"]
    sheet.put("web requests", links * asked, "requests")
    sheet.put("names looked up", links * given["hosts_per_link"], "lookups")
    size = sheet.put("web bytes an image", given["fetched_kb"] * KILO, "B")
    sheet.put("bytes fetched", images * size, "B")
    stored = sheet.put("bytes written", images * image_size(given), "B")
    sheet.put("work", images / (given["downloads_per_core_s"] * HOUR), "core-hours")
    pace = sheet.put("download cores allow", cores * given["downloads_per_core_s"], "images/s")
    sheet.put("Gbit/s to feed", pace * size * BITS / GIGA, "Gbit/s")
    web = bandwidth(given["download_gbit"], size)
    found = [
        Resource("download cores", pace, _cores(given), "--download_cores"),
        resource(
            sheet, "web link", web, "images", f"{given.cfg.download_gbit:g} Gbit/s",
            "--download_gbit",
        ),
        *_store(sheet, given, image_size(given), "images"),
    ]  # fmt: skip
    read = known(given.cfg.unit_rows * given.cfg.metadata_row_bytes, "B")
    unit_requests(sheet, units, read, stored / units, also=1 + _OUTCOME_FILES)
    in_time(sheet, images, "images", found, cores=cores)
    return Phase(sheet, tuple(found), given.cfg.images)


def _captions(given: Inputs, units: Quantity) -> Phase:
    sheet = Sheet("captions")
    images, gpus = given["images"], given["gpus"]
    read = sheet.put("bytes read", images * image_size(given), "B")
    written = sheet.put("bytes written", images * given["caption_bytes"], "B")
    gpu = gpus * given["captions_per_s"]
    found = [
        resource(sheet, "GPUs", gpu, "images", _gpus(given), _MORE_GPUS),
        _decoding(sheet, given, known(1, "thread", IMAGES)),
        _network(sheet, given, image_size(given), "network"),
        *_store(sheet, given, image_size(given), "images"),
    ]
    sheet.put("Gbit/s to feed", sheet["GPUs allow"] * image_size(given) * BITS / GIGA, "Gbit/s")
    unit_requests(sheet, units, read / units, written / units)
    in_time(sheet, images, "images", found, gpus=gpus)
    return Phase(sheet, tuple(found), given.cfg.images)


def _features(given: Inputs, units: Quantity) -> Phase:
    sheet, cfg = Sheet("features"), given.cfg
    images, gpus = given["images"], given["gpus"]
    gflop = known(feature_gflop(cfg.codec, cfg.flip), "GFLOP", COUNTED)
    read = sheet.put("bytes read", images * image_size(given), "B")
    row = sheet.put("bytes a row", row_size(given), "B")
    written = sheet.put("bytes written", images * row, "B")
    gpu = gpus * given["encoder_tflops"] * KILO / gflop
    found = [
        resource(sheet, "GPUs", gpu, "images", _gpus(given), _MORE_GPUS),
        _decoding(sheet, given, given["decode_threads"]),
        _network(sheet, given, largest(row, image_size(given)), "network"),  # in and out at once
        *_store(sheet, given, row + image_size(given), "images"),
    ]
    sheet.put("Gbit/s to feed", sheet["GPUs allow"] * image_size(given) * BITS / GIGA, "Gbit/s")
    sheet.put("Gbit/s to write", sheet["GPUs allow"] * row * BITS / GIGA, "Gbit/s")
    unit_requests(sheet, units, read / units, written / units)
    if cfg.store_puts_s:
        puts = given["store_puts_s"] * images / sheet["PUTs"]
        found.append(
            resource(
                sheet, "PUTs a prefix", puts, "images", f"{cfg.store_puts_s:,.0f} a second",
                "a smaller codec, several roots", paces=False,
            )
        )  # fmt: skip
    in_time(sheet, images, "images", found, gpus=gpus)
    return Phase(sheet, tuple(found), cfg.images)


def _seal(given: Inputs, units: Quantity) -> Phase:
    """One driver reads every marker of three stages, and writes the manifest."""
    sheet = Sheet("seal")
    markers = sheet.put("GETs", units * known(3, "stages", SEAL), "requests")
    shard = given["images"] / units * row_size(given)
    groups = ceil(shard / (given["row_group_mib"] * known(2**20, "B/MiB")))
    line = known(196, "B", SEAL) + groups * known(4, "B", SEAL)
    manifest = sheet.put("bytes written", units * line, "B")
    sheet.put("PUTs", ceil(manifest / known(16 * 2**20, "B", SHARDS)), "requests")
    rate = known(500, "requests/s", SEAL)
    driver = resource(sheet, "driver", rate, "requests", "one process", "a larger --unit_rows")
    in_time(sheet, markers, "requests", [driver])
    return Phase(sheet, (driver,), round(markers.value))


# --- what they share ---


def _cores(given: Inputs) -> str:
    return f"{given.cfg.download_cores:,}"


def _gpus(given: Inputs) -> str:
    return f"{given.cfg.gpus:,} {given.cfg.gpu}"


def _store(sheet: Sheet, given: Inputs, row: Quantity, unit: str) -> list[Resource]:
    """The store, where it is limited; `row`: bytes that pass it a row."""
    if not given.cfg.store_gbit:
        return []
    rate, size = bandwidth(given["store_gbit"], row), f"{given.cfg.store_gbit:g} Gbit/s"
    return [resource(sheet, "store", rate, unit, size, _STORE)]


def _network(sheet: Sheet, given: Inputs, row: Quantity, name: str) -> Resource:
    rate = nodes(given) * bandwidth(given["network_gbit"], row)
    size = f"{given.cfg.network_gbit:g} Gbit/s a node"
    return resource(sheet, name, rate, "images", size, "--network_gbit")


def _decoding(sheet: Sheet, given: Inputs, threads: Quantity) -> Resource:
    """Threads of the GPUs' workers that decode, as far as the nodes have cores for them."""
    cores = least(given["gpus"] * threads, nodes(given) * given["node_cores"])
    rate = cores * given["decodes_per_core_s"]
    size = f"{cores.value:,.0f} threads"
    return resource(sheet, "decode CPU", rate, "images", size, "--decode_threads, --node_cores")
