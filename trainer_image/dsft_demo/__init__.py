"""The quickstart: a task that ships with the repository, its baselines, and the check of what a run made of it.

The task is real but small: do two verses, from two translations of the Bible, render the same original?
"""


class DemoError(Exception):
    """Ends the demo. The message says what is wrong with which file or value, and what to do."""
