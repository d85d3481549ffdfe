"""``python -m dmtd_export.cli``."""

from dmtd_export.cli.main import main

if __name__ == "__main__":
    main()
