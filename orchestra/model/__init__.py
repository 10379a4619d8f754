"""Plain data: what is wanted (specs), what a guest did (exits), what can be done about it (actions and their effects).

It imports nothing of orchestra but itself: no trio, no clock, no files. Every other folder may import it.
The one to copy: `actions.py`.
"""
