"""What a guest sees on its buses: register machines, made from specs and wired by `assembly`.

It may import the backends (for memory, interrupts and doorbells) and the words; a device knows of no VM and no trio.
The one to copy: `digest.py`.
"""
