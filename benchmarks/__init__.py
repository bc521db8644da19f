"""How fast the suite is, in figures with targets: ``make bench``. A measure is a file with a function ``rows``."""
