"""Strategies for LoRA adapters."""
