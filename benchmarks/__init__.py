"""How fast the suite is, in figures with targets: ``make bench``. A measure is a file with a function ``rows``."""

from cedkv.core import threads

threads.choose()  # as a command does, before a measure imports torch
