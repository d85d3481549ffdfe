"""The options of the exporter's verbs, a file for each group; see ``dmtd_runtime.cli.options.groups``."""

__all__: list[str] = []
