"""The verbs that need the runtime alone: generate, chat, bench, inspect, doctor. ``dmtd_export.cli`` puts them together.

Each module holds one verb and is imported when the verb is called.
"""

__all__: list[str] = []
