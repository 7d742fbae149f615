"""What curation and training take on a cluster, by arithmetic: bytes, requests, Gbit/s, hours,
days, money, and what limits it. Nothing is started, and torch is not imported.
"""

from pipeline.planning.costs import CLIP as CLIP
from pipeline.planning.costs import PEAK_TFLOPS as PEAK_TFLOPS
from pipeline.planning.costs import TRAINABLES as TRAINABLES
from pipeline.planning.costs import VAE as VAE
from pipeline.planning.costs import peak_tflops as peak_tflops
from pipeline.planning.costs import step_gflop as step_gflop
from pipeline.planning.phases import Phase as Phase
from pipeline.planning.phases import StagePlan as StagePlan
from pipeline.planning.plan import Plan as Plan
from pipeline.planning.plan import plan as plan
