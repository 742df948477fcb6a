"""Sessions, transactions, connections, and what databases do differently."""
