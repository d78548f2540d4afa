"""The command line, ``tokenreduce``. Nothing here imports torch until a command needs it."""


def main() -> None:
    """Run the command line; the entry point of the ``tokenreduce`` script."""
    from tokenreduce_integrations.cli.app import app

    app(prog_name="tokenreduce")
