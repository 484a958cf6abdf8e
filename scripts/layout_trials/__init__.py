"""Layouts tried on processes of this machine: against one process, in parts, over time."""
