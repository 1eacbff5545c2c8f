"""Measurements of a running Darkroom server; README.md says how to repeat each."""
