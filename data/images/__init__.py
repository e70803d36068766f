"""Small pictures that need no download."""
