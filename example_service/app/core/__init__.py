"""Settings, the one database session, and the cache in front of it."""
