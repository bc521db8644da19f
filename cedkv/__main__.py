"""``python -m cedkv``."""

from cedkv.cli.app import main
from cedkv.cli.click_ext import program

program(main, "python -m cedkv")
