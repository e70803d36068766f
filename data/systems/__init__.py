"""Dynamical systems: linear ones with their identification, nonlinear ones with forecasts."""
