"""Models that a stranger could have written, each trained plain and staged, and compared bit for bit.

``python -m tests.corpus`` runs them all and writes ``docs/coverage.md``. A file of models is a module with a list
``ENTRIES``; `own` lists ours, the others are of packages that the extra ``corpus`` installs.
"""
