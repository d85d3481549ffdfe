"""The options of the command line, a file for each group. A group is a dataclass that a verb takes whole; see ``groups``."""

__all__: list[str] = []
