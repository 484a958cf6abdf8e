"""Package optim; see ARCHITECTURE.md."""
