"""The `dmtd` command: verbs and what they share."""
