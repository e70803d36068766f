"""Tasks: each file defines one, a final subclass of `stu.task.Task`; the data itself lives in a cache."""
