"""The study of what a split and a cycle length cost and gain: its text, settings, report and cards. Not in the wheel.

``tools/study`` and ``tools/adapter_card`` start it; README.md beside this file has what was measured.
"""
