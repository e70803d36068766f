"""Language: the next unit of a text, byte by byte."""
