"""Caches that repositories keep rows in."""
