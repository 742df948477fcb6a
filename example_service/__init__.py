"""A user management service on fastapi-building-blocks: small, complete, and the same on every database."""
