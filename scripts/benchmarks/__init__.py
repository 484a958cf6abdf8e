"""What ``scripts/bench.py`` runs: one benchmark a file."""
