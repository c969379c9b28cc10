"""The FEVER experiment: does memorising pages, or how they are asked about, help a frozen model to judge claims?"""

from memory_adapters.evaluation.fever.candidates import EXPERIMENT, Bench, Candidate, Reading, standard_candidates
from memory_adapters.evaluation.fever.data import Claim, FeverData, Page, group_by_page, load_claims, load_pages
from memory_adapters.evaluation.fever.experiment import FeverResults, Run, run_fever
from memory_adapters.evaluation.fever.scoring import Judgement, Metrics, judge, measure, separation

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
