"""Strategies for models with LoRA adapters."""
