"""What a pipeline costs: parameters, bytes, FLOPs, tokens and time. See docs/cost.md."""
