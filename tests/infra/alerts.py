"""Courses of runs, a sample a minute, and the alerts that are firing at moments of each."""

from __future__ import annotations

from typing import NamedTuple

RUN = 'namespace="ssr",ray_io_cluster="curate-x",run="s3://b/r"'
FIRST, SECOND = f'{RUN},WorkerId="01"', f'{RUN},WorkerId="02"'
IMAGES, CAPTIONS = f'{FIRST},stage="images"', f'{FIRST},stage="captions"'
PICTURES = f'{FIRST},stage="evaluation/mini/pictures/ssr-text"'
SEMANTIC = f'{FIRST},stage="semantic"'
NODE = 'namespace="ssr",ray_io_cluster="curate-x",pod="w-0"'
DNS, HTTP = f'{IMAGES},cause="dns"', f'{IMAGES},cause="http_404"'
SERVED = 'namespace="ssr",ray_io_cluster="ssr-x"'


class Scenario(NamedTuple):
    title: str
    series: dict[str, str]
    """Series -> values in promtool's notation."""
    firing: dict[str, list[str]]
    """Moment -> exactly the alerts that fire then."""


def asked(answers: dict[str, str]) -> dict[str, str]:
    """Series of the service's answers, by "ROUTE STATUS"; each of two pods tells the same."""
    return {
        f'ssr_requests_total{{{SERVED},pod="{pod}",route="{route}",status="{status}"}}': values
        for pod in "ab"
        for route, status in (name.split() for name in answers)
        for values in (answers[f"{route} {status}"],)
    }


