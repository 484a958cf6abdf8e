"""What commands share: how they end, the options that name a model."""
