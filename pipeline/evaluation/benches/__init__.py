"""Benches: what methods are asked to draw, with what is known of the answers."""

from pipeline.evaluation.benches.bench import (
    Bench,
    BenchSubject,
    BoolMask,
    Outline,
    Reference,
    Request,
    Selection,
    SubjectName,
)
from pipeline.evaluation.benches.break_a_scene import BreakASceneBench
from pipeline.evaluation.benches.dreambench import DreamBench
from pipeline.evaluation.benches.export import export_requests
from pipeline.evaluation.benches.folder import Folder
from pipeline.evaluation.benches.folders import open_bench
from pipeline.evaluation.benches.mini import (
    MiniBench,
    MiniReference,
    MiniSubject,
    mini_bench,
    request,
)
from pipeline.evaluation.benches.multi_subject import MultiSubjectBench

__all__ = [
    "Bench",
    "BenchSubject",
    "BoolMask",
    "BreakASceneBench",
    "DreamBench",
    "Folder",
    "MiniBench",
    "MiniReference",
    "MiniSubject",
    "MultiSubjectBench",
    "Outline",
    "Reference",
    "Request",
    "Selection",
    "SubjectName",
    "export_requests",
    "mini_bench",
    "open_bench",
    "request",
]
