"""Memory and recall: synthetic tasks whose answers appear earlier in the sequence."""
