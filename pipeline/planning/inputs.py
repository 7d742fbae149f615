"""What a plan begins with: the settings as numbers that know their unit and their source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields

from pipeline.config import PlanConfig
from pipeline.planning.costs import PEAK_TFLOPS
from pipeline.planning.quantities import Quantity, known, measure

SET, ASSUMED = "set by you", "assumption"
PAPER, COUNTED = "the paper, section 4.1", "counted by benchmarks/train_gpu.py"
SHARDS, STORAGE = "pipeline/shards.py", "pipeline/storage_remote.py"
UNITS, CHECKPOINTS = "pipeline/units.py", "pipeline/training/checkpoint.py"
SEAL = "docs/scaling.md, measured by benchmarks/scale_units.py"
_CURATION, _LAION, _S3 = "measured, docs/curation.md", "LAION's publishers", "published for S3"
_PRESET, _MAKER = "the presets laion-sd15 and sd15-h800", "the maker's data sheet"

_SETTINGS: dict[str, tuple[str, str]] = {
    "peak_tflops": ("TFLOP/s", _MAKER), "gpus": ("GPUs", PAPER), "gpus_per_node": ("GPUs", ASSUMED),
    "network_gbit": ("Gbit/s", ASSUMED), "node_memory_gib": ("GiB", ASSUMED),
    "node_cores": ("cores", ASSUMED), "download_cores": ("cores", ASSUMED),
    "download_gbit": ("Gbit/s", ASSUMED), "store_gbit": ("Gbit/s", ASSUMED),
    "store_gets_s": ("requests/s", _S3), "store_puts_s": ("requests/s", _S3),
    "images": ("images", PAPER), "metadata_rows": ("rows", _LAION), "scales": ("scales", PAPER),
    "unit_rows": ("links", _PRESET), "row_group_mib": ("MiB", _PRESET),
    "global_batch": ("samples", PAPER), "semantic_steps": ("steps", PAPER),
    "multi_scale_steps": ("steps", PAPER), "queries": ("subjects", _PRESET),
    "lanes": ("lanes", _PRESET), "shuffle_rows": ("rows", _PRESET),
    "checkpoint_steps": ("steps", _PRESET), "keep_checkpoints": ("checkpoints", _PRESET),
    "utilisation": ("", ASSUMED), "answering": ("", ASSUMED), "redirects": ("", ASSUMED),
    "tries_again": ("", ASSUMED), "hosts_per_link": ("", ASSUMED), "fetched_kb": ("kB", ASSUMED),
    "stored_kb": ("kB", ASSUMED), "metadata_row_bytes": ("B", _CURATION),
    "scan_rows_per_core_s": ("rows/s", _CURATION), "downloads_per_core_s": ("images/s", _CURATION),
    "captions_per_s": ("images/s", ASSUMED), "caption_bytes": ("B", ASSUMED),
    "encoder_tflops": ("TFLOP/s", ASSUMED), "decodes_per_core_s": ("images/s", ASSUMED),
    "decode_threads": ("threads", _PRESET), "rows_gb_per_core_s": ("GB/s", ASSUMED),
    "overhead_bytes": ("B", SHARDS), "gpu_hour_price": ("", SET), "core_hour_price": ("", SET),
    "tb_month_price": ("", SET), "months": ("months", ASSUMED), "put_price": ("", SET),
    "get_price": ("", SET), "egress_gb_price": ("", SET),
}  # fmt: skip
_DEFAULTS = {each.name: each.default for each in fields(PlanConfig)}


class Inputs:
    """The settings by name, each as a `Quantity`.

    Args:
        cfg: the settings.
        measured: name -> where a setting's value was measured, for those that were.
    """

    def __init__(self, cfg: PlanConfig, measured: Mapping[str, str] | None = None) -> None:
        self.cfg, self.measured = cfg, dict(measured or {})
        self._asked: dict[str, Quantity] = {}

    def __getitem__(self, name: str) -> Quantity:
        if name not in self._asked:
            value, (unit, _) = getattr(self.cfg, name), _SETTINGS[name]
            if name == "peak_tflops" and value is None:
                value = PEAK_TFLOPS[self.cfg.gpu]
            self._asked[name] = known(value, unit, self.source(name))
        return self._asked[name]

    def source(self, name: str) -> str:
        """Where a setting's value is from."""
        if name in self.measured:
            return self.measured[name]
        return _SETTINGS[name][1] if getattr(self.cfg, name) == _DEFAULTS[name] else SET

    def asked(self) -> Iterator[tuple[str, str, str]]:
        """(name, value with its unit, source) of every setting that something was reckoned from."""
        for name, quantity in self._asked.items():
            unit = _SETTINGS[name][0]
            yield name, measure(quantity.value, unit), self.source(name)
