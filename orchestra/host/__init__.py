"""What can be seen of a host (`observe`), what can be done with it (`control`), and what it lacks (`doctor`).

It may import the backends and the words. Nothing here knows of a fleet.
The one to copy: `observe/pressure.py`.
"""
