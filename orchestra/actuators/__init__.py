"""What acts on the threads that run guests: where they may run. (How long is the C core's: `native/cap.c`.)"""
