"""Probes of long context: what a model does with what lies far behind."""
