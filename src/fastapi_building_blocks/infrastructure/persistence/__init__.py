"""The unit of work and the repositories."""
