"""The data layer of a FastAPI service: sessions, units of work, repositories."""
