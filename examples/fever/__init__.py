"""The FEVER experiment: does memorising pages, or how they are asked about, help a frozen model to judge claims?"""

from examples.fever.candidates import EXPERIMENT, Bench, Candidate, Reading, standard_candidates
from examples.fever.data import Claim, FeverData, Page, group_by_page, load_claims, load_pages
from examples.fever.experiment import FeverResults, Run, run_fever
from examples.fever.scoring import Judgement, Metrics, judge, measure, separation

__all__ = [
    "EXPERIMENT",
    "Bench",
    "Candidate",
    "Claim",
    "FeverData",
    "FeverResults",
    "Judgement",
    "Metrics",
    "Page",
    "Reading",
    "Run",
    "group_by_page",
    "judge",
    "load_claims",
    "load_pages",
    "measure",
    "run_fever",
    "separation",
    "standard_candidates",
]
