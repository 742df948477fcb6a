"""The repositories: one for every database, and one for what PostgreSQL does better."""
