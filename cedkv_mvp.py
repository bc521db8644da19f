"""``python -m cedkv_mvp``: the name the project's plan uses for ``python -m cedkv``."""

from cedkv.cli import main
from cedkv.commands import program

if __name__ == "__main__":
    program(main, "python -m cedkv_mvp")
