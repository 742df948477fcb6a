"""Repositories: what they declare, how rows become entities, one module for each store."""
