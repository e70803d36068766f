"""What the models reach on the Long Range Arena."""
