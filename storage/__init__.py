"""Checkpoints and other files: written so that no crash loses them, read without running them."""
