"""Fine-tuning with the cyclical mask: documents, objective, training run, results. Needs the ``train`` extra.

Import the modules; nothing heavy is loaded here.
"""
