"""Checkpoints of the lab's ViT: one safetensors file that describes itself, and scoring it."""
