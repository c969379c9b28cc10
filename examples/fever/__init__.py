"""Run the FEVER experiment: does a memory of pages, or of solved claims, help a frozen model to judge claims?"""

from examples.fever.baselines import EXPERIMENT, FeverBaseline, Reading, Setup, standard_baselines
from examples.fever.data import Claim, FeverData, Page, group_by_page, load_claims, load_pages
from examples.fever.experiment import FeverResults, Run, run_fever
from examples.fever.scoring import Judgement, Metrics, judge, measure, separation

__all__ = [
    "EXPERIMENT",
    "Claim",
    "FeverBaseline",
    "FeverData",
    "FeverResults",
    "Judgement",
    "Metrics",
    "Page",
    "Reading",
    "Run",
    "Setup",
    "group_by_page",
    "judge",
    "load_claims",
    "load_pages",
    "measure",
    "run_fever",
    "separation",
    "standard_baselines",
]
