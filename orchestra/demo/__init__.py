"""The demonstration: a fleet with quiet and noisy guests, what each of them got done, and how that is shown.

It may import a fleet and everything below. The command that shows it is in `cli`.
The one to copy: `account.py`.
"""
