"""Trained models on disk: checkpoints, exported folders, and what reads both."""
