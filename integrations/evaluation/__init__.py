"""Scores of given models on the data of all sites, without training: exact metrics from sums alone."""

from __future__ import annotations

from .federated import evaluate
from .result import Absence, Evaluation, ModelScores, ReliabilityBin, RocPoint, Scores

__all__ = ["Absence", "Evaluation", "ModelScores", "ReliabilityBin", "RocPoint", "Scores", "evaluate"]
