"""What can be done with users; knows neither FastAPI nor a database."""
