"""Names of capabilities: what a site's adapter can do, and what a strategy or a job requires of every site.

A site declares its capabilities at the handshake, where the server compares them with those that are required.
"""

from __future__ import annotations

from typing import Final

WEIGHTS: Final = "weights"
"""The updates hold weights. Not declared: it follows from the content of the updates."""

OPTIMIZER_STATE: Final = "optimizer_state"
"""The adapter reads and writes the optimizer's moments (`optimizer_state="average"`)."""

GRADIENT_CORRECTION: Final = "gradient-correction"
"""The adapter adds an array to each gradient before the optimizer step (FedProx, SCAFFOLD)."""

PERSONAL_MODEL: Final = "personal-model"
"""The adapter trains a second model, the site's own, in the same training loop (Ditto)."""

LORA: Final = "lora"
"""The model has a LoRA adapter of PEFT."""

SWARM: Final = "swarm"
"""The site can send its update to another site, and aggregate the updates of others."""

CROSS_EVALUATION: Final = "cross-evaluation"
"""The site can evaluate the models of other sites. Jobs with `cross_site` require it."""

FINAL_SCORE: Final = "final-score"
"""The site may still score the final model until it leaves the run, although it has not promised scores."""

SUMS: Final = "sums"
"""The script sums vectors (`fl_adapters.sums`) and trains no model. Also the name of its framework for policies."""

EXACT_RESTART: Final = "exact-restart"
"""The site can save and restore all of its state. Jobs with `exact_restart` require it."""
