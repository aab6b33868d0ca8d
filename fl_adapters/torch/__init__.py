"""What all PyTorch trainers share: a model's state in and out, local work, restarts, LoRA, ranks."""
