"""Settings, and the one database session."""
