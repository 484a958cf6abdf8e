"""Where a run is shown while it trains: console, page, warnings, trackers."""
