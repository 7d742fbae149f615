"""Settings of every job: one typed dataclass per job, presets in ../presets, one parser.

Each field's docstring is its help text: it gives the unit. `parse` reads `--preset NAME`,
`--config FILE`, dotted overrides (`--semantic.steps 10`) and `--print-config` (command_line.py).
"""

from __future__ import annotations

from pipeline.command_line import parse as parse
from pipeline.command_line import parse_command as parse_command
from pipeline.config.ablation import (
    AblationConfig as AblationConfig,
)
from pipeline.config.all_reduce import (
    AllReduceConfig as AllReduceConfig,
)
from pipeline.config.curate import (
    CaptionConfig as CaptionConfig,
)
from pipeline.config.curate import (
    CurateConfig as CurateConfig,
)
from pipeline.config.curate import (
    DownloadConfig as DownloadConfig,
)
from pipeline.config.curate import (
    FeaturesConfig as FeaturesConfig,
)
from pipeline.config.curate import (
    FilterConfig as FilterConfig,
)
from pipeline.config.curate import (
    FolderConfig as FolderConfig,
)
from pipeline.config.curate import (
    ScoresConfig as ScoresConfig,
)
from pipeline.config.curate import (
    StageResources as StageResources,
)
from pipeline.config.curate import (
    WebsiteConfig as WebsiteConfig,
)
from pipeline.config.evaluate import (
    CompareConfig as CompareConfig,
)
from pipeline.config.evaluate import (
    EvaluateConfig as EvaluateConfig,
)
from pipeline.config.evaluate import (
    LearningConfig as LearningConfig,
)
from pipeline.config.evaluate import (
    LookConfig as LookConfig,
)
from pipeline.config.evaluate import (
    RequestsConfig as RequestsConfig,
)
from pipeline.config.evaluate import (
    TuningConfig as TuningConfig,
)
from pipeline.config.generate import (
    GenerateConfig as GenerateConfig,
)
from pipeline.config.plan import (
    PlanConfig as PlanConfig,
)
from pipeline.config.serve import (
    LimitsConfig as LimitsConfig,
)
from pipeline.config.serve import (
    ServeConfig as ServeConfig,
)
from pipeline.config.shared import (
    ModelsConfig as ModelsConfig,
)
from pipeline.config.shared import (
    RayConfig as RayConfig,
)
from pipeline.config.train import (
    ExportConfig as ExportConfig,
)
from pipeline.config.train import (
    OptimConfig as OptimConfig,
)
from pipeline.config.train import (
    PushConfig as PushConfig,
)
from pipeline.config.train import (
    TrainConfig as TrainConfig,
)
from pipeline.config.webdataset import (
    ImagesExportConfig as ImagesExportConfig,
)
from pipeline.config.webdataset import (
    WebDatasetConfig as WebDatasetConfig,
)
