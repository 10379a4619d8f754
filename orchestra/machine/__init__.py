"""One virtual machine: its states, its vCPUs, and what its guest boots and sees.

It may import the host, the backends and the words (`model`, `policy`), and knows of no fleet.
The one to copy: `budget.py`.
"""
