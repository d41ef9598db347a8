"""Checkpoints: the reference's layout and this project's own, read, checked, converted and written."""
