"""A task of any table: where it comes from, what is a sequence in it, what is predicted, and what is wrong."""
