"""What a guest finds in memory and registers when it starts. One module for each kind of image."""
