"""Many virtual machines in one program: start and supervise them, merge their exits, observe, decide, act, record.

It may import a machine and everything below. The policy engine itself is in `policy`: the runner gives it the time, the
facts and an executor.
The one to copy: `runner.py`.
"""
