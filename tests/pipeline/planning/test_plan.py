"""The plan of a run: the counted costs, every formula, what limits it, what it says of that."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from pipeline import storage_remote
from pipeline.config import PlanConfig, TrainConfig, parse
from pipeline.errors import UserError
from pipeline.planning import CLIP, PEAK_TFLOPS, TRAINABLES, VAE, peak_tflops, plan, step_gflop
from pipeline.planning.costs import ALIGNER, LAYOUTS, TEXT, row_bytes, stored_bytes
from pipeline.planning.inputs import ASSUMED, SET
from pipeline.planning.phases import PART_BYTES, RANGE_BYTES
from pipeline.planning.plan import Plan, warnings
from pipeline.planning.tables import layouts, margins, saturation, steps, verdict
from pipeline.planning.text import text
from tests.pipeline.planning.formulas import evaluate

ROOT = Path(__file__).parents[3]
PRICES = {
    "gpu_hour_price": 2.5, "core_hour_price": 0.04, "tb_month_price": 23.0, "put_price": 0.005,
    "get_price": 0.0004, "egress_gb_price": 0.05,
}  # fmt: skip


def made(**settings: Any) -> Plan:
    return plan(PlanConfig(**settings))


# --- every line ---

RUNS: dict[str, dict[str, Any]] = {
    "paper": {},
    "priced": PRICES,
    "int8": {"codec": "int8", "robots_txt": True, "overhead_bytes": 129.25},
    "pixels": {"codec": "pixels", "flip": True, "store_gbit": 20.0, "months": 2.5},
    "online": {"codec": "images", **PRICES, "checkpoint_steps": 333},
    "large": {
        "gpus": 512, "lanes": 512, "global_batch": 8192, "images": 1_000_000_000,
        "network_gbit": 33.3, "row_group_mib": 1.0,
    },
    "odd": {
        "gpus": 8, "gpus_per_node": 3, "answering": 0.6312345, "fetched_kb": 311.7,
        "stored_kb": 99.9, "unit_rows": 777, "peak_tflops": 100.5, "scales": 3, "queries": 4,
        "images": 123_457, "store_gets_s": 0.0, "store_puts_s": 0.0, "metadata_rows": 0,
    },
    "one stage": {"semantic_steps": 0, "put_price": 1.0},
    "no training": {"semantic_steps": 0, "multi_scale_steps": 0},
}  # fmt: skip


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS.keys())
def test_every_formula_evaluates_to_its_value_and_has_a_source(settings: dict[str, Any]) -> None:
    lines = list(made(**settings).lines())
    assert len(lines) > 60
    for line in lines:
        said = f"{line.phase}, {line.name}: {line.formula}"
        assert evaluate(line.formula) == pytest.approx(line.value, rel=2e-5), said
        assert line.source and line.roots, said
        assert math.isfinite(line.value) and line.value >= 0, said
        assert not any(root.startswith("line ") for root in line.roots), said
    names = {f"line {line.phase}: {line.name}" for line in lines}
    named = {source for line in lines for source in line.sources if source.startswith("line ")}
    assert named <= names, "a line refers to one that is not there"


def test_a_source_says_whether_you_set_it() -> None:
    of = {line.name: line for line in made(captions_per_s=50.0).phase("captions").lines}
    assert of["GPUs allow"].sources == ("the paper, section 4.1", SET)
    assert "assumption" in made().phase("captions").sheet["GPUs allow"].roots
    assert ASSUMED not in of["GPUs allow"].roots
    asked = {name: (value, source) for name, value, source in made(gpus=16).given.asked()}
    assert asked["gpus"] == ("16 GPUs", SET)
    assert asked["peak_tflops"] == ("989 TFLOP/s", "the maker's data sheet")
    assert asked["downloads_per_core_s"] == ("75 images/s", "measured, docs/curation.md")


# --- values ---


def test_bytes_are_those_of_the_format() -> None:
    """Token ids (308) on top of what the documentation of the codecs says."""
    said = {"float16": 3_223_552, "int8": 1_650_712, "pixels": 216_064}
    for codec, size in said.items():
        assert row_bytes(codec, 6, 6) == stored_bytes(codec, 6) == size + 308
    assert row_bytes("float16", 1, 6) == 591_872 + 308
    assert row_bytes("int8", 1, 6) == 65_536 + 257 * (1024 + 4) + 308
    assert row_bytes("pixels", 1, 6) == row_bytes("pixels", 6, 6)
    assert stored_bytes("float16", 6, flip=True) == 2 * 3_223_552 + 308


def test_a_card_is_known_by_whole_words() -> None:
    peaks = {
        "NVIDIA H800": 989, "NVIDIA H800 PCIe": 756, "NVIDIA H100 NVL": 835, "NVIDIA H20": 148,
        "NVIDIA GH200 480GB": 989, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A10G": 70,
        "NVIDIA L4": 121, "NVIDIA GeForce RTX 4090": 165, "NVIDIA L40": None,
        "NVIDIA RTX A1000": None,
        "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    }  # fmt: skip
    assert {name: peak_tflops(name) for name in peaks} == peaks
    assert set(get_args(get_type_hints(PlanConfig)["gpu"])) == set(PEAK_TFLOPS)


def test_operations_are_the_counted_ones() -> None:
    texts = 2 * TEXT
    assert step_gflop("float16", 1) == pytest.approx(1688 + ALIGNER + texts)
    assert step_gflop("float16", 6) == pytest.approx(1785 + ALIGNER + texts)
    assert step_gflop("pixels", 6) - step_gflop("float16", 6) == CLIP
    assert step_gflop("images", 6) - step_gflop("float16", 6) == pytest.approx(CLIP + VAE)
    assert step_gflop("int8", 6, queries=3) - step_gflop("int8", 6) == pytest.approx(2 * TEXT)
    # at 400 TFLOP/s the known 223 samples/s of a GPU, 129 with the encoders online
    of_step = step_gflop("float16", 6) - texts
    assert 400e3 / of_step == pytest.approx(223, abs=0.5)
    assert 400e3 / (of_step + VAE + CLIP + texts) == pytest.approx(129, abs=0.5)


def test_requests_are_of_the_sizes_that_storage_has() -> None:
    assert PART_BYTES.value == storage_remote.PART_BYTES
    assert RANGE_BYTES.value == storage_remote._RANGE_BYTES


def test_the_papers_run_on_its_own_cluster() -> None:
    """0.87 days at 400 TFLOP/s without the texts, 1.53 with every encoder online."""
    paper = made(peak_tflops=1000.0, utilisation=0.4)
    assert paper.value("days of training") == pytest.approx(0.87, rel=0.02)
    assert paper.layout("images").value("days of training") == pytest.approx(1.53, rel=0.01)
    assert paper.value("shards") == 10_000_000 * 3_223_860
    assert paper.phase("captions").gpu_hours == pytest.approx(28, abs=0.5)
    assert paper.phase("features").gpu_hours == pytest.approx(36, abs=0.5)
    assert warnings(paper) == []


@pytest.mark.parametrize(
    ("codec", "stage", "gbit"),
    [("float16", 2, 41), ("int8", 2, 21), ("float16", 1, 7.6), ("pixels", 2, 2.8)],
)
def test_gbit_at_200_images_a_second_on_eight_gpus(codec: str, stage: int, gbit: float) -> None:
    peak = 200 * step_gflop(codec, 6 if stage == 2 else 1) / 1e3
    run = made(codec=codec, peak_tflops=peak, utilisation=1.0).stages[stage - 1]
    assert run.value("samples/s a GPU") == pytest.approx(200)
    assert run.value("Gbit/s to feed") == pytest.approx(gbit, rel=0.02)


def test_training_by_hand() -> None:
    """A run of round numbers: 2 nodes, 100 steps of 16."""
    run = made(
        gpus=2, gpus_per_node=1, lanes=16, global_batch=16, semantic_steps=0, multi_scale_steps=100,
        images=800, peak_tflops=100.0, utilisation=0.5, checkpoint_steps=30, keep_checkpoints=2,
        gpu_hour_price=3.0, get_price=2.0,
    ).stages[0]  # fmt: skip
    rate = 2 * 100 * 0.5 * 1e3 / (1785 + 5.7 + 26.6)
    assert run.rate == pytest.approx(rate)
    assert run.hours == pytest.approx(1600 / rate / 3600)
    assert run.gpu_hours == pytest.approx(2 * run.hours)
    assert (run.value("samples"), run.value("epochs")) == (1600, 2)
    assert run.value("bytes an epoch") == 800 * 3_223_860
    assert run.value("bytes read") == 1600 * 3_223_860
    assert run.value("steps a second") == pytest.approx(rate / 16)
    assert run.value("gradient bytes into a node, a sample") == 2 * 4 * TRAINABLES / 2 / 16
    # 20 rows of a row group of 64 MiB, read in 8 ranges and two requests for the footer
    assert run.value("GETs") == 1600 / 20 * 10
    assert run.value("bytes of a checkpoint") == 12 * TRAINABLES
    assert run.value("bytes written") == 4 * 12 * TRAINABLES
    assert run.value("bytes of checkpoints that stay") == 2 * 12 * TRAINABLES
    assert run.value("PUTs") == 4 * ((7 + 2) + (13 + 2) + 2)
    assert run.memory == 800 * 3_223_860  # no more than there is
    costs = run.gpu_hours * 3 + 800 * 2 / 1000
    assert run.value("cost") == pytest.approx(costs)


def test_the_download_by_hand() -> None:
    web = made(robots_txt=True).phase("download")
    assert web.value("links") == math.ceil(10_000_000 / 0.67) == 14_925_374
    assert web.value("units") == math.ceil(14_925_374 / 2000) == 7463
    assert web.value("web requests") == pytest.approx(14_925_374 * 1.8)
    assert made().phase("download").value("web requests") == pytest.approx(14_925_374 * 1.3)
    assert web.value("names looked up") == 14_925_374 / 2
    assert (web.value("bytes fetched"), web.value("bytes written")) == (4e12, 1.2e12)
    assert web.value("work") == pytest.approx(37, abs=0.1)
    assert (web.limit, web.hours) == ("web link", pytest.approx(4e12 / 1.25e9 / 3600))
    # a unit is 161 MB of images: 10 parts, begun and ended; outcomes and their marker besides
    assert web.value("PUTs") == 7463 * (10 + 2 + 3)
    few = made(download_cores=8).phase("download")
    assert (few.limit, few.hours) == ("download cores", pytest.approx(37 / 8, rel=0.01))
    assert few.use(few.resource("web link")) == pytest.approx(600 / 3125)


def test_the_scan_and_the_seal() -> None:
    scan = made().phase("metadata scan")
    assert scan.value("bytes read") == 200e9
    assert scan.value("work") * 60 == pytest.approx(5.4, abs=0.1)
    # 10 M images in 5,000 shards of 100 row groups: 2.9 MB, as benchmarks/scale_units.py measured
    seal = made(answering=1.0).phase("seal")
    assert seal.value("bytes written") == pytest.approx(2.9e6, rel=0.05)
    assert seal.value("GETs") == 15_000
    names = [phase.name for phase in made(codec="images", metadata_rows=0).phases]
    assert names == ["download", "captions", "semantic", "multi_scale"]


def test_the_figures_of_docs_scaling() -> None:
    """GET/s and Gbit/s of the tables there."""
    large = {"gpus": 512, "lanes": 512, "global_batch": 8192}
    gets = {
        ("float16", 8): (460, 870), ("float16", 512): (29_500, 56_000), ("pixels", 512): (3500,),
    }  # fmt: skip
    for (codec, gpus), wanted in gets.items():
        run = made(codec=codec, **(large if gpus == 512 else {}))
        for stage, each in zip(run.stages, wanted, strict=False):
            asked = stage.value("GETs") / stage.hours / 3600
            assert asked == pytest.approx(each, rel=0.07), (codec, gpus, stage.name)
    assert made(**large).stages[1].value("Gbit/s to feed") == pytest.approx(2875, rel=0.01)
    assert made(**large).stages[0].value("Gbit/s of gradients a node") == pytest.approx(23, abs=0.5)
    assert [stage.memory / 2**30 for stage in made().stages] == pytest.approx([39, 211], abs=0.5)


# --- limits ---


def test_the_slowest_sets_the_pace() -> None:
    free = made().stages[1]
    assert free.limit == "GPUs"
    assert free.use(free.resource("network")) == pytest.approx(0.449, abs=0.001)
    starved = made(network_gbit=10.0).stages[1]
    assert starved.limit == "network"
    assert starved.rate == pytest.approx(10e9 / 8 / 3_223_860)
    assert starved.gpu_hours / free.gpu_hours == pytest.approx(free.rate / starved.rate)
    store = made(store_gbit=10.0).stages[1]
    assert (store.limit, store.rate) == ("store", starved.rate)
    # two nodes share the rows, and exchange half of what each has, twice
    two = made(network_gbit=10.0, gpus=16).stages[1]
    assert two.rate == pytest.approx(10e9 / 8 / (3_223_860 / 2 + 4 * TRAINABLES / 128))
    cores = made(node_cores=1, rows_gb_per_core_s=0.5).stages[1]
    assert (cores.limit, cores.rate) == ("node CPU", pytest.approx(0.5e9 / 3_223_860))
    # features take in an image and give a row, at once: the larger fills the network
    heavy = made(codec="pixels", stored_kb=5000.0, network_gbit=10.0).phase("features")
    assert (heavy.limit, heavy.rate) == ("network", pytest.approx(10e9 / 8 / 5e6))
    assert made(unit_rows=10**14).phase("download").value("units") == 1
    decoding = made(captions_per_s=400.0).phase("captions")
    assert (decoding.limit, decoding.rate) == ("decode CPU", 8 * 125)


@pytest.mark.parametrize("phase", range(7))
def test_no_phase_uses_more_than_there_is_of_what_sets_its_pace(phase: int) -> None:
    for settings in (RUNS["paper"], RUNS["large"], RUNS["pixels"]):
        run = made(**settings).phases[phase]
        uses = {each.name: run.use(each) for each in run.resources if each.paces}
        assert max(uses.values()) == pytest.approx(1.0)
        assert uses[run.limit] == pytest.approx(1.0)


def test_what_is_short_is_said_with_what_mends_it() -> None:
    def said(**settings: Any) -> str:
        return "\n".join(warnings(made(**settings)))

    assert said() == ""
    assert "multi_scale: the network (25 Gbit/s a node) keeps the GPUs at 56%" in said(
        network_gbit=25.0
    )
    assert "--codec int8 frees them" in said(network_gbit=25.0)
    assert "semantic: the store (5 Gbit/s) keeps" in said(store_gbit=5.0)
    assert "--codec pixels frees them" in said(store_gbit=5.0)
    assert "what helps: --store_gbit, or fewer --gpus" in said(store_gbit=1.0, codec="pixels")
    many = said(gpus=64, network_gbit=25.0)
    assert "what helps: a larger --global_batch, --network_gbit" in many
    assert "2 samples a GPU and step" in many
    assert "lanes hold up to 211 GiB on a node of 128; lower" in said(node_memory_gib=128.0)
    prefix = said(gpus=64, global_batch=1024)
    assert "multi_scale: GETs a prefix: 127% of 5,500 a second" in prefix
    assert "semantic: GETs" not in prefix
    web = made(download_gbit=1.0)  # 8.9 h for 7.9 h of GPU work
    assert web.value("days of curation") * 24 == pytest.approx(8.9, abs=0.05)
    assert "GPUs that are held while they wait for it cost 8 GPU hours more" in said(
        download_gbit=1.0
    )


@pytest.mark.parametrize(
    ("setting", "values", "line", "grows"),
    [
        ("gpus", (8, 16, 32), "days", False),
        ("utilisation", (0.2, 0.4, 0.6), "GPU-hours", False),
        ("images", (10**6, 10**7, 10**8), "bytes that stay", True),
        ("semantic_steps", (1, 10**5, 10**6), "GETs", True),
        ("answering", (0.5, 0.7, 0.9), "PUTs", False),
        ("stored_kb", (50.0, 100.0, 200.0), "bytes read", True),
        ("downloads_per_core_s", (5.0, 10.0, 20.0), "core-hours", False),
        ("get_price", (0.1, 0.2, 0.3), "cost", True),
        ("months", (1.0, 2.0, 3.0), "cost", True),
        ("unit_rows", (500, 1000, 4000), "LISTs", False),
    ],
)
def test_more_is_more(setting: str, values: tuple[float, ...], line: str, grows: bool) -> None:
    found = [made(**{**PRICES, setting: value}).value(line) for value in values]
    assert found == sorted(set(found), reverse=not grows)


# --- layouts and money ---


def test_layouts_side_by_side() -> None:
    run = made(network_gbit=25.0, gpu_hour_price=2.0, tb_month_price=10.0)
    rows = {row[0]: row for row in layouts(run).rows}
    assert tuple(rows) == LAYOUTS
    assert [rows[name][1] for name in LAYOUTS] == ["32.2 TB", "16.5 TB", "2.16 TB", "1.2 TB"]
    assert rows["float16"][-2] == "GPUs, network" and rows["int8"][-2] == "GPUs"
    # what CLIP costs in every step, and the VAE
    hours = {name: made(codec=name).stages[1].gpu_hours for name in LAYOUTS}
    assert hours["pixels"] / hours["float16"] == pytest.approx(1 + CLIP / 1817.3, rel=1e-3)
    assert hours["images"] / hours["int8"] == pytest.approx(1 + (CLIP + VAE) / 1817.3, rel=1e-3)
    assert run.layout("int8").value("days") < run.layout("float16").value("days")
    said = verdict(run)
    assert "Cheapest: pixels (" in said and "fastest: int8 (" in said and "smallest: pixels" in said
    assert verdict(made()).startswith("Fewest GPU hours: float16 and int8 (234 GPU hours)")
    tight = made(node_memory_gib=64.0)
    assert {row[0]: row[-1] for row in layouts(tight).rows}["float16"] == "memory"
    assert "float16" not in verdict(tight)
    assert verdict(made(node_memory_gib=0.5)).startswith("No layout fits")


def test_money_adds_up() -> None:
    run = made(**PRICES)
    kept = run.value("bytes that stay") / 1e12 * 23
    assert run.value("cost of storage") == pytest.approx(kept)
    parts = [
        run.value("GPU-hours") * 2.5, run.value("core-hours") * 0.04,
        (run.value("PUTs") + run.value("LISTs")) * 0.005 / 1000, run.value("GETs") * 4e-7,
        run.value("bytes read") / 1e9 * 0.05, kept,
    ]  # fmt: skip
    assert run.value("cost") == pytest.approx(sum(parts))
    assert not [line for line in made().lines() if "cost" in line.name]


def test_tables_are_narrow_and_say_what_saturates() -> None:
    for settings in RUNS.values():
        shown = text(made(**settings), ["a note " * 40])
        assert max(map(len, shown.splitlines())) <= 110
        assert "never" not in shown and "nan" not in shown and "inf" not in shown
    run = made()
    used = saturation(run)
    uses = {row[0]: dict(zip(used.head, row, strict=True)) for row in used.rows}
    assert uses["multi_scale"]["GPUs"] == "100%" and uses["multi_scale"]["network"] == "45%"
    assert uses["multi_scale"]["memory"] == "21%" and uses["download"]["web"] == "100%"
    limits = {row[0]: row[1:] for row in margins(run).rows}
    following = "network, 45% of 100 Gbit/s a node"
    assert limits["multi_scale"] == ["GPUs, 8 h800", following, "--gpus"]
    taken = {row[0]: row for row in steps(made(**PRICES)).rows}
    assert taken["multi_scale"][1:3] == ["12.8 M", "41.3 TB"] and steps(run).head[-1] == "wall"


# --- settings and the job ---


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gpus": 3}, "3 gpus must divide 64 lanes"),
        ({"utilisation": 0.0}, r"plan.utilisation is 0.0; it must lie in \(0, 1\]"),
        ({"answering": 1.2}, r"plan.answering is 1.2; it must lie in \(0, 1\]"),
        ({"download_cores": 0}, "plan.download_cores is 0; it must be at least 1"),
        ({"network_gbit": 0.0}, "plan.network_gbit is 0.0; it must be more than 0"),
        ({"images": 0}, "plan.images is 0; it must be at least 1"),
        ({"put_price": -1.0}, "plan.put_price is -1.0; it must be at least 0"),
        ({"fetched_kb": math.nan}, "plan.fetched_kb is nan; it must be a number"),
        ({"gpu_hour_price": math.inf}, "plan.gpu_hour_price is inf; it must be a number"),
        ({"images": 10**400}, "plan.images is too large; it must be a number from 10"),
        ({"unit_rows": 10**5000}, "plan.unit_rows is too large; it must be a number"),
        ({"answering": 1e-300}, "plan.answering is 1e-300; it must be a number from 10"),
        ({"scales": 1_000_000}, "plan.scales is 1000000; CLIP ViT-L/14 has 24 layers"),
        ({"out": "plan.txt"}, "plan.out is plan.txt; it must end in .md or .json"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        PlanConfig(**settings)


def test_the_preset_plans_what_it_trains() -> None:
    cfg, train = parse(PlanConfig, [], "sd15-h800"), parse(TrainConfig, [], "sd15-h800")
    assert (cfg.semantic_steps, cfg.multi_scale_steps) == (
        train.semantic.steps,
        train.multi_scale.steps,
    )
    assert (cfg.global_batch, cfg.lanes, cfg.shuffle_rows, cfg.gpus, cfg.queries) == (
        train.global_batch,
        train.lanes,
        train.shuffle_rows,
        train.workers,
        train.queries,
    )
    assert (cfg.checkpoint_steps, cfg.keep_checkpoints) == (
        train.checkpoint_steps,
        train.keep_checkpoints,
    )


def test_planning_needs_no_torch() -> None:
    code = "import sys, pipeline.planning.calibration as c, pipeline.planning.text as t\n"
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
