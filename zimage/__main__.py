"""`python -m zimage`, and what the command `zimage` starts: signals are handled before anything slow is imported."""

import sys

from zimage import interrupts


def main() -> int:
    """The command line of this process; see `zimage.cli.main`."""
    interrupts.install()
    try:
        from zimage.cli import main as run

        return run()
    except interrupts.Interrupt as interrupt:  # in the import of the commands
        interrupts.leave(interrupt.number)
    finally:
        interrupts.ignore()


if __name__ == "__main__":
    sys.exit(main())
