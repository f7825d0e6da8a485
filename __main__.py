"""The command ``safelight``, also ``python -m safelight``. A server starts without the client's imports."""

from __future__ import annotations

import sys


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        from .process.programs import SERVER, become

        become(SERVER, sys.argv[2:])
    from .client.cli import main as run_command

    run_command()


if __name__ == "__main__":
    main()
