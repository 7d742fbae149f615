"""A run on a cluster, reckoned: its phases, what they take together, what is short."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from pipeline.config import PlanConfig
from pipeline.planning.costs import LAYOUTS, Layout
from pipeline.planning.curation import curation
from pipeline.planning.inputs import Inputs
from pipeline.planning.money import add_costs, totals
from pipeline.planning.phases import Phase, Resource, StagePlan
from pipeline.planning.quantities import Line, Sheet
from pipeline.planning.training import training

_SMALL_BATCH = 8


@dataclass(frozen=True)
class Plan:
    """A run: the phases of curation, the stages of training, and all together."""

    given: Inputs
    curation: tuple[Phase, ...]
    stages: tuple[StagePlan, ...]
    whole: Sheet
    _others: dict[Layout, Plan] = field(default_factory=dict, repr=False, compare=False)

    @property
    def cfg(self) -> PlanConfig:
        return self.given.cfg

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (*self.curation, *self.stages)

    def phase(self, name: str) -> Phase:
        """The phase of this name. Raises StopIteration where the run has none."""
        return next(phase for phase in self.phases if phase.name == name)

    def lines(self) -> Iterator[Line]:
        """Every line, phase by phase, and those of all together."""
        for phase in self.phases:
            yield from phase.lines
        yield from self.whole

    def value(self, name: str) -> float:
        """A line of all together; 0 where there is none."""
        return self.whole[name].value if name in self.whole else 0.0

    def layout(self, layout: Layout) -> Plan:
        """The same run with its features in another layout."""
        if layout == self.cfg.codec:
            return self
        if layout not in self._others:
            self._others[layout] = plan(replace(self.cfg, codec=layout), self.given.measured)
        return self._others[layout]

    @property
    def fits(self) -> bool:
        """Whether the lanes fit the nodes' memory."""
        return all(stage.memory <= self.cfg.node_memory_gib * 2**30 for stage in self.stages)


def plan(cfg: PlanConfig, measured: Mapping[str, str] | None = None) -> Plan:
    """Reckon the run of these settings.

    Args:
        cfg: the settings.
        measured: name of a setting -> where its value was measured.
    """
    given = Inputs(cfg, measured)
    before, stages = tuple(curation(given)), training(given)
    add_costs(given, [*before, *stages])
    return Plan(given, before, stages, totals(given, before, stages))


def short(phase: Phase) -> list[Resource]:
    """What a phase has too little of: what keeps its GPUs waiting, and what it overruns."""
    names = [each.name for each in phase.resources]
    over = [each for each in phase.resources if phase.use(each) > 1]
    waits = "GPUs" in names and phase.limit != "GPUs"
    return ([phase.narrowest] if waits else []) + over


def warnings(made: Plan) -> list[str]:
    """What the cluster is short of, a line each, with what would mend it."""
    found, cfg = [], made.cfg
    for phase in made.phases:
        for resource in short(phase):
            if resource is phase.narrowest:
                pace = phase.use(phase.resource("GPUs"))
                what = f"the {resource.name} ({resource.size}) keeps the GPUs at {pace:.0%}"
                what += f" of their pace; {_mend(made, phase)}"
            else:
                what = f"{resource.name}: {phase.use(resource):,.0%} of {resource.size}, which may "
                what += f"be answered by 503 until the store has split it; {resource.mend}"
            found.append(f"{phase.name}: {what}")
        if phase.memory > cfg.node_memory_gib * 2**30:
            found.append(
                f"{phase.name}: lanes hold up to {phase.memory / 2**30:,.0f} GiB on a node of "
                f"{cfg.node_memory_gib:,.0f}; lower shuffle_rows or lanes"
            )
    if (waiting := _waiting(made)) > 0:
        found.append(
            "download: takes longer than captions and features; GPUs that are held while they wait "
            f"for it cost {waiting:,.0f} GPU hours more: more --download_gbit, or fewer of them"
        )
    each = cfg.global_batch / cfg.gpus
    if each < _SMALL_BATCH and made.stages:
        found.append(
            f"{each:g} samples a GPU and step: so few reach less of the peak than is assumed; "
            "raise global_batch, or use fewer GPUs"
        )
    return found


def _waiting(made: Plan) -> float:
    """GPU hours that pass while captions and features wait for the download, if GPUs are held."""
    on_gpus = [phase for phase in made.curation if phase.gpu_hours]
    return (made.phase("download").hours - sum(phase.hours for phase in on_gpus)) * made.cfg.gpus


def _mend(made: Plan, phase: Phase) -> str:
    """The first codec of fewer bytes that frees the GPUs, if there is one; else what helps the
    narrow place itself.
    """
    after = LAYOUTS[LAYOUTS.index(made.cfg.codec) + 1 : LAYOUTS.index("images")]
    for layout in after:
        if made.layout(layout).phase(phase.name).limit == "GPUs":
            return f"--codec {layout} frees them"
    return f"what helps: {phase.narrowest.mend}"
