"""Served pictures against those of the diffusers pipelines, for every family and mode."""
