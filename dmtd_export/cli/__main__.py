"""``dmtd`` and ``python -m dmtd_export.cli``: Ctrl-C is answered before the command's own modules are loaded."""

from __future__ import annotations

from collections.abc import Sequence

from dmtd_export.cli.startup import leave_on_ctrl_c


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `dmtd` command; ends the process with its exit code."""
    leave_on_ctrl_c()
    from dmtd_export.cli.main import main as run

    run(arguments)


if __name__ == "__main__":
    main()
