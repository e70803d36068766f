"""Work with many runs, or with many small models."""
