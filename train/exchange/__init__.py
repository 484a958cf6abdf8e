"""Models on disk: opened, exported, imported, scored. No training run imports this."""
