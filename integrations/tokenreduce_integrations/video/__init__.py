"""Clips from files: decoding, encoding and reducing them a few frames at a time."""
