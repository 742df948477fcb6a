"""Raw drivers, SQLAlchemy Core, this library and its peers, side by side in one run: `make bench`."""
