"""``python -m cedkv``."""

from cedkv.cli import main

main(prog_name="python -m cedkv")
