"""What tasks share: the cache, published files, stored tokens and pixels, sequences computed on demand."""
