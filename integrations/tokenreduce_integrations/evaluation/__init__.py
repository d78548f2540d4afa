"""What a pipeline costs in accuracy: evaluating, comparing, and choosing."""
