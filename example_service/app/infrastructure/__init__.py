"""Where users are kept."""