SCENARIOS = (
    Scenario(
        "a stage that stalls, one that waits and one that is through",
        {
            f"ray_ssr_curate_stalled{{{IMAGES}}}": "0x60",
            f"ray_ssr_curate_stalled{{{CAPTIONS}}}": "0+60x40 0x20",
        },
        {"29m": [], "35m": ["SsrStageStalled"], "45m": []},
    ),
    Scenario(
        "an evaluation stalls, whose units take longer",
        {f"ray_ssr_evaluate_stalled{{{PICTURES}}}": "0+60x130 0x10"},
        {"60m": [], "119m": [], "125m": ["SsrStageStalled"], "135m": []},
    ),
    Scenario(
        "units are given up",
        {f"ray_ssr_curate_units_failed{{{IMAGES}}}": "0x5 1x5 stale"},
        {"4m": [], "8m": ["SsrUnitsFailed"], "20m": []},
    ),
    Scenario(
        "units of an evaluation are given up",
        {f"ray_ssr_evaluate_units_failed{{{PICTURES}}}": "0x5 1x5 stale"},
        {"4m": [], "8m": ["SsrUnitsFailed"], "20m": []},
    ),
    Scenario(
        "a cause rises; another, as frequent as ever, does not",
        {
            f"ray_ssr_curate_rows_in{{{IMAGES}}}": "0+1000x180",
            f"ray_ssr_curate_rows_failed{{{HTTP}}}": "0+300x180",
            f"ray_ssr_curate_rows_failed{{{DNS}}}": "0+20x120 2420+200x60",
        },
        {"110m": [], "150m": ["SsrFailureClassRising"]},
    ),
    Scenario(
        "a cause that is rare stays silent, and so does a driver that goes on with old totals",
        {
            f"ray_ssr_curate_rows_in{{{IMAGES}}}": "0+1000x120",
            f"ray_ssr_curate_rows_failed{{{DNS}}}": "0+1x60 60+20x60",
            f'ray_ssr_curate_rows_in{{{SECOND},stage="images"}}': "_x120 120000+1000x60",
            f'ray_ssr_curate_rows_failed{{{SECOND},stage="images",cause="dns"}}': (
                "_x120 1260+20x60"
            ),
        },
        {"100m": [], "130m": [], "170m": []},
    ),
    Scenario(
        "the web is gone",
        {
            f"ray_ssr_curate_rows_in{{{IMAGES}}}": "0+1000x180",
            f"ray_ssr_curate_rows_failed{{{DNS}}}": "0+450x90 40950+900x90",
            f"ray_ssr_curate_rows_failed{{{HTTP}}}": "0+10x180",
        },
        {"80m": [], "150m": ["SsrMostRowsFail"]},
    ),
    Scenario(
        "GPUs idle while captions are due, and when they are not",
        {
            f'ray_node_gpus_utilization{{{NODE},GpuIndex="0"}}': "80x30 2x90",
            f'ray_ssr_curate_units{{{FIRST},stage="captions"}}': "100x120",
            f'ray_ssr_curate_units_done{{{FIRST},stage="captions"}}': "50x90 100x30",
        },
        {"29m": [], "75m": ["SsrGpuIdle"], "100m": []},
    ),
    Scenario(
        "a driver is killed; its retry comes, and finishes",
        {
            f"ray_ssr_curate_started{{{FIRST}}}": "1000x20 stale",
            f"ray_ssr_curate_finished{{{FIRST}}}": "0x20 stale",
            f"ray_ssr_curate_started{{{SECOND}}}": "_x50 4000x30 stale",
            f"ray_ssr_curate_finished{{{SECOND}}}": "_x50 0x29 5800 stale",
        },
        {"20m": [], "25m": [], "40m": ["SsrCurateDriverGone"], "55m": [], "100m": [], "300m": []},
    ),
    Scenario(
        "a training is finished, begun again, and killed; hours later nobody is called",
        {
            f"ray_ssr_train_started{{{FIRST}}}": "1000x20 stale",
            f"ray_ssr_train_finished{{{FIRST}}}": "0x19 2200 stale",
            f"ray_ssr_train_started{{{SECOND}}}": "_x50 4000x10 stale",
            f"ray_ssr_train_finished{{{SECOND}}}": "_x50 0x10 stale",
        },
        {"45m": [], "55m": [], "80m": ["SsrTrainDriverGone"], "190m": []},
    ),
    Scenario(
        "an evaluation is killed",
        {
            f"ray_ssr_evaluate_started{{{FIRST}}}": "1000x20 stale",
            f"ray_ssr_evaluate_finished{{{FIRST}}}": "0x20 stale",
        },
        {"20m": [], "40m": ["SsrEvaluateDriverGone"], "200m": []},
    ),
    Scenario(
        "training takes no step, and then does",
        {f"ray_ssr_train_stalled{{{SEMANTIC}}}": "0+60x25 0x10"},
        {"19m": [], "23m": ["SsrTrainingStalled"], "30m": []},
    ),
    Scenario(
        "training waits for data, not for a moment",
        {f"ray_ssr_train_data_wait_ratio{{{SEMANTIC}}}": "0.01x10 0.9x2 0.01x30 0.5x60 0.01x60"},
        {"40m": [], "75m": ["SsrDataWaitHigh"], "150m": []},
    ),
    Scenario(
        "a step is no number, and is skipped; a new attempt counts from 0",
        {f"ray_ssr_train_nonfinite_steps{{{SEMANTIC}}}": "0x20 1x40 0x20"},
        {"19m": [], "25m": ["SsrLossNotFinite"], "45m": [], "65m": []},
    ),
    Scenario(
        "a step is no number, the driver says so once and ends",
        {f"ray_ssr_train_nonfinite_steps{{{SEMANTIC}}}": "0x20 1 stale"},
        {"19m": [], "22m": ["SsrLossNotFinite"], "60m": []},
    ),
    Scenario(
        "the held-out loss is no number",
        {f"ray_ssr_train_finite{{{SEMANTIC}}}": "1x20 0x5 1x40"},
        {"19m": [], "22m": ["SsrLossNotFinite"], "60m": []},
    ),
    Scenario(
        "nothing is saved for hours",
        {f"ray_ssr_train_unsaved{{{SEMANTIC}}}": "0+60x150 0+60x30"},
        {"119m": [], "130m": ["SsrCheckpointOld"], "170m": []},
    ),
    Scenario(
        "a disk fills, objects are spilled",
        {
            f"ray_node_disk_utilization_percentage{{{NODE}}}": "50x10 95x20 50x30",
            f'ray_object_store_memory{{{NODE},Location="SPILLED"}}': "0x30 2e10x40",
            f'ray_object_store_memory{{{NODE},Location="MMAP_SHM"}}': "2e10x70",
        },
        {"9m": [], "20m": ["SsrNodeDiskFull"], "40m": [], "60m": ["SsrSpilling"]},
    ),
    Scenario(
        "the service starts, serves by one pod at least, is gone, and is there again",
        {
            'up{namespace="ssr",ssr_role="serve",pod="a"}': "0x5 1x15 0x30 1x10",
            'up{namespace="ssr",ssr_role="serve",pod="b"}': "0x5 1x25 0x20 1x10",
            'up{namespace="ssr",job="ssr/ray",pod="a"}': "1x60",
        },
        {"4m": [], "25m": [], "35m": [], "45m": ["SsrServeDown"], "55m": []},
    ),
    Scenario(
        "the service's nodes are gone, and pods wait for others: nothing is there to be scraped",
        {'up{namespace="ssr",ssr_role="serve",pod="a"}': "1x20 stale"},
        {"19m": [], "25m": [], "35m": ["SsrServeDown"], "120m": ["SsrServeDown"], "150m": []},
    ),
    Scenario(
        "the front answers, and no replica draws; a roll takes two minutes of it",
        asked(
            {
                "/readyz 200": "0+24x20 480+0x2 480+24x20 960x30",
                "/readyz 503": "0x20 0+24x2 48x20 48+24x30",
            }
        ),
        {"20m": [], "25m": [], "40m": [], "60m": ["SsrServeNotReady"]},
    ),
    Scenario(
        "the service fails, once and then for a while",
        asked(
            {
                "/v1/pictures 200": "0+6x120",
                "/v1/attention 503": "0x10 5x30 5+1x80",
                "/readyz 200": "0+24x120",
            }
        ),
        {"9m": [], "25m": [], "70m": ["SsrServeFails"]},
    ),
    Scenario(
        "the queue is full for a while",
        asked({"/v1/pictures 200": "0+60x120", "/v1/pictures 429": "0x40 30+30x40 1230x40"}),
        {"35m": [], "70m": ["SsrServeQueueFull"], "110m": []},
    ),
    Scenario(
        "pictures take long, and then do not",
        {
            f'ssr_request_seconds_bucket{{{SERVED},pod="{pod}",route="{route}",le="{le}"}}': values
            for pod in "ab"
            for route, le, values in (
                ("/v1/pictures", "40", "0+8x40 320+50x80"),
                ("/v1/pictures", "80", "0+10x40 400+50x80"),
                ("/v1/pictures", "+Inf", "0+10x40 400+50x80"),
                ("/readyz", "40", "0x120"),
                ("/readyz", "+Inf", "0+24x120"),
            )
        },
        {"5m": [], "35m": ["SsrServeSlow"], "90m": []},
    ),
)
