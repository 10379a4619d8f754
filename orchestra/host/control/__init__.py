"""What acts on the threads that run guests: where they may run, what of the caches they may use, and for how long."""
