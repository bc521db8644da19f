"""``python -m cedkv``."""

from cedkv.cli import main
from cedkv.commands import program

program(main, "python -m cedkv")
