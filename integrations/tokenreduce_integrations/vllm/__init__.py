"""Served by vLLM: its own model classes, whose images and clips are reduced before the LLM."""
