"""Package quant; see ARCHITECTURE.md."""
