"""What a user is; knows no framework."""
