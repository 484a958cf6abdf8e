"""The folder of a run: who owns it, and what run it holds."""
