"""Build, check and show the data of tasks: python -m data.prepare."""
