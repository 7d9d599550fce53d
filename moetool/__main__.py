"""The command `moetool`, and `python -m moetool`."""

import signal
import sys


def main() -> int:
    """Run the command line; returns the exit code. A Ctrl-C while modules are imported waits for
    those that can say what it means (cli/main.py lets it in).
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    from moetool.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
