"""Steps that fail, and leaving early."""
