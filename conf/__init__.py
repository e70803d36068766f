"""What can be chosen (the yaml files), and the code that reads and checks it."""
