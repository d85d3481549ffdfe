"""Fine-tuning: the base model's own answers as training text. Import the modules; nothing heavy is loaded here."""
