"""Tables of what a user brings: files of any common format, their cells and rows, and the rows written back."""
