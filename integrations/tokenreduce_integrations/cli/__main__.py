"""``python -m tokenreduce_integrations.cli``."""

from tokenreduce_integrations.cli import main

main()
