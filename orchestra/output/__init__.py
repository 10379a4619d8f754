"""The common forms of every table, figure and file of the command line: numbers, times, colours, axes.

It may import the words only.
The one to copy: `numbers.py`.
"""
