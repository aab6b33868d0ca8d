"""LoRA strategies on a live torch model."""
