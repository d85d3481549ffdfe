"""`dmtd evaluate`: what a DMTD model keeps of its plain base. See ``run`` for the order of things.

perplexity and agreement by phase   text_metrics      headline
run lengths                         run_lengths
multiple choice, generation         multiple_choice, generation
intervals, retention                statistics
"""

from dmtd_export.evaluate.errors import EvaluateError
from dmtd_export.evaluate.options import EvaluateOptions, HarnessOptions, OpenOptions
from dmtd_export.evaluate.report import EvaluationReport
from dmtd_export.evaluate.run import evaluate

__all__ = ["EvaluateError", "EvaluateOptions", "EvaluationReport", "HarnessOptions", "OpenOptions", "evaluate"]
